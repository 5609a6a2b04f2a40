package volume

import (
	"fmt"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// maxName is the longest name in bytes; the record's file name adds five to it
// and a file name has at most 255.
const maxName = 200

// maxSnapshotName is the longest name of a snapshot in bytes. With that of the
// volume and what names of temporary files need it still fits into a file name.
const maxSnapshotName = 100

// CheckName refuses what is no volume name. dockerd checks no names for plugins,
// so every handler does. A name that passes is safe as a single path element, and
// is never the name of Berth's own directory, since it does not begin with a dot.
func CheckName(name string) error {
	return checkName("volume", name, maxName)
}

// CheckSnapshotName is CheckName for snapshots, whose names are shorter, and do not
// end as those of their records do and of what is being made beside them.
func CheckSnapshotName(name string) error {
	for _, end := range []string{suffix, ".making", ".img"} {
		if strings.HasSuffix(name, end) {
			return fault.Invalid("snapshot name %.120q: it must not end in %s", name, end)
		}
	}
	return checkName("snapshot", name, maxSnapshotName)
}

func checkName(kind, name string, most int) error {
	if name == "" {
		return fault.Invalid("%s name is empty", kind)
	}
	if len(name) > most {
		return fault.Invalid("%s name %.40q… has %d bytes: at most %d are allowed", kind, name, len(name), most)
	}
	for i := range len(name) {
		c := name[i]
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if alphanumeric || i > 0 && (c == '_' || c == '.' || c == '-') {
			continue
		}
		what := fmt.Sprintf("character %d", i+1)
		if i == 0 {
			what = "the first character"
		}
		return fault.Invalid("%s name %q: %s is not allowed; want letters, digits, and after the first also _ . -", kind, name, what)
	}
	return nil
}

// Anonymous tells whether dockerd made the name up for a volume that the user
// did not name: 64 hexadecimal digits.
func Anonymous(name string) bool {
	if len(name) != 64 {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// A Reference names a volume, or one of its snapshots if Snapshot is not "".
type Reference struct{ Volume, Snapshot string }

// String gives the form that ParseReference takes.
func (r Reference) String() string {
	if r.Snapshot == "" {
		return r.Volume
	}
	return r.Volume + "@" + r.Snapshot
}

// ParseReference reads "VOLUME" or "VOLUME@SNAPSHOT". The error is invalid.
func ParseReference(s string) (Reference, error) {
	name, snap, has := strings.Cut(s, "@")
	ref := Reference{Volume: name, Snapshot: snap}
	if err := CheckName(name); err != nil {
		return Reference{}, err
	}
	if !has {
		return ref, nil
	}
	if err := CheckSnapshotName(snap); err != nil {
		return Reference{}, err
	}
	return ref, nil
}

// CheckReference is CheckName where the read-only name of a snapshot is allowed too.
func CheckReference(s string) error {
	_, err := ParseReference(s)
	return err
}
