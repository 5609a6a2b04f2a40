package vmlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// orders tell the guest's first process what to do; they travel in the initial
// RAM disk.
type orders struct {
	Run     string   // what -test.run selects
	Modules []string // for modprobe
	Sources string   // directory of the package's source on the host
	Shell   bool     // offer a shell on shellDevice at the end
}

// ordersFile is the name of the orders in the initial RAM disk.
const ordersFile = "orders.json"

// sourcesDir is the name of the package's source on the payload drive.
const sourcesDir = ".source"

// machine is one boot of a guest.
type machine struct {
	image Assets
	work  string // scratch directory, removed by the caller
	test  string // what -test.run selects in the guest
	opts  Options
	shell string        // path of the socket for a shell, or "" for none
	used  time.Duration // the guest's processor time, after run

	tests    string            // path of the test binary, after build
	binaries map[string]string // the host's paths by the guest's, as Options.Files, after build
}

// limit is how long the guest may live. One with a shell ends when its user wants.
func (m machine) limit() time.Duration {
	if m.shell != "" {
		return 24 * time.Hour
	}
	return m.opts.timeout()
}

// build compiles the tests of the current directory's package and the binaries that
// the guest is to have.
func (m *machine) build(ctx context.Context) error {
	var err error
	if m.tests, err = programs.tests(ctx); err != nil {
		return err
	}
	m.binaries = map[string]string{}
	for name, pkg := range m.opts.Binaries {
		if m.binaries[name], err = programs.binary(ctx, pkg); err != nil {
			return err
		}
	}
	return nil
}

// run boots the guest, copies what its test prints to live, and returns it when
// the guest has powered off. An error says that there was no orderly end; it
// carries the end of the guest's console.
func (m *machine) run(ctx context.Context, live io.Writer) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.limit(), fmt.Errorf("it did not end within %s", m.limit()))
	defer cancel()
	initrd := filepath.Join(m.work, "initrd")
	if err := m.writeInitrd(initrd); err != nil {
		return nil, err
	}
	drive, err := m.writePayload(ctx)
	if err != nil {
		return nil, err
	}
	console := filepath.Join(m.work, "console.log")
	reports, guestEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = reports.Close() }()

	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(m.opts.memory()),
		"-display", "none", "-monitor", "none", "-no-reboot", "-nodefaults", "-nic", "none",
		"-kernel", m.image.Kernel, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off",
		"-drive", "if=virtio,format=raw,snapshot=on,file=" + m.image.Root,
		"-drive", "if=virtio,format=raw,snapshot=on,file=" + drive,
		"-serial", "file:" + console,
		// The first of ExtraFiles is descriptor 3 of the child.
		"-chardev", "file,id=reports,path=/proc/self/fd/3", "-serial", "chardev:reports",
	}
	if m.shell != "" {
		args = append(args, "-serial", "unix:"+m.shell+",server=on,wait=off")
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.ExtraFiles = []*os.File{guestEnd}
	cmd.Env = append(os.Environ(), "TMPDIR="+m.work)
	// The guest dies with the test binary, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	var problems bytes.Buffer
	cmd.Stderr = &problems
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, guestEnd.Close())
	}
	if err := guestEnd.Close(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	_, copyErr := io.Copy(io.MultiWriter(&out, live), noCarriageReturns{reports})
	runErr := errors.Join(copyErr, cmd.Wait())
	if used := cmd.ProcessState; used != nil {
		m.used = used.UserTime() + used.SystemTime()
	}
	if ctxErr := context.Cause(ctx); ctxErr != nil {
		runErr = fmt.Errorf("guest was stopped: %w", ctxErr)
	}
	if runErr == nil && !finished(out.Bytes()) {
		runErr = errors.New("guest powered off before its test ended")
	}
	if runErr != nil {
		text, readErr := os.ReadFile(console)
		return out.Bytes(), errors.Join(fmt.Errorf("%w %s\nend of the guest's console:\n%s",
			runErr, problems.Bytes(), lastLines(text, 60)), readErr)
	}
	return out.Bytes(), nil
}

// writeInitrd packs the test binary as init, what it needs to see the drives,
// and its orders.
func (m machine) writeInitrd(path string) error {
	binary, err := os.ReadFile(m.tests)
	if err != nil {
		return err
	}
	sources, err := os.Getwd()
	if err != nil {
		return err
	}
	order, err := json.Marshal(orders{Run: m.test, Modules: m.opts.Modules, Sources: sources, Shell: m.shell != ""})
	if err != nil {
		return err
	}
	files := []cpioFile{
		{name: "init", mode: modeExec, data: binary},
		{name: ordersFile, mode: modeFile, data: order},
		{name: "modules", mode: modeDir},
		{name: "root", mode: modeDir},
	}
	for _, module := range m.image.Modules {
		data, err := os.ReadFile(module)
		if err != nil {
			return err
		}
		files = append(files, cpioFile{name: "modules/" + filepath.Base(module), mode: modeFile, data: data})
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(writeCPIO(f, files), f.Close())
}

// writePayload makes the second drive from Options.Files and the built binaries.
func (m machine) writePayload(ctx context.Context) (string, error) {
	tree := filepath.Join(m.work, "payload")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return "", err
	}
	if err := copySources(filepath.Join(tree, sourcesDir)); err != nil {
		return "", err
	}
	files := maps.Clone(m.binaries)
	maps.Copy(files, m.opts.Files)
	for name, src := range files {
		if _, err := os.Stat(src); err != nil {
			return "", fmt.Errorf("file for the guest: %w (./scripts/build-plugin makes what is in build)", err)
		}
		dst := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			return "", err
		}
		if err := runQuiet(exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", src, dst)); err != nil {
			return "", err
		}
	}
	img := filepath.Join(m.work, "payload.img")
	return img, makeFilesystem(ctx, img, tree, "1G")
}

// copySources copies the Go files of the current directory.
func copySources(dst string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := copyFile(filepath.Join(dst, file), file); err != nil {
			return err
		}
	}
	return nil
}

// noCarriageReturns takes away what the guest's terminal driver adds.
type noCarriageReturns struct{ r io.Reader }

func (n noCarriageReturns) Read(p []byte) (int, error) {
	count, err := n.r.Read(p)
	kept := p[:0]
	for _, b := range p[:count] {
		if b != '\r' {
			kept = append(kept, b)
		}
	}
	return len(kept), err
}
