package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// initName is what a node's first process is called, by which Init knows it.
const initName = "vmlab-node"

// startInit starts the first process of a node, in whose namespaces the node is,
// and waits until it has set them up. What the node keeps on disk is below dir.
func startInit(name, dir string) (*os.Process, error) {
	for _, own := range ownDirs() {
		if err := errors.Join(os.MkdirAll(own, 0o755), os.MkdirAll(filepath.Join(dir, own), 0o755)); err != nil {
			return nil, err
		}
	}
	fromInit, ready, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	process, err := os.StartProcess("/proc/self/exe", []string{initName, name, dir}, &os.ProcAttr{
		Files: []*os.File{nil, ready, os.Stderr},
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
		},
	})
	if err := errors.Join(err, ready.Close()); err != nil {
		return nil, err
	}
	said, err := io.ReadAll(fromInit)
	if err := errors.Join(err, fromInit.Close()); err != nil {
		return nil, err
	}
	if len(said) > 0 {
		return nil, errors.New(string(said))
	}
	return process, nil
}

// ownDirs are the directories in which each node sees its own files.
func ownDirs() []string {
	return []string{"/var/lib/containerd", "/var/lib/docker", "/var/lib/berth", "/srv"}
}

// Init returns at once, except in a process that was started as the first of a
// node: there it sets the node up and takes in orphans until the VM ends.
func Init() {
	if os.Args[0] != initName {
		return
	}
	orphans := make(chan os.Signal, 1)
	signal.Notify(orphans, unix.SIGCHLD)
	err := enterNode(os.Args[1], os.Args[2])
	if err != nil {
		_, _ = fmt.Fprint(os.Stdout, err) // the pipe of startInit
	}
	if err := errors.Join(err, os.Stdout.Close()); err != nil {
		os.Exit(1)
	}
	for range orphans {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err != nil && !errors.Is(err, unix.EINTR) || pid == 0 {
				break
			}
		}
	}
}

// enterNode makes the new namespaces look like a machine of its own.
func enterNode(name, dir string) error {
	type mount struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}
	mounts := []mount{
		{"", "/", "", unix.MS_PRIVATE | unix.MS_REC, ""},
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "/etc/docker", "tmpfs", 0, "mode=755"},
	}
	for _, own := range ownDirs() {
		mounts = append(mounts, mount{filepath.Join(dir, own), own, "", unix.MS_BIND, ""})
	}
	// Engines with managed plugins need a shared root.
	mounts = append(mounts, mount{"", "/", "", unix.MS_SHARED | unix.MS_REC, ""})
	for _, m := range mounts {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	return unix.Sethostname([]byte(name))
}

// command is argv as a process of the node. To be in the node's process namespace
// it has to be a child of the process that is started here, nsenter.
func (n *Node) command(ctx context.Context, argv ...string) *exec.Cmd {
	target := []string{"--target", strconv.Itoa(n.pid), "--pid", "--net", "--mount", "--uts", "--"}
	cmd := exec.CommandContext(ctx, "nsenter", append(target, argv...)...)
	cmd.Cancel = func() error { return errors.Join(signalInner(cmd, unix.SIGKILL), cmd.Process.Kill()) }
	return cmd
}

// signalInner sends a signal to the one child of a running command of a node.
func signalInner(cmd *exec.Cmd, sig syscall.Signal) error {
	pid := cmd.Process.Pid
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return err
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(list)))
	if err != nil {
		return fmt.Errorf("children of process %d: %w", pid, err)
	}
	return unix.Kill(child, sig)
}
