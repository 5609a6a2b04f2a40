package btrfs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// smallTree is the most that fits into one leaf, in bytes with the items' headers: the
// kernel's largest node.
const smallTree = 64 << 10

// itemHead is what a leaf spends on an item beside its data.
const itemHead = 25

// A moment is what an engine.Mark of this package says of a snapshot.
type moment struct {
	// FileSystem and Source are the UUIDs of the file system and of the subvolume that
	// the snapshot is of.
	FileSystem, Source string
	// Generation is the transaction that made the snapshot.
	Generation uint64
	// Changed is the transaction that last changed an inode of the source before, and
	// ChangedAt when that was, in seconds and nanoseconds. The time tells the histories
	// apart that a file system has when its device was set back to an earlier state.
	Changed   uint64
	ChangedAt [2]uint64
	// Items is a digest of all items when they may be in a single leaf, which each
	// snapshot writes anew; "" when they are not.
	Items string `json:",omitempty"`
}

// Mark tells which state of which subvolume a snapshot is; "" when it is nothing that
// could be told again: no subvolume, no snapshot, or one that was written to.
func (Trees) Mark(ctx context.Context, tree *rooted.Dir) (engine.Mark, error) {
	m, ok, err := momentOf(ctx, tree)
	if err != nil || !ok {
		return "", err
	}
	text, err := json.Marshal(m)
	return engine.Mark(text), err
}

// Unchanged tells whether a snapshot has what the snapshot had that since is the mark of.
// Whatever was written to the tree of the source makes it say no, access times too.
func (Trees) Unchanged(ctx context.Context, tree *rooted.Dir, since engine.Mark) (bool, error) {
	var then moment
	if err := json.Unmarshal([]byte(since), &then); err != nil {
		return false, fmt.Errorf("btrfs: mark %.200q: %w", since, err)
	}
	now, ok, err := momentOf(ctx, tree)
	if err != nil || !ok {
		return false, err
	}
	switch {
	case now.FileSystem != then.FileSystem, now.Source != then.Source, now.Changed != then.Changed, now.ChangedAt != then.ChangedAt,
		now.Generation <= then.Generation, now.Items != then.Items:
		return false, nil
	case now.Items != "":
		return true, nil
	}
	written, err := writtenSince(tree, then.Generation)
	return !written && err == nil, err
}

// momentOf describes a snapshot that nobody has written to.
func momentOf(ctx context.Context, tree *rooted.Dir) (m moment, ok bool, err error) {
	if err := ctx.Err(); err != nil {
		return m, false, err
	}
	id, err := subvolumeID(tree)
	if err != nil || id == 0 {
		return m, false, err
	}
	var info subvolumeInfo
	err = ioctl(tree.FD(), getSubvolInfo, unsafe.Pointer(&info))
	if errors.Is(err, unix.ENOTTY) { // before kernel 4.18
		return m, false, nil
	}
	var fs fileSystemInfo
	if err == nil {
		err = ioctl(tree.FD(), fsInfo, unsafe.Pointer(&fs))
	}
	if err != nil {
		return m, false, fail("read what is known of", tree.Path(), err)
	}
	readOnly, err := isReadOnly(tree)
	if err != nil || !readOnly || info.parent == [16]byte{} || info.generation != info.otransid || info.ctransid > info.otransid {
		return m, false, err
	}
	m = moment{
		FileSystem: hex.EncodeToString(fs.id[:]), Source: hex.EncodeToString(info.parent[:]), Generation: info.otransid,
		Changed: info.ctransid, ChangedAt: [2]uint64{info.ctime.seconds, uint64(info.ctime.nanoseconds)},
	}
	m.Items, err = digest(tree)
	return m, err == nil, err
}

// digest is one of all items of a tree that is small, "" for any other. A search in tree 0
// is one in that of the handle.
func digest(dir *rooted.Dir) (string, error) {
	sum, size := sha256.New(), 0
	args := bigSearchArgs{key: searchKey{maxObject: ^uint64(0), maxOffset: ^uint64(0), maxTransid: ^uint64(0), maxType: ^uint32(0)}}
	for {
		args.key.items, args.size = ^uint32(0), uint64(len(args.buffer))
		if err := ioctl(dir.FD(), treeSearchV2, unsafe.Pointer(&args)); err != nil {
			return "", fail("read the items of", dir.Path(), err)
		}
		items, err := parseItems(args.buffer[:], args.key.items)
		if err != nil {
			return "", err
		}
		if len(items) == 0 {
			return hex.EncodeToString(sum.Sum(nil)), nil
		}
		for _, item := range items {
			if size += itemHead + len(item.data); size > smallTree {
				return "", nil
			}
			head := binary.LittleEndian.AppendUint64(nil, item.object)
			head = binary.LittleEndian.AppendUint32(head, item.kind)
			head = binary.LittleEndian.AppendUint64(head, item.offset)
			head = binary.LittleEndian.AppendUint64(head, uint64(len(item.data)))
			sum.Write(head)
			sum.Write(item.data)
		}
		if !args.key.after(items[len(items)-1]) {
			return hex.EncodeToString(sum.Sum(nil)), nil
		}
	}
}

// after lets a search go on behind an item. It is false behind the last that there can
// be.
func (k *searchKey) after(last item) bool {
	k.minObject, k.minType, k.minOffset = last.object, last.kind, last.offset+1
	if k.minOffset == 0 {
		if k.minType++; k.minType > 0xff {
			k.minType = 0
			k.minObject++
			return k.minObject != 0
		}
	}
	return true
}

// writtenSince tells whether a tree has a leaf that a later transaction has written. The
// kernel looks at no other ones.
func writtenSince(dir *rooted.Dir, generation uint64) (bool, error) {
	args := searchArgs{key: searchKey{
		maxObject: ^uint64(0), maxOffset: ^uint64(0), minTransid: generation + 1, maxTransid: ^uint64(0), maxType: ^uint32(0), items: 1,
	}}
	if err := ioctl(dir.FD(), treeSearch, unsafe.Pointer(&args)); err != nil {
		return false, fail("search what is new in", dir.Path(), err)
	}
	return args.key.items > 0, nil
}
