package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// File descriptors that a host's first process is started with.
const (
	readyFD    = 3 // one line is written here: "ok" or why the boot failed
	lifelineFD = 4 // end of file means that the owner has died; absent for detached hosts
)

// A bootConfig is all that a host's init needs to know.
type bootConfig struct {
	Hostname string
	// Dir is the host's directory, visible inside at the same path.
	Dir string
	// Lower is the engine's root in the cache.
	Lower string
	// NetNS is the path of the host's network namespace.
	NetNS string
	// Cgroups are the directories made for the host.
	Cgroups []string
	// ReadOnly are directories of the machine, shown inside at the same paths.
	ReadOnly []string
	// VolumesImage is a file system for the directory of Berth's volumes; "" is none.
	VolumesImage string
	// Lifeline says that lifelineFD is there.
	Lifeline bool
}

// bootMain is the first stage: PID 1 of its namespaces, still in the machine's
// root. setns(2) changes one thread only, so the exec of the second stage from
// that very thread is what puts the whole process into the network namespace.
func bootMain() {
	runtime.LockOSThread()
	cfg, err := readBootConfig()
	if err == nil {
		err = enterNamespaces(cfg)
	}
	if err == nil {
		err = syscall.Exec("/proc/self/exe", []string{initName, os.Args[1]}, os.Environ())
	}
	reportReady(err)
	os.Exit(1)
}

func readBootConfig() (bootConfig, error) {
	var cfg bootConfig
	if len(os.Args) != 2 {
		return cfg, errors.New("this process is started by the lab only")
	}
	err := json.Unmarshal([]byte(os.Args[1]), &cfg)
	return cfg, err
}

func enterNamespaces(cfg bootConfig) error {
	if err := enterCgroups(cfg.Cgroups); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup namespace: %w", err)
	}
	for _, dir := range cfg.Cgroups {
		// Version 2: the top of a tree with controllers holds no process.
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err != nil {
			continue
		}
		leaf := filepath.Join(dir, "init")
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := enterCgroups([]string{leaf}); err != nil {
			return err
		}
	}
	ns, err := os.Open(cfg.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", cfg.NetNS, err)
	}
	return unix.Sethostname([]byte(cfg.Hostname))
}

// reportReady tells the starter how the boot went.
func reportReady(err error) {
	f := os.NewFile(readyFD, "ready")
	if err != nil {
		fmt.Fprintln(os.Stderr, "boot:", err)
		fmt.Fprintln(f, strings.ReplaceAll(err.Error(), "\n", "; "))
	} else {
		fmt.Fprintln(f, "ok")
	}
	f.Close()
}

// A mounting is one mount(2) call of the boot; paths are inside the new root.
type mounting struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// mountRoot makes the host's file system and enters it.
func mountRoot(cfg bootConfig) error {
	hierarchies, err := cgroupMounts()
	if err != nil {
		return err
	}
	// Nothing done from here on may reach the machine's own mount namespace.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	disk := filepath.Join(cfg.Dir, "disk")
	root := filepath.Join(cfg.Dir, "root")
	overlay := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", cfg.Lower, filepath.Join(disk, "upper"), filepath.Join(disk, "work"))
	if err := unix.Mount("overlay", root, "overlay", 0, overlay); err != nil {
		return fmt.Errorf("mount overlay %s: %w", overlay, err)
	}
	mounts := []mounting{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		// Not the machine's sysfs: /sys/class/net shows the namespace it was mounted in.
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/dev", "/dev", "", unix.MS_BIND | unix.MS_REC, ""},
		{"shm", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{cfg.Dir, cfg.Dir, "", unix.MS_BIND, ""},
		{filepath.Join(disk, "docker"), "/var/lib/docker", "", unix.MS_BIND, ""},
		{filepath.Join(disk, "berth"), "/var/lib/berth", "", unix.MS_BIND, ""},
	}
	mounts = append(mounts, cgroupMountings(hierarchies)...)
	readOnly := cfg.ReadOnly
	if _, err := os.Stat("/lib/modules"); err == nil {
		readOnly = append(readOnly, "/lib/modules")
	}
	for _, dir := range readOnly {
		mounts = append(mounts,
			mounting{dir, dir, "", unix.MS_BIND, ""},
			mounting{"", dir, "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""})
	}
	for _, m := range mounts {
		target := filepath.Join(root, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
		}
	}
	if err := pivot(root); err != nil {
		return err
	}
	return mountVolumes(cfg.VolumesImage)
}

// cgroupMountings mounts the hierarchies again: from inside the new cgroup
// namespace they show the host's own cgroup as their root.
func cgroupMountings(hierarchies []cgroupMount) []mounting {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if len(hierarchies) == 1 && hierarchies[0].FSType == "cgroup2" {
		return []mounting{{"cgroup", "/sys/fs/cgroup", "cgroup2", flags, ""}}
	}
	mounts := []mounting{{"tmpfs", "/sys/fs/cgroup", "tmpfs", flags, "mode=755"}}
	for _, h := range hierarchies {
		mounts = append(mounts, mounting{"cgroup", h.Point, h.FSType, flags, h.Options})
	}
	return mounts
}

// pivot makes root the root directory. runc pivots again inside it, which a mere
// chroot does not allow.
func pivot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// Managed plugins with propagatedMount need a shared root.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	for _, dir := range []string{"/run/docker/plugins", "/run/lock", "/run/netns", "/etc/docker"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}
