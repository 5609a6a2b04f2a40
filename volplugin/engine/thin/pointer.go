package thin

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	// schema of all files that this package writes.
	schema = 1
	// maxFile bounds what is read of one.
	maxFile = 16 << 10
	// maxDevice is the kernel's largest number of a thin device.
	maxDevice = 1<<24 - 1
)

// kind of a pointer, which tells it from whatever other file has its place.
const pointerKind = "berth-thin"

// A pointer leads from a volume or a snapshot to its thin device.
type pointer struct {
	Schema int    `json:"schema"`
	Kind   string `json:"kind"`
	// Pool is the UUID of the pool.
	Pool string `json:"pool"`
	// Volume is the UUID of the volume.
	Volume string          `json:"volume"`
	Device uint32          `json:"device"`
	FS     filesystem.Kind `json:"fs"`
	// Size of the device in bytes.
	Size uint64 `json:"size"`
	// Grow says that the file system may be smaller than its device.
	Grow bool `json:"grow,omitempty"`
	// Fresh: the volume was never attached, so nobody but Create or Clone wrote to it.
	Fresh bool `json:"fresh,omitempty"`
	// Rollback is the last one. As long as Pending is set, the device that the volume
	// had before may have no other pointer.
	Rollback *rollback `json:"rollback,omitempty"`
}

// rollback is what happened, or is happening.
type rollback struct {
	Snapshot string `json:"snapshot"`
	Keep     string `json:"keep"`
	Pending  bool   `json:"pending,omitempty"`
	// Device, Size and Grow are the volume's before.
	Device uint32 `json:"device"`
	Size   uint64 `json:"size"`
	Grow   bool   `json:"grow,omitempty"`
}

func encode(v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	return append(data, '\n'), err
}

// errForeign says that a file is not the engine's.
var errForeign = errors.New("is no pointer to a thin device")

// decodePointer reads the stored form.
func decodePointer(data []byte) (pointer, error) {
	var head struct {
		Schema int    `json:"schema"`
		Kind   string `json:"kind"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return pointer{}, fmt.Errorf("%w: %w", errForeign, err)
	}
	if head.Kind != pointerKind {
		return pointer{}, errForeign
	}
	if head.Schema > schema {
		return pointer{}, fmt.Errorf("was written by a newer Berth: it has schema %d and this one knows up to %d", head.Schema, schema)
	}
	var ptr pointer
	if err := json.Unmarshal(data, &ptr); err != nil {
		return pointer{}, fmt.Errorf("is damaged: %w", err)
	}
	if err := ptr.check(); err != nil {
		return pointer{}, fmt.Errorf("is damaged: %w", err)
	}
	return ptr, nil
}

// check finds values that no Berth of this schema writes.
func (p pointer) check() error {
	switch {
	case p.Schema != schema:
		return fmt.Errorf("schema %d", p.Schema)
	case !isUUID(p.Pool):
		return fmt.Errorf("pool %.40q", p.Pool)
	case p.Device > maxDevice:
		return fmt.Errorf("device %d", p.Device)
	case !validSize(p.Size):
		return fmt.Errorf("size %d", p.Size)
	}
	switch p.FS {
	case filesystem.Btrfs, filesystem.XFS, filesystem.Ext4:
	default:
		return fmt.Errorf("file system %.20q", p.FS)
	}
	if r := p.Rollback; r != nil {
		if r.Device > maxDevice || !validSize(r.Size) || r.Pending && (checkEntry(r.Keep) != nil || r.Device == p.Device) {
			return errors.New("rollback")
		}
	}
	return nil
}

// sizeUnit is what sizes of devices are rounded up to.
const sizeUnit = 1 << 20

// maxSize is what no device here ever has.
const maxSize = 1 << 60

func validSize(n uint64) bool { return n != 0 && n%sizeUnit == 0 && n <= maxSize }

// isUUID accepts the one form that is written, since it becomes a name.
func isUUID(s string) bool {
	id, err := uuid.Parse(s)
	return err == nil && id.String() == s
}

// checkEntry refuses what is no single name.
func checkEntry(name string) error {
	if name == "" || name[0] == '.' || len(name) > 255 {
		return fmt.Errorf("%q is no name", name)
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return fmt.Errorf("%q is no name", name)
		}
	}
	return nil
}

// readPointer reads a pointer. The error wraps fs.ErrNotExist when there is none.
func readPointer(dir *rooted.Dir, name string) (pointer, error) {
	data, err := dir.ReadFile(name, maxFile)
	if err != nil {
		return pointer{}, err
	}
	ptr, err := decodePointer(data)
	if err != nil {
		return pointer{}, fault.Unavailable("%s/%s %w", dir.Path(), name, err)
	}
	return ptr, nil
}

// newFile makes a file under a name that must be free, complete and on disk; the
// error wraps fs.ErrExist when it is taken.
func (o *opened) newFile(dir *rooted.Dir, name string, v any) error {
	return o.putFile(v, func(temp string) error {
		if err := o.Tmp.Link(temp, dir, name); err != nil {
			return errors.Join(err, o.Tmp.Remove(temp))
		}
		err := errors.Join(o.Tmp.Remove(temp), dir.Sync())
		if err != nil { // not certain to be there, so it is not
			err = errors.Join(err, dir.Remove(name))
		}
		return err
	})
}

// replaceFile puts a file in the place of another, complete and on disk.
func (o *opened) replaceFile(dir *rooted.Dir, name string, v any) error {
	return o.putFile(v, func(temp string) error {
		if err := o.Tmp.Rename(temp, dir, name); err != nil {
			return errors.Join(err, o.Tmp.Remove(temp))
		}
		return dir.Sync()
	})
}

func (o *opened) putFile(v any, place func(temp string) error) error {
	data, err := encode(v)
	if err != nil {
		return err
	}
	temp := "thin-" + uuid.NewString()
	if err := o.Tmp.WriteNew(temp, data, 0o600); err != nil {
		return err
	}
	return place(temp)
}

// move renames a file to a name that is free, in one step, and puts that on disk. The
// error wraps fs.ErrExist or fs.ErrNotExist.
func move(from *rooted.Dir, name string, to *rooted.Dir, newName string) error {
	if err := from.RenameNew(name, to, newName); err != nil {
		return err
	}
	return errors.Join(to.Sync(), from.Sync())
}

// unlink removes a file and puts that on disk. Missing is no error.
func unlink(dir *rooted.Dir, name string) error {
	if err := dir.Remove(name); err != nil && !missing(err) {
		return err
	}
	return dir.Sync()
}
