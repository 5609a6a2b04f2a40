package volplugin

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// maxRootName bounds the name of a root, in bytes.
const maxRootName = 32

// A NamedRoot is a root that volumes are kept in when option root names it.
type NamedRoot struct {
	// Name follows the rule of volumes' names and has at most 32 bytes. "default"
	// means Config.Root and is nobody else's.
	Name string
	// Path is the absolute path of an existing directory, "" with Share.
	Path string
	// Share is what Berth mounts, nil for none.
	Share *netfs.Source
}

// ParseRoots reads the setting BERTH_ROOTS: entries NAME=PLACE with white space
// between them. A place is an absolute path or a share in the form of
// netfs.ParseURL: "fast=/data/fast nas=nfs://nas.lan/export/volumes?vers=4.2,noatime".
// The error is invalid and names the entry.
func ParseRoots(setting string) ([]NamedRoot, error) {
	var roots []NamedRoot
	seen := map[string]bool{}
	for entry := range strings.FieldsSeq(setting) {
		name, place, ok := strings.Cut(entry, "=")
		if !ok {
			return nil, fault.Invalid("root %.80q: want NAME=/PATH or NAME=nfs://SERVER/PATH", entry)
		}
		root, err := parseRoot(name, place)
		if err != nil {
			return nil, err
		}
		if seen[name] {
			return nil, fault.Invalid("root %s is given twice", name)
		}
		seen[name] = true
		roots = append(roots, root)
	}
	return roots, nil
}

func parseRoot(name, place string) (NamedRoot, error) {
	root := NamedRoot{Name: name, Path: place}
	if strings.Contains(place, "://") {
		share, err := netfs.ParseURL(place)
		if err != nil {
			return root, fmt.Errorf("root %.80q: %w", name, err)
		}
		root.Path, root.Share = "", &share
	}
	return root, root.check()
}

// check finds what cannot be a root, without looking for it.
func (r NamedRoot) check() error {
	if err := volume.CheckName(r.Name); err != nil || len(r.Name) > maxRootName {
		return fault.Invalid("root name %.80q: want at most %d letters, digits, _ . and -, of which the first is a letter or a digit", r.Name, maxRootName)
	}
	if r.Name == homeKey {
		return fault.Invalid("root %s=%.80q: the name %s means the root that is always there", r.Name, r.Path, homeKey)
	}
	if r.Share != nil && r.Path == "" {
		return nil
	}
	if !filepath.IsAbs(r.Path) || filepath.Clean(r.Path) != r.Path {
		return fault.Invalid("root %s=%.80q: want an absolute path without . and .. and with single slashes", r.Name, r.Path)
	}
	return nil
}

// checkRoots finds roots that get in each other's way.
func (c *Config) checkRoots() error {
	paths := map[string]string{c.Root: homeKey}
	names := map[string]bool{}
	for _, root := range c.Roots {
		if err := root.check(); err != nil {
			return err
		}
		if names[root.Name] {
			return fault.Invalid("root %s is given twice", root.Name)
		}
		names[root.Name] = true
		if root.Share != nil {
			continue
		}
		if other, ok := paths[root.Path]; ok {
			return fault.Invalid("root %s=%s: root %s has this path already", root.Name, root.Path, other)
		}
		paths[root.Path] = root.Name
	}
	for path, name := range paths {
		for within, other := range paths {
			rel, ok := strings.CutPrefix(within, strings.TrimSuffix(path, "/")+"/")
			if ok && (rel == ".berth" || strings.HasPrefix(rel, ".berth/")) {
				return fault.Invalid("root %s=%s: it is among the records of root %s", other, within, name)
			}
		}
	}
	return nil
}
