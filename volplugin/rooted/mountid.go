package rooted

// MountID is the kernel's number of the mount that the descriptor fd was opened
// through, as Dir.MountID.
func MountID(fd int) (int, error) { return mountID(fd) }
