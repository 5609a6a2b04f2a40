// Package image is the engine that keeps a volume in a file of its own, with a file
// system in it that is mounted through a loop device. So a size is enforced on any
// root, and with btrfs inside snapshots, clones and rollbacks take no time wherever
// the root is. Only one host at a time may have a volume attached; the caller sees to
// that.
//
// # Space
//
// An image has all its space from the beginning, so that a program that was let
// write can. A sparse one (Volume.Sparse) takes space as it fills: when the root is
// full, what a program has written and not synced is lost, and it gets EIO, not
// ENOSPC. The same holds for what is overwritten in an image that shares its space
// with a snapshot or a clone of it by reflinks. So sparse images, snapshots that are
// reflinks and clones that are, are refused where less than 5 % of the root, or 1
// GiB if that is less, is free. mkfs and mounts discard nothing; an fstrim(8)
// by hand gives space back, and Attach takes it again.
//
// # Inside
//
// See package filesystem for the layout. A volume's data is a tree in it, for btrfs a
// subvolume, and snapshots inside are what package treeengine makes of them, with the
// image's top as its root. What the file system in an image is, its superblock tells.
//
// Images with xfs or ext4 on a root that shares data between files (xfs, btrfs) have
// snapshots that are files, SNAP.img: the image as it was while frozen. Elsewhere their
// snapshots are copies of all files, inside, and take their space from the volume's
// size. A volume has snapshots of one sort alone, unless its root was moved.
//
// # No half-made files
//
// Everything is built in the place's Tmp and gets its final name by one rename:
//
//	UUID.create          an image
//	UUID.clone           an image that is a clone
//	UUID.cloned          the clone is complete, in Tmp or under the volume's name
//	UUID.snapshot.SNAP   a snapshot
//	UUID.rollback.part   an image for a rollback
//	UUID.rollback        the same, complete
//
// Rollback of snapshots that are files goes through the states of package
// treeengine's, and Attach goes on where the data has been moved away and its successor
// not yet put in its place.
//
// In Local a volume is mounted as UUID, a snapshot that is a file as UUID@SNAP, and
// what is being made or looked into for a moment as UUID.work. A process that is
// killed leaves these mounted, if its mount namespace lives on: the next call for the
// volume takes them over or away.
package image
