package image

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// callEnv makes this program do one call, an order as JSON.
const callEnv = "BERTH_TEST_IMAGE_CALL"

// An order is a call in another process, which kills itself before step number Kill
// of it, from 0.
type order struct {
	Call        string
	Root, Local string
	From, To    engine.Volume
	Kill        int
}

// place opens the directories of a place that enginetest.NewPlace has made.
func (o order) place() (engine.Place, error) {
	p := engine.Place{Local: o.Local}
	meta := filepath.Join(o.Root, ".berth")
	for dir, path := range map[**rooted.Dir]string{
		&p.Root: o.Root, &p.Images: filepath.Join(meta, "images"), &p.Snapshots: filepath.Join(meta, "snapshots"),
		&p.Trash: filepath.Join(meta, "trash"), &p.Tmp: filepath.Join(meta, "tmp"),
	} {
		opened, err := rooted.Open(path)
		if err != nil {
			return p, err
		}
		*dir = opened
	}
	return p, nil
}

// calls are what an order can be for.
var calls = map[string]func(ctx context.Context, e *Engine, p engine.Place, o order) error{
	"create": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		_, err := e.Create(ctx, p, o.To, engine.Attributes{})
		return err
	},
	"snapshot": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		_, err := e.Snapshot(ctx, p, o.From, "new", nil)
		return err
	},
	"clone": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		_, err := e.Clone(ctx, p, o.From, "s", o.To, nil)
		return err
	},
	"clone of live data": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		_, err := e.Clone(ctx, p, o.From, "", o.To, nil)
		return err
	},
	"rollback": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		_, err := e.Rollback(ctx, p, o.From, "s", "kept", nil)
		return err
	},
	"grow": func(ctx context.Context, e *Engine, p engine.Place, o order) error {
		return e.Resize(ctx, p, o.From, o.From.Size+64*mebi)
	},
}

func obey(text string) int {
	var o order
	err := json.Unmarshal([]byte(text), &o)
	var p engine.Place
	if err == nil {
		p, err = o.place()
	}
	e := New(all())
	if err == nil {
		err = e.Attach(context.Background(), p, o.From)
	}
	if err == nil && o.Call == "attach" {
		fmt.Println(deviceAt(filepath.Join(o.Local, o.From.UUID)))
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	}
	steps := 0
	p.Step = func(string) error {
		if steps == o.Kill {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		steps++
		return nil
	}
	if err == nil {
		err = calls[o.Call](context.Background(), e, p, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// deviceAt is the device that is mounted at a directory.
func deviceAt(path string) string {
	info, err := mountAt(path)
	if err != nil || info == nil {
		return fmt.Sprint(info, err)
	}
	return info.Source
}

func command(t testing.TB, o order, ownNamespace bool) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(o)
	assert.NilError(t, err)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), callEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if ownNamespace {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	return cmd
}

// inNamespace runs a shell command in a mount namespace of its own, which lives
// until end is called.
func inNamespace(t testing.TB, script string) (end func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script+" && echo done && read x")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	assert.NilError(t, err)
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	assert.NilError(t, err)
	assert.Equal(t, line, "done\n")
	return func() { _ = in.Close(); _ = cmd.Wait() }
}

// Processes that attach one volume at a time get one loop device, each in its own
// mount namespace, and leave none.
func TestProcessesAttachTogether(t *testing.T) {
	e, p := New(all()), rootOn(t, "ext4")
	v := volume("web", filesystem.Ext4)
	create(t, e, p, v)
	o := order{Call: "attach", Root: p.Root.Path(), Local: p.Local, From: v}
	for range 3 {
		var commands []*exec.Cmd
		for range 5 {
			commands = append(commands, command(t, o, true))
		}
		seen := mounttest.FirstLines(t, commands...)
		assert.Equal(t, len(seen), 1, "%v", seen)
		for device := range seen {
			assert.Assert(t, strings.HasPrefix(device, "/dev/loop"), device)
		}
		// Their mounts are gone with their namespaces.
		image, err := os.Open(file(p, v))
		assert.NilError(t, err)
		id, err := loop.FileOf(image)
		assert.NilError(t, err)
		assert.NilError(t, image.Close())
		assert.NilError(t, loop.Released(t.Context(), id))
	}
}

// A process is killed before each step of each call, and its successor repeats it.
func TestKilled(t *testing.T) {
	for name, test := range map[string]struct {
		root string
		kind filesystem.Kind
		// own: the process's mounts go with it, as a plugin's, or stay, as those of a
		// daemon on the host.
		own bool
	}{
		"btrfs in a plugin":        {"ext4", filesystem.Btrfs, true},
		"ext4 on a host":           {"xfs", filesystem.Ext4, false},
		"copies inside, on a host": {"ext4", filesystem.Ext4, false},
	} {
		t.Run(name, func(t *testing.T) {
			e, p := New(all()), roots[test.root](t)
			for call, do := range calls {
				if call == "grow" && test.kind == filesystem.Ext4 && !mounttest.HasSysResource(t) {
					continue
				}
				for kill := 0; ; kill++ {
					label := strings.ReplaceAll(fmt.Sprintf("%s-%d", call, kill), " ", "-")
					from, to := volume("from-"+label, test.kind), volume("to-"+label, test.kind)
					create(t, e, p, from)
					assert.NilError(t, e.Attach(t.Context(), p, from))
					write(t, e, p, from, "f", "old")
					_, err := e.Snapshot(t.Context(), p, from, "s", nil)
					assert.NilError(t, err)
					write(t, e, p, from, "f", "new")
					if test.own {
						assert.NilError(t, e.Detach(t.Context(), p, from))
					}
					o := order{Call: call, Root: p.Root.Path(), Local: p.Local, From: from, To: to, Kill: kill}
					cmd := command(t, o, test.own)
					err = cmd.Run()
					killed := cmd.ProcessState != nil && cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
					assert.Assert(t, err == nil || killed, "%s: %v", label, err)
					repeat(t, e, p, o, do)
					if !killed {
						assert.Assert(t, kill > 0, "%s has no steps", call)
						break
					}
				}
			}
			nothingLeft(t, p)
		})
	}
}

// repeat makes a call again after a kill, checks that it is complete, and takes all
// of it away.
func repeat(t *testing.T, e *Engine, p engine.Place, o order, do func(context.Context, *Engine, engine.Place, order) error) {
	t.Helper()
	assert.NilError(t, e.Attach(t.Context(), p, o.From))
	if o.Call == "snapshot" {
		assert.NilError(t, e.RemoveSnapshot(t.Context(), p, o.From, "new"))
	}
	assert.NilError(t, do(t.Context(), e, p, o), o.Call)
	want, made := "new", ""
	switch o.Call {
	case "create":
		made = "nothing"
	case "clone":
		made = "old"
	case "clone of live data":
		made = "new"
	case "rollback":
		want = "old"
		assert.Equal(t, readSnapshot(t, e, p, o.From, "kept"), "new")
	case "snapshot":
		assert.Equal(t, readSnapshot(t, e, p, o.From, "new"), "new")
	}
	assert.Equal(t, read(t, e, p, o.From, "f"), want)
	assert.Equal(t, readSnapshot(t, e, p, o.From, "s"), "old")
	volumes := []engine.Volume{o.From}
	if made != "" {
		volumes = append(volumes, o.To)
		assert.NilError(t, e.Attach(t.Context(), p, o.To))
		if made != "nothing" {
			assert.Equal(t, read(t, e, p, o.To, "f"), made)
		}
	}
	for _, v := range volumes {
		assert.NilError(t, e.Detach(t.Context(), p, v))
		assert.Assert(t, !bound(t, file(p, v)))
		assert.NilError(t, e.Retire(t.Context(), p, v))
		assert.NilError(t, e.Destroy(t.Context(), p, v))
	}
	nothingLeft(t, p)
}

func readSnapshot(t testing.TB, e *Engine, p engine.Place, v engine.Volume, snap string) string {
	t.Helper()
	dir, err := e.OpenSnapshot(t.Context(), p, v, snap)
	assert.NilError(t, err)
	content, err := os.ReadFile(filepath.Join(dir.ProcPath(), "f"))
	assert.NilError(t, err)
	assert.NilError(t, dir.Close())
	assert.NilError(t, e.CloseSnapshot(t.Context(), p, v, snap))
	return string(content)
}
