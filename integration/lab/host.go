package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/reexec"
)

// Options say what a host is.
type Options struct {
	// Name is unique on the machine; lower-case letters, digits and dashes, at
	// most 20, because socket paths contain it.
	Name string
	// Engine is the version whose Debian root the host has: "20.10", "26.1", "28.5".
	Engine string
	// NoEngine makes a host without a running dockerd, a neighbour for example.
	NoEngine bool
	// LiveRestore starts dockerd with --live-restore.
	LiveRestore bool
	// DaemonArgs are further arguments for dockerd.
	DaemonArgs []string
	// BuildDir is where plugins are installed from; BuildDir() when empty.
	BuildDir string
	// Like, when set, is a host with the same engine that is off: the new one's engine
	// begins with a copy of what that one's had, images and plugins for example.
	Like *Host `json:"-"`
	// LAN, when set, gives the host an eth0 with an address and a default route.
	LAN *LAN `json:"-"`
	// NICs is how many links the host has to its LAN, at most 9; 0 means 1. Those
	// after eth0 are up and have no address.
	NICs int `json:",omitempty"`
	// VolumesOn is the file system that the directory of Berth's volumes is on,
	// "btrfs" or "xfs", in an image of its own; "" leaves it on the host's disk.
	VolumesOn string `json:",omitempty"`
	// Detached hosts stay when the process that made them ends.
	Detached bool
}

// A Host is one simulated machine. Methods are safe for concurrent use except
// Start, Reboot, PowerOff and Close, which must not overlap with others.
type Host struct {
	// Name is the name in Options.
	Name string
	// Dir holds the host's disk, sockets and logs, and is visible inside at the same path.
	Dir string

	opts     Options
	engine   Engine
	pid      int
	cgroups  []string
	lifeline *os.File
	ended    chan struct{}
	plugins  []unmanagedPlugin
}

// hostRecord is what host.json keeps so that another process can take over.
type hostRecord struct {
	Options Options
	PID     int
	Cgroups []string
	Plugins []unmanagedPlugin
	// LAN and LANIndex say how the host is wired, if it is.
	LAN      string `json:",omitempty"`
	LANIndex int    `json:",omitempty"`
}

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,19}$`)

// NewHost makes a host with a running engine and the busybox image for a test
// and removes it at the test's end. The test fails when that cannot be done.
func NewHost(tb testing.TB, opts Options) *Host {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	h, err := New(ctx, opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Close(); err != nil {
			tb.Error(err)
		}
	})
	if !opts.NoEngine {
		if err := h.ImportBusybox(ctx); err != nil {
			tb.Fatal(err)
		}
	}
	return h
}

// New makes and boots a host, and starts its engine unless told otherwise. The
// caller closes it.
func New(ctx context.Context, opts Options) (*Host, error) {
	if !validName.MatchString(opts.Name) {
		return nil, fmt.Errorf("host name %q: want 1 to 20 lower-case letters, digits and dashes", opts.Name)
	}
	engine, err := EngineByVersion(opts.Engine)
	if err != nil {
		return nil, err
	}
	if err := engine.Cached(); err != nil {
		return nil, err
	}
	if opts.BuildDir == "" {
		// A host without plugins does very well outside of a repository.
		opts.BuildDir, _ = BuildDir()
	}
	h := &Host{Name: opts.Name, Dir: filepath.Join(Dir(), opts.Name), opts: opts, engine: engine}
	if err := os.MkdirAll(Dir(), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(h.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("host %s exists: remove it with `berth-lab down %s`: %w", opts.Name, opts.Name, err)
	}
	for _, dir := range []string{"root", "log", "disk/upper", "disk/work", "disk/docker", "disk/berth", "disk/upper" + appletDir} {
		if err := os.MkdirAll(filepath.Join(h.Dir, dir), 0o755); err != nil {
			return nil, err
		}
	}
	err = linkTools(ctx, filepath.Join(h.Dir, "disk/upper"), opts.BuildDir)
	if err == nil && opts.VolumesOn != "" {
		err = makeVolumesImage(ctx, h.volumesImage(), opts.VolumesOn)
	}
	if err == nil && opts.Like != nil {
		err = h.copyEngine(ctx, opts.Like)
	}
	if err == nil {
		err = h.Start(ctx)
	}
	if err == nil {
		_, err = h.Exec(ctx, "busybox", "--install", "-s", appletDir)
	}
	if err == nil && !opts.NoEngine {
		err = h.StartEngine(ctx)
	}
	if err != nil {
		if kept, keepErr := h.KeepLogs("start-" + h.Name); keepErr == nil {
			err = fmt.Errorf("%w (logs in %s)", err, kept)
		}
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// copyEngine copies the engine's directory of a host that is off.
func (h *Host) copyEngine(ctx context.Context, from *Host) error {
	if from.Running() || from.engine.Version != h.engine.Version {
		return fmt.Errorf("host %s cannot be like %s: that has to be off, and to have engine %s", h.Name, from.Name, h.engine.Version)
	}
	dir := func(h *Host) string { return filepath.Join(h.Dir, "disk/docker") }
	out, err := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", dir(from)+"/.", dir(h)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy the engine of host %s: %w: %s", from.Name, err, out)
	}
	return nil
}

// Open takes over a detached host that another process made.
func Open(name string) (*Host, error) {
	dir := filepath.Join(Dir(), name)
	text, err := os.ReadFile(filepath.Join(dir, "host.json"))
	if err != nil {
		return nil, fmt.Errorf("no host %q: %w", name, err)
	}
	var rec hostRecord
	if err := json.Unmarshal(text, &rec); err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	engine, err := EngineByVersion(rec.Options.Engine)
	if err != nil {
		return nil, err
	}
	h := &Host{Name: name, Dir: dir, opts: rec.Options, engine: engine, pid: rec.PID, cgroups: rec.Cgroups, plugins: rec.Plugins}
	if rec.LAN != "" {
		h.opts.LAN = &LAN{Name: rec.LAN, hosts: map[string]int{name: rec.LANIndex}}
	}
	if !h.Running() {
		h.pid = 0
	}
	return h, nil
}

// save writes host.json.
func (h *Host) save() error {
	rec := hostRecord{Options: h.opts, PID: h.pid, Cgroups: h.cgroups, Plugins: h.plugins}
	if l := h.opts.LAN; l != nil {
		rec.LAN, rec.LANIndex = l.Name, l.index(h.Name)
	}
	text, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(h.Dir, "host.json"), text, 0o644)
}

// netns is the name of the host's network namespace below /run/netns.
func (h *Host) netns() string { return netnsPrefix + h.Name }

// Running says whether the host's init is alive.
func (h *Host) Running() bool {
	if h.pid == 0 {
		return false
	}
	// The number may have gone to another process since: ask it for its name.
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", h.pid))
	return err == nil && strings.HasPrefix(string(cmdline), initName+"\x00") && strings.Contains(string(cmdline), `"`+h.Dir+`"`)
}

// Start boots a host that is off: it gets a new network namespace and a new init
// over its old disk. Engine and plugins are not started.
func (h *Host) Start(ctx context.Context) error {
	if h.Running() {
		return fmt.Errorf("host %s is running", h.Name)
	}
	if err := addNetNS(ctx, h.netns()); err != nil {
		return err
	}
	cgroups, err := makeCgroups(h.Name)
	h.cgroups = cgroups
	if err != nil {
		return err
	}
	cfg := bootConfig{
		Hostname: h.Name,
		Dir:      h.Dir,
		Lower:    h.engine.Root(),
		NetNS:    netnsPath(h.netns()),
		Cgroups:  cgroups,
		ReadOnly: h.sharedDirs(),
		Lifeline: !h.opts.Detached,
	}
	if h.opts.VolumesOn != "" {
		cfg.VolumesImage = h.volumesImage()
	}
	if err := h.boot(ctx, cfg); err != nil {
		return fmt.Errorf("boot host %s: %w", h.Name, err)
	}
	if h.opts.LAN != nil {
		if err := h.opts.LAN.attach(ctx, h); err != nil {
			return err
		}
	}
	return h.save()
}

// sharedDirs are the directories of the machine that hosts may read.
func (h *Host) sharedDirs() []string {
	dirs := []string{CacheDir()}
	dir := h.opts.BuildDir
	if _, err := os.Stat(filepath.Join(filepath.Dir(dir), "go.mod")); err == nil {
		// The whole tree: build/ may be removed and made again while the host runs.
		dir = filepath.Dir(dir)
	}
	if _, err := os.Stat(dir); err == nil && dir != "" {
		dirs = append(dirs, dir)
	}
	return dirs
}

func (h *Host) boot(ctx context.Context, cfg bootConfig) error {
	arg, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(h.Dir, "log", "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	ready, readyWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	// The host outlives the context of its boot.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), reexec.Self())
	cmd.Args = []string{bootName, string(arg)}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{readyWriter}
	var lifelineReader *os.File
	if cfg.Lifeline {
		// Not PR_SET_PDEATHSIG: that is bound to the thread that forked, and Go
		// ends threads that goroutines leave locked.
		if lifelineReader, h.lifeline, err = os.Pipe(); err != nil {
			readyWriter.Close()
			return err
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, lifelineReader)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
	}
	err = cmd.Start()
	readyWriter.Close()
	if lifelineReader != nil {
		lifelineReader.Close()
	}
	if err != nil {
		return err
	}
	h.pid = cmd.Process.Pid
	h.ended = make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(h.ended)
	}()
	defer context.AfterFunc(ctx, func() { ready.Close() })()
	line, _ := bufio.NewReader(ready).ReadString('\n')
	if line = strings.TrimSpace(line); line != "ok" {
		h.PowerOff()
		if line == "" {
			line = "init ended without a word; see " + log.Name()
		}
		return errors.New(line)
	}
	return nil
}

// PowerOff is the power cut: init dies, and with it every process, mount, link
// and rule of the host. Its disk stays. It returns when the last process is gone.
func (h *Host) PowerOff() {
	if h.lifeline != nil {
		h.lifeline.Close()
		h.lifeline = nil
	}
	if h.pid == 0 {
		return
	}
	if h.ended != nil {
		// Our own child: its number cannot have been reused before it is waited for.
		_ = syscall.Kill(h.pid, syscall.SIGKILL)
		thaw(h.cgroups)
		<-h.ended
	} else {
		for h.Running() {
			_ = syscall.Kill(h.pid, syscall.SIGKILL)
			thaw(h.cgroups)
			time.Sleep(10 * time.Millisecond)
		}
	}
	h.pid, h.ended = 0, nil
}

// down is PowerOff and the removal of all the kernel still has of the host.
func (h *Host) down() error {
	h.PowerOff()
	return errors.Join(deleteNetNS(h.netns()), removeCgroups(h.cgroups))
}

// Reboot cuts the power and boots again: unmanaged plugins start before the
// engine, as their systemd units say, and the engine comes up if the host has one.
func (h *Host) Reboot(ctx context.Context) error {
	if err := h.down(); err != nil {
		return fmt.Errorf("reboot %s: %w", h.Name, err)
	}
	if err := h.Start(ctx); err != nil {
		return fmt.Errorf("reboot %s: %w", h.Name, err)
	}
	for _, p := range h.plugins {
		if err := h.startUnmanaged(ctx, p); err != nil {
			return fmt.Errorf("reboot %s: %w", h.Name, err)
		}
	}
	if h.opts.NoEngine {
		return nil
	}
	return h.StartEngine(ctx)
}

// Close cuts the power and removes the host with its disk.
func (h *Host) Close() error {
	return errors.Join(h.CloseKeepDisk(), os.RemoveAll(h.Dir))
}

// CloseKeepDisk cuts the power and removes all of the host but its directory.
func (h *Host) CloseKeepDisk() error { return h.down() }

// KeepLogs copies the logs of engine and plugins to a directory below
// Dir()/failed and returns it.
func (h *Host) KeepLogs(name string) (string, error) {
	dst := filepath.Join(Dir(), "failed", name, h.Name)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return "", err
	}
	if err := os.RemoveAll(dst); err != nil {
		return "", err
	}
	return dst, os.CopyFS(dst, os.DirFS(filepath.Join(h.Dir, "log")))
}
