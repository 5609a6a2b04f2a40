// Package vmlab runs Go tests inside a small virtual machine, for what the kernel
// of the machine at hand may lack: NFS server and client, VLANs, ipvlan,
// device-mapper, project quota. The guest is Debian 12 with its own kernel, under
// qemu's software emulation, without any network interface.
//
// A package that has such tests hands its TestMain to Main and starts each test
// with InGuest:
//
//	func TestMain(m *testing.M) { vmlab.Main(m) }
//
//	func TestThing(t *testing.T) {
//		vmlab.InGuest(t, vmlab.Options{}, func(t *testing.T) { … runs as root in the VM … })
//	}
//
// On the host, InGuest builds the package's test binary once more without cgo,
// boots it as the init process of a fresh guest, and shows what the guest's
// subtests reported as subtests of its own. In the guest the function runs.
// Every boot starts from the same image; nothing a guest writes is kept. Two guests
// run at the same time.
//
// The package does not know what the tests do: sets of nodes, NFS servers and
// engines for the guest's side are in package guest.
package vmlab

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// Dir is where the guest finds what Options.Files brought along.
const Dir = "/berth"

// shellEnv names the Unix socket at which a guest offers a shell when its test has
// ended; it lives until that shell ends. For people who look for a fault.
const shellEnv = "BERTH_VM_SHELL"

// Options say what a guest is given.
type Options struct {
	// Files maps a path below Dir in the guest to a file or directory tree of
	// the host. Modes, owners and links of a tree are kept.
	Files map[string]string
	// Binaries maps a path below Dir in the guest to a main package of this
	// module, which is built without cgo.
	Binaries map[string]string
	// Modules are loaded with modprobe before the test starts, in order.
	Modules []string
	// MemoryMiB is the guest's memory; 0 means 2048.
	MemoryMiB int
	// Timeout bounds the guest's life from power on; 0 means 5 minutes.
	Timeout time.Duration
}

func (o Options) memory() int {
	if o.MemoryMiB == 0 {
		return 2048
	}
	return o.MemoryMiB
}

func (o Options) timeout() time.Duration {
	if o.Timeout == 0 {
		return 5 * time.Minute
	}
	return o.Timeout
}

// Main runs a package's tests; as the first process of a guest it sets the guest
// up instead, runs the one test it was booted for, and powers off.
func Main(m *testing.M) {
	guest.Init()
	if os.Getpid() == 1 {
		runInit()
	}
	code := m.Run()
	if err := programs.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// booted bounds how many guests run at the same time: much of what they do is to wait,
// for a server that is away or for their own kernel, and each takes its memory.
var booted = make(chan struct{}, 2)

// boot waits until a guest may be booted; the caller tells by done that it has ended.
func boot() (done func()) {
	booted <- struct{}{}
	return func() { <-booted }
}

// InGuest runs scenario in a fresh guest, in parallel to other tests. It must be the
// only thing its test does, since the guest finds the scenario by the test's name.
func InGuest(t *testing.T, opts Options, scenario func(t *testing.T)) {
	t.Helper()
	if os.Getenv(guestEnv) != "" {
		scenario(t)
		return
	}
	t.Parallel()
	defer boot()()
	ctx, cancel := testContext(t)
	defer cancel()

	started := time.Now()
	img, err := Image(ctx)
	if err != nil {
		t.Fatalf("VM image: %v", err)
	}
	imageDone := time.Now()
	m := machine{image: img, work: t.TempDir(), test: guestPattern(t.Name()), opts: opts, shell: os.Getenv(shellEnv)}
	if err := m.build(ctx); err != nil {
		t.Fatal(err)
	}
	buildDone := time.Now()
	out, err := m.run(ctx, t.Output())
	t.Logf("image %.1f s, build %.1f s, guest %.1f s and %.1f s of processor time", imageDone.Sub(started).Seconds(),
		buildDone.Sub(imageDone).Seconds(), time.Since(buildDone).Seconds(), m.used.Seconds())
	report(t, out, err)
}

// guestPattern selects the one test in the guest, and of its subtests those that
// -run selects here.
func guestPattern(name string) string {
	pattern := "^" + regexp.QuoteMeta(name) + "$"
	if _, sub, ok := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); ok {
		pattern += "/" + sub
	}
	return pattern
}

// testContext ends shortly before the test binary's own deadline, so that the
// machine is stopped and its console shown before the runtime gives up.
func testContext(t *testing.T) (context.Context, context.CancelFunc) {
	if deadline, ok := t.Deadline(); ok {
		return context.WithDeadline(t.Context(), deadline.Add(-10*time.Second))
	}
	return context.WithCancel(t.Context())
}

func goTool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w: %s", args[0], err, bytes.TrimSpace(out))
	}
	return nil
}
