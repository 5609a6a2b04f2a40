package btrfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	rootTree = 1
	// firstID is the lowest ID of a subvolume that was made, and the inode number of
	// every subvolume's top.
	firstID = 256

	// rootItemKind is of the item that a subvolume has until all its blocks are free.
	rootItemKind = 132
	rootRefKind  = 156
)

// subvolumeID is the ID of the subvolume whose top dir is, 0 when it is an ordinary
// directory.
func subvolumeID(dir *rooted.Dir) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(dir.FD(), &st); err != nil {
		return 0, fail("stat", dir.Path(), err)
	}
	if st.Ino != firstID {
		return 0, nil
	}
	return treeOf(dir)
}

// treeOf is the ID of the subvolume that a directory is in.
func treeOf(dir *rooted.Dir) (uint64, error) {
	args := lookupArgs{object: firstID}
	if err := ioctl(dir.FD(), inoLookup, unsafe.Pointer(&args)); err != nil {
		return 0, fail("find the subvolume of", dir.Path(), err)
	}
	return args.tree, nil
}

func createSubvolume(parent *rooted.Dir, name string) error {
	var args nameArgs
	err := fill(args.name[:], name)
	if err == nil {
		err = ioctl(parent.FD(), subvolCreate, unsafe.Pointer(&args))
	}
	return fail("create subvolume", parent.Path()+"/"+name, err)
}

// snapshot makes a snapshot of the subvolume src; it is on disk when it returns.
func snapshot(src, parent *rooted.Dir, name string, readOnly bool) error {
	args := volumeArgs{fd: uint64(src.FD())}
	if readOnly {
		args.flags = readOnlyFlag
	}
	err := fill(args.name[:], name)
	if err == nil {
		err = ioctl(parent.FD(), snapCreateV2, unsafe.Pointer(&args))
	}
	return fail("snapshot "+src.Path()+" to", parent.Path()+"/"+name, err)
}

func isReadOnly(subvolume *rooted.Dir) (bool, error) {
	var flags uint64
	err := ioctl(subvolume.FD(), subvolGet, unsafe.Pointer(&flags))
	return flags&readOnlyFlag != 0, fail("read flags of", subvolume.Path(), err)
}

func setReadOnly(subvolume *rooted.Dir, readOnly bool) error {
	was, err := isReadOnly(subvolume)
	if err != nil || was == readOnly {
		return err
	}
	var flags uint64
	if err := ioctl(subvolume.FD(), subvolGet, unsafe.Pointer(&flags)); err != nil {
		return fail("read flags of", subvolume.Path(), err)
	}
	flags ^= readOnlyFlag
	return fail("set flags of", subvolume.Path(), ioctl(subvolume.FD(), subvolSet, unsafe.Pointer(&flags)))
}

// A child is a subvolume inside another one.
type child struct {
	id, dir uint64 // dir is the inode number of the directory that it is in
	name    string
}

// children lists the subvolumes directly inside another one, of which dir or any other
// directory of the file system is a handle.
func children(dir *rooted.Dir, id uint64) ([]child, error) {
	items, err := search(dir.FD(), rootTree, id, rootRefKind, 0, ^uint64(0))
	if err != nil {
		return nil, err
	}
	var found []child
	for _, item := range items {
		ref, err := parseRef(item)
		if err != nil {
			return nil, err
		}
		found = append(found, ref)
	}
	return found, nil
}

// parseRef reads struct btrfs_root_ref.
func parseRef(ref item) (child, error) {
	if len(ref.data) < 18 {
		return child{}, errItems
	}
	size := int(binary.LittleEndian.Uint16(ref.data[16:]))
	if len(ref.data) < 18+size {
		return child{}, errItems
	}
	return child{id: ref.offset, dir: binary.LittleEndian.Uint64(ref.data), name: string(ref.data[18 : 18+size])}, nil
}

// deleteSubvolume deletes the subvolume name with all subvolumes inside it.
func deleteSubvolume(ctx context.Context, parent *rooted.Dir, name string) error {
	subvolume, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer subvolume.Close()
	id, err := subvolumeID(subvolume)
	if err != nil {
		return err
	}
	// A container that still runs may make new ones meanwhile, but not for ever.
	for range 10 {
		if err = deleteInside(ctx, subvolume, id); err != nil {
			return err
		}
		var args nameArgs
		if err = fill(args.name[:], name); err == nil {
			err = ioctl(parent.FD(), snapDestroy, unsafe.Pointer(&args))
		}
		if !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fail("delete subvolume", subvolume.Path(), err)
	}
	return dropQgroup(parent, id)
}

// deleteInside deletes all subvolumes inside another one.
func deleteInside(ctx context.Context, subvolume *rooted.Dir, id uint64) error {
	found, err := children(subvolume, id)
	if err != nil || len(found) == 0 {
		return err
	}
	// Nothing can be deleted in a subvolume that is read-only.
	if err := setReadOnly(subvolume, false); err != nil {
		return err
	}
	for _, inner := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := deleteChild(ctx, subvolume, id, inner); err != nil {
			return err
		}
	}
	return nil
}

func deleteChild(ctx context.Context, subvolume *rooted.Dir, id uint64, inner child) error {
	below, err := children(subvolume, inner.id)
	if err != nil {
		return err
	}
	if len(below) > 0 {
		dir, err := openChild(subvolume, id, inner)
		if err != nil {
			return err
		}
		defer dir.Close()
		top, err := dir.Dir(inner.name)
		if err != nil {
			return err
		}
		defer top.Close()
		if found, err := subvolumeID(top); err != nil || found != inner.id {
			return errors.Join(err, fail("delete subvolume", top.Path(), unix.EBUSY)) // moved meanwhile
		}
		if err := deleteInside(ctx, top, inner.id); err != nil {
			return err
		}
	}
	args := volumeArgs{flags: byIDFlag}
	binary.NativeEndian.PutUint64(args.name[:], inner.id)
	err = ioctl(subvolume.FD(), snapDestroyV2, unsafe.Pointer(&args))
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) { // before kernel 5.7
		err = destroyByName(subvolume, id, inner)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fail("delete subvolume "+inner.name+" in", subvolume.Path(), err)
	}
	return dropQgroup(subvolume, inner.id)
}

// destroyByName deletes a subvolume that has none inside it by its name.
func destroyByName(subvolume *rooted.Dir, id uint64, inner child) error {
	dir, err := openChild(subvolume, id, inner)
	if err != nil {
		return err
	}
	defer dir.Close()
	var args nameArgs
	if err := fill(args.name[:], inner.name); err != nil {
		return err
	}
	return ioctl(dir.FD(), snapDestroy, unsafe.Pointer(&args))
}

// openChild opens the directory that a subvolume is in, without following links.
func openChild(subvolume *rooted.Dir, id uint64, inner child) (*rooted.Dir, error) {
	args := lookupArgs{tree: id, object: inner.dir}
	if err := ioctl(subvolume.FD(), inoLookup, unsafe.Pointer(&args)); err != nil {
		return nil, fail("find subvolume "+inner.name+" in", subvolume.Path(), err)
	}
	path, _, _ := bytes.Cut(args.name[:], []byte{0})
	dir, err := rooted.Open(subvolume.ProcPath())
	for name := range strings.SplitSeq(strings.Trim(string(path), "/"), "/") {
		if err != nil || name == "" {
			break
		}
		outer := dir
		dir, err = outer.Dir(name)
		_ = outer.Close()
	}
	return dir, err
}

// deleteTree deletes whatever name is: a subvolume, a directory with subvolumes
// somewhere in it, a file. Missing is no error.
func deleteTree(ctx context.Context, parent *rooted.Dir, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := parent.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	dir, err := parent.Dir(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil {
		return err
	}
	if id != 0 {
		return deleteSubvolume(ctx, parent, name)
	}
	names, err := dir.Names()
	if err != nil {
		return err
	}
	for _, entry := range names {
		if err := deleteTree(ctx, dir, entry); err != nil {
			return err
		}
	}
	if err := parent.Rmdir(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func fail(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}
