package tarball

import (
	"archive/tar"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/tree"
)

// Keys of pax records.
const (
	xattrPrefix = "SCHILY.xattr."
	aclAccess   = "SCHILY.acl.access"
	aclDefault  = "SCHILY.acl.default"
	charset     = "hdrcharset"
	// missing holds the reason why the file of that name is not in the archive.
	missing = "BERTH.missing"
)

// Extended attributes that hold ACLs.
const (
	xattrAccess  = "system.posix_acl_access"
	xattrDefault = "system.posix_acl_default"
)

// = ends the key of a record. GNU tar writes it so, and % for that reason.
var (
	encodeKey = strings.NewReplacer("%", "%25", "=", "%3D")
	decodeKey = strings.NewReplacer("%25", "%", "%3D", "=")
)

// newHeader describes an item, but for its type and size.
func newHeader(item *tree.Item, name string) (*tar.Header, error) {
	st := &item.Stat
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec)), PAXRecords: map[string]string{},
	}
	err := item.Attributes(func(key string, value []byte) error {
		h.PAXRecords[xattrPrefix+encodeKey.Replace(key)] = string(value)
		if record := map[string]string{xattrAccess: aclAccess, xattrDefault: aclDefault}[key]; record != "" {
			text, err := aclText(value)
			if err != nil {
				return err
			}
			h.PAXRecords[record] = text
		}
		return nil
	})
	return h, err
}

// raw says that the names in a header are bytes and no text.
func raw(h *tar.Header) {
	if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) {
		h.PAXRecords[charset] = "BINARY"
	}
}

// xattrs are the extended attributes in a header, ACLs among them, without those that
// belong to no copy. lost are ACLs that name users whose numbers nobody knows here.
func xattrs(h *tar.Header) (all map[string]string, lost []string, err error) {
	all = map[string]string{}
	for record, value := range h.PAXRecords {
		key, ok := strings.CutPrefix(record, xattrPrefix)
		if !ok {
			continue
		}
		key = decodeKey.Replace(key)
		if key == "" || strings.ContainsRune(key, 0) || len(key) > 255 {
			return nil, nil, errors.New("an extended attribute has no valid name")
		}
		if tree.Keeps(key) {
			all[key] = value
		}
	}
	for record, key := range map[string]string{aclAccess: xattrAccess, aclDefault: xattrDefault} {
		text := h.PAXRecords[record]
		if _, has := all[key]; has || text == "" {
			continue
		}
		value, err := parseACL(text)
		switch {
		case errors.Is(err, errNamed):
			lost = append(lost, key)
		case err != nil:
			return nil, nil, err
		default:
			all[key] = string(value)
		}
	}
	return all, lost, nil
}

// typeOf is the type of a file that an entry makes; 0 for a hard link.
func typeOf(h *tar.Header) (mode uint32, ok bool) {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return unix.S_IFREG, true
	case tar.TypeDir:
		return unix.S_IFDIR, true
	case tar.TypeSymlink:
		return unix.S_IFLNK, true
	case tar.TypeChar:
		return unix.S_IFCHR, true
	case tar.TypeBlock:
		return unix.S_IFBLK, true
	case tar.TypeFifo:
		return unix.S_IFIFO, true
	case tar.TypeLink:
		return 0, true
	}
	return 0, false
}
