package vmlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestEnv is set for the test that runs in a guest.
const guestEnv = "BERTH_VMLAB_GUEST"

// Serial lines; the first is the kernel's console.
const (
	reportDevice = "/dev/ttyS1" // its other end is the host's test
	shellDevice  = "/dev/ttyS2" // its other end is the socket of shellEnv
)

// runInit is the life of the guest's first process. It does not return.
func runInit() {
	code, err := guestLife()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmlab init:", err)
	}
	if err := reportEnd(code); err != nil {
		fmt.Fprintln(os.Stderr, "vmlab init:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1) // the kernel panics when its init ends, which stops the machine too
}

func guestLife() (code int, err error) {
	data, err := os.ReadFile("/" + ordersFile)
	if err != nil {
		return 1, err
	}
	var todo orders
	if err := json.Unmarshal(data, &todo); err != nil {
		return 1, err
	}
	if err := enterRoot(); err != nil {
		return 1, err
	}
	if err := prepareGuest(todo.Modules); err != nil {
		return 1, err
	}
	if err := showSources(todo.Sources); err != nil {
		return 1, err
	}
	code, err = runTest(todo.Run)
	if todo.Shell {
		err = errors.Join(err, runShell())
	}
	return code, err
}

// mountPoint is one mount of the guest's tree.
type mountPoint struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

// enterRoot loads the drives' modules and makes the first drive the root.
func enterRoot() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, module := range modules {
		if err := loadModule(module); err != nil {
			return fmt.Errorf("load %s: %w", module, err)
		}
	}
	err = mountAll([]mountPoint{{"devtmpfs", "/dev", "devtmpfs", 0, ""}})
	if err != nil {
		return err
	}
	for _, drive := range []string{"/dev/vda", "/dev/vdb"} {
		if err := waitFor(drive, 10*time.Second); err != nil {
			return err
		}
	}
	err = mountAll([]mountPoint{
		{"/dev/vda", "/root", "ext4", 0, ""},
		{"/dev/vdb", "/root" + Dir, "ext4", 0, ""},
		{"/dev", "/root/dev", "", unix.MS_MOVE, ""},
	})
	if err != nil {
		return err
	}
	// The initial RAM disk cannot be unmounted; the root drive is moved over it.
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// prepareGuest gives the root what engines and servers expect of a booted system.
func prepareGuest(modules []string) error {
	err := mountAll([]mountPoint{
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
		{"devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "/tmp", "tmpfs", 0, "mode=1777"},
		{"", "/", "", unix.MS_SHARED | unix.MS_REC, ""},
	})
	if err != nil {
		return err
	}
	if err := os.Mkdir("/run/lock", 0o755); err != nil {
		return err
	}
	for name, value := range map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": "/root", "LC_ALL": "C", guestEnv: "1",
		// There is no udev to make the nodes below /dev/mapper.
		"DM_DISABLE_UDEV": "1",
	} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("vm")); err != nil {
		return err
	}
	commands := [][]string{{"ip", "link", "set", "lo", "up"}}
	if len(modules) > 0 {
		commands = append(commands, append([]string{"modprobe", "-a"}, modules...))
	}
	for _, argv := range commands {
		if out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w: %s", argv, err, out)
		}
	}
	return nil
}

// showSources puts the package's source where the compiler saw it, for assertions
// that quote the line they failed at.
func showSources(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.Symlink(filepath.Join(Dir, sourcesDir), path)
}

// mountAll makes each mount, and its directory where that is missing.
func mountAll(points []mountPoint) error {
	for _, p := range points {
		if err := os.MkdirAll(p.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(p.source, p.target, p.kind, p.flags, p.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", p.kind, p.target, err)
		}
	}
	return nil
}

// waitFor waits until a device file is there.
func waitFor(path string, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		_, err := os.Stat(path)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// runTest runs the test in a child of its own and, being the first process, reaps
// everything that loses its parent meanwhile.
func runTest(pattern string) (code int, err error) {
	out, err := os.OpenFile(reportDevice, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return 1, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 1, err
	}
	child, err := os.StartProcess("/proc/self/exe",
		[]string{"vmlab", "-test.v", "-test.count=1", "-test.parallel=8", "-test.run=" + pattern},
		&os.ProcAttr{Dir: "/", Env: os.Environ(), Files: []*os.File{null, out, out}})
	if err != nil {
		return 1, err
	}
	return reapUntil(child.Pid)
}

// runShell gives the guest to a person until they end the shell.
func runShell() error {
	tty, err := os.OpenFile(shellDevice, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	child, err := os.StartProcess("/bin/bash", []string{"-bash"}, &os.ProcAttr{
		Dir: "/", Env: append(os.Environ(), "TERM=linux"), Files: []*os.File{tty, tty, tty},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: true},
	})
	if err != nil {
		return err
	}
	_, err = reapUntil(child.Pid)
	return err
}

// reapUntil takes in every child until the given one has ended.
func reapUntil(child int) (code int, err error) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid == child && status.Exited():
			return status.ExitStatus(), nil
		case pid == child:
			return 1, fmt.Errorf("process %d ended by signal %s", child, status.Signal())
		}
	}
}

// reportEnd tells the host that the test came to an end and waits until the line
// has left the machine.
func reportEnd(code int) error {
	out, err := os.OpenFile(reportDevice, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(out, "\n%s%d\n", endMark, code); err != nil {
		return err
	}
	// TCSBRK with a value other than 0 is tcdrain(3).
	return unix.IoctlSetInt(int(out.Fd()), unix.TCSBRK, 1)
}
