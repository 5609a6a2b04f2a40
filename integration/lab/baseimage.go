package lab

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Base images that a plugin's Dockerfile starts from.
const (
	debianImage = "debian:bookworm-slim"
	golangImage = "golang:1.26-bookworm"
)

// ImportBaseImages gives the engine debian:bookworm-slim (with iptables, CA
// certificates and what else the Dockerfile installs) and golang:1.26-bookworm (that and this
// machine's Go tree) unless it has them, so that builds need no registry. The
// parts are made once and kept in the cache.
func (h *Host) ImportBaseImages(ctx context.Context, log io.Writer) error {
	debian, err := debianTar(ctx, log)
	if err != nil {
		return err
	}
	if err := h.importImage(ctx, debian, debianImage, imagePath, `CMD ["bash"]`); err != nil {
		return err
	}
	golang, err := golangTar(ctx, debian)
	if err != nil {
		return err
	}
	return h.importImage(ctx, golang, golangImage, `CMD ["bash"]`,
		"ENV GOPATH=/go GOTOOLCHAIN=local PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

// debianTar makes the small Debian root in the cache unless it is there. It is the
// bookworm engine's root without the engine, which spares a second debootstrap.
func debianTar(ctx context.Context, log io.Writer) (string, error) {
	engine := Engines()[0]
	if _, err := engine.Fetch(ctx, log); err != nil {
		return "", err
	}
	// The packages are in the name, so that others make a new image.
	file := filepath.Join(CacheDir(), "debian-bookworm-slim-"+packagesKey(engine)+".tar")
	return file, makeCached(file, func(w io.Writer) error {
		skip := map[string]bool{"usr/share/doc": true, "usr/share/man": true, "usr/share/locale": true,
			"var/lib/apt/lists": true, "var/cache/apt": true}
		for _, name := range []string{"docker.io", "containerd", "runc", "docker-registry"} {
			if err := addPackageFiles(engine.Root(), name, skip); err != nil {
				return err
			}
		}
		tw := tar.NewWriter(w)
		if err := addTree(tw, engine.Root(), "", skip); err != nil {
			return err
		}
		return tw.Close()
	})
}

// addPackageFiles adds what a Debian package installed, directories excepted.
func addPackageFiles(root, name string, files map[string]bool) error {
	list, err := os.ReadFile(filepath.Join(root, "var/lib/dpkg/info", name+".list"))
	if err != nil {
		return err
	}
	for _, file := range strings.Fields(string(list)) {
		// Stat, not Lstat: /bin and /lib are links that packages name too.
		if info, err := os.Stat(filepath.Join(root, file)); err == nil && !info.IsDir() {
			files[strings.TrimPrefix(file, "/")] = true
		}
	}
	return nil
}

// packagesKey stands for the packages of an engine.
func packagesKey(e Engine) string {
	sum := sha256.Sum256([]byte(strings.Join(e.packages, " ")))
	return hex.EncodeToString(sum[:4])
}

// golangTar makes the Go image's root out of the Debian one's tar.
func golangTar(ctx context.Context, debian string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return "", fmt.Errorf("find the machine's Go: %w", err)
	}
	env := strings.Fields(string(out))
	if len(env) != 2 {
		return "", fmt.Errorf("go env GOROOT GOVERSION said %q", out)
	}
	// What it is made of is in the name, so that a newer Go makes a new image.
	file := filepath.Join(CacheDir(), "golang-"+env[1]+"-"+packagesKey(Engines()[0])+".tar")
	return file, makeCached(file, func(w io.Writer) error {
		tw := tar.NewWriter(w)
		if err := copyTar(tw, debian); err != nil {
			return err
		}
		skip := map[string]bool{"usr/local/go/test": true, "usr/local/go/doc": true, "usr/local/go/api": true}
		if err := addTree(tw, env[0], "usr/local/go", skip); err != nil {
			return err
		}
		return tw.Close()
	})
}

// copyTar adds the entries of another archive.
func copyTar(tw *tar.Writer, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return err
		}
	}
}

// addTree adds a directory of the machine under a name in the archive, without the
// files and the content of the directories in skip (names in the archive). Device
// nodes are left out: a container gets its own.
func addTree(tw *tar.Writer, dir, as string, skip map[string]bool) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		name := filepath.Join(as, rel)
		if name == "." || d.Type()&(fs.ModeDevice|fs.ModeSocket|fs.ModeNamedPipe) != 0 {
			return nil
		}
		if skip[name] && !d.IsDir() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		if d.Type()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		h.Name = name
		if d.IsDir() {
			h.Name += "/"
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if skip[name] {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(tw, f)
		return err
	})
}
