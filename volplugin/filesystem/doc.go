// Package filesystem makes, mounts, grows and freezes the file system of one
// volume, on a block device or in an image file that nobody else uses.
//
// It runs mkfs and btrfstune, which have to be there, and does everything else by
// system calls. It knows no volumes, no loop devices and no roots. Functions that
// work on something mounted take a descriptor of a directory in it, so that no path
// leads elsewhere. Calls may block as long as the device does; callers bound them.
//
// # Layout
//
// A volume's file system holds two directories. Containers see data, never the
// file system's top: a lost+found there would keep dockerd from copying an image's
// content into a new volume. Snapshots that live inside are in snapshots.
//
// # UUIDs of copies
//
// A copy of an image or a device has its UUID. What that means depends on the kind:
//
//   - btrfs finds its devices by the UUID, so that of two with the same one the
//     wrong one may be mounted. NewUUID must have changed it before the copy appears
//     as a block device. It rewrites nothing but superblocks (btrfstune -M).
//   - xfs refuses to mount a second one. Mount turns that off (nouuid), always: a log
//     that is not empty, as in every copy of a frozen file system, forbids a change.
//   - ext4 does not care. SetUUID changes it while it is mounted, for the host's tools.
package filesystem

// Names of the directories in a volume's file system.
const (
	DataName      = "data"
	SnapshotsName = "snapshots"
)
