// Package mount makes the paths that containers get: a bind mount of a volume's
// data below one base directory, the plugin's propagatedMount. It is the only
// caller of mount(2) and umount(2) for volumes, and it counts who uses them.
//
// What is mounted is read from mountinfo each time, by exact path; no memory of
// this process is trusted with it. Nothing is unmounted lazily: a mount that is
// busy stays and the caller is told. The package knows no records and no roots,
// and deletes nothing but empty directories.
package mount
