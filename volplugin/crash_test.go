package volplugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	api "github.com/docker/go-plugins-helpers/volume"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// victimEnv carries an order to a process of this test that is to be killed.
const victimEnv = "BERTH_TEST_VICTIM"

// order is one request and the step, counted from 0, before which the process
// kills itself.
type order struct {
	Root, Base, DB string
	// Shares is Config.ShareBase, Server the directory that stands for a file server.
	Shares, Server string
	Request        string
	Name           string
	Options        map[string]string
	Die            int
}

// victim obeys an order. Its exit code is 0 when the request was answered.
func victim() int {
	var o order
	if err := json.Unmarshal([]byte(os.Getenv(victimEnv)), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if err := o.obey(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (o order) obey() error {
	db, err := OpenState(o.DB)
	if err != nil {
		return err
	}
	counts, err := OpenCounts(filepath.Dir(o.DB))
	if err != nil {
		return err
	}
	steps := 0
	log := logrus.New()
	log.SetOutput(io.Discard)
	d, err := New(Config{
		Root: o.Root, MountBase: o.Base, ShareBase: o.Shares, DB: db, Counts: counts,
		mount: (&fileServer{dir: o.Server}).mount, Log: logrus.NewEntry(log),
		BootID: func() (string, error) { return "boot-1", nil },
		step: func(string, string) error {
			if steps == o.Die {
				return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), errors.New("still alive"))
			}
			steps++
			return nil
		},
	})
	if err != nil {
		return err
	}
	ctx := context.Background()
	if err := d.Recover(ctx); err != nil {
		return err
	}
	switch o.Request {
	case "create":
		return d.Create(ctx, &api.CreateRequest{Name: o.Name, Options: o.Options})
	case "remove":
		return d.Remove(ctx, &api.RemoveRequest{Name: o.Name})
	case "mount":
		_, err := d.Mount(ctx, &api.MountRequest{Name: o.Name, ID: "id"})
		return err
	case "expire":
		d.home.expire(ctx)
		return nil
	case "tend":
		for _, s := range d.all() {
			s.tend(ctx)
		}
		return nil
	case "recover":
		return nil
	}
	return fmt.Errorf("unknown request %q", o.Request)
}

// run starts a victim and tells whether it was killed before it could answer.
func (o order) run(t *testing.T) (killed bool) {
	t.Helper()
	content, err := json.Marshal(o)
	assert.NilError(t, err)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(content))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	assert.NilError(t, err, "%s", out)
	return false
}

// scene is a root with a volume, and one of another host, that a victim works on.
type scene struct {
	t     *testing.T
	h     *host
	order order
	// keeps is set when the data may stay in place without a record.
	keeps bool
}

func newScene(t *testing.T, o order) *scene {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("other"))
	write(t, filepath.Join(h.cfg.Root, "other", "f"), "other")
	o.Root, o.Base, o.DB = h.cfg.Root, h.cfg.MountBase, filepath.Join(h.dir, "vol", "state.db")
	return &scene{t: t, h: h, order: o}
}

// kill runs the order up to its step and starts the host again after it.
func (s *scene) kill() (killed bool) {
	s.h.stop()
	killed = s.order.run(s.t)
	s.h.start()
	return killed
}

// check looks at what must hold after any crash: the volume is whole or absent,
// with nothing in between, and the other volume is untouched.
func (s *scene) check(name, content string) (present bool) {
	t, root := s.t, s.h.cfg.Root
	t.Helper()
	_, err := s.h.get(name)
	present = err == nil
	assert.Equal(t, slices.Contains(s.h.list(), name), present)
	inTrash := slices.Contains(trash(t, root), name)
	inPlace := exists(filepath.Join(root, name))
	kept := inPlace && !present
	assert.Assert(t, !kept || s.keeps, "the data of a removed volume is still in its place")
	if content != "" {
		places := 0
		for _, is := range []bool{present, inTrash, kept} {
			if is {
				places++
			}
		}
		assert.Equal(t, places, 1, "listed %v, in the trash %v, kept %v", present, inTrash, kept)
		files, err := filepath.Glob(filepath.Join(root, "*", "page"))
		assert.NilError(t, err)
		more, err := filepath.Glob(filepath.Join(root, ".berth/trash/*/page"))
		assert.NilError(t, err)
		files = append(files, more...)
		assert.Equal(t, len(files), 1, "%v", files)
		assert.Equal(t, read(t, files[0]), content)
	} else {
		assert.Equal(t, present, inPlace, "a directory without a record, or a record without one")
	}
	if present {
		path, err := s.h.mount(name, "after")
		assert.NilError(t, err)
		if content != "" {
			assert.Equal(t, read(t, filepath.Join(path, "page")), content)
		}
		assert.NilError(t, s.h.unmount(name, "after"))
	}
	assert.Equal(t, read(t, filepath.Join(root, "other", "f")), "other")
	assert.Equal(t, len(s.h.mountsBelow()), 0)
	return present
}

// everyStep kills the order's process before its first step, before its second,
// and so on, until it ends by itself. It returns the number of steps.
func everyStep(t *testing.T, o order, before func(*scene), after func(s *scene, killed bool)) int {
	t.Helper()
	for o.Die = 0; ; o.Die++ {
		s := newScene(t, o)
		before(s)
		killed := s.kill()
		after(s, killed)
		if !killed {
			return o.Die
		}
		assert.Assert(t, o.Die < 100)
	}
}

func TestKilledAtAnyStepOfCreate(t *testing.T) {
	for _, adopt := range []bool{false, true} {
		steps := everyStep(t, order{Request: "create", Name: "web", Options: map[string]string{"mode": "0750"}}, func(s *scene) {
			s.keeps = adopt
			if adopt {
				assert.NilError(t, os.Mkdir(filepath.Join(s.h.cfg.Root, "web"), 0o700))
				write(t, filepath.Join(s.h.cfg.Root, "web", "page"), "rows")
			}
		}, func(s *scene, killed bool) {
			content := ""
			if adopt {
				content = "rows"
			}
			present := s.check("web", content)
			assert.Assert(t, present || killed)
			// The user's next try works, with its own options.
			assert.NilError(t, s.h.create("web"))
			if !present {
				assert.Equal(t, s.h.status("web")["adopted"], adopt)
				assert.Equal(t, s.h.status("web")["options-differ"], nil)
			}
			assert.Assert(t, s.check("web", content))
		})
		assert.Assert(t, steps >= 4, "only %d steps", steps)
	}
}

func TestKilledAtAnyStepOfRemove(t *testing.T) {
	for _, policy := range []string{"trash", "keep", "purge"} {
		t.Run(policy, func(t *testing.T) {
			steps := everyStep(t, order{Request: "remove", Name: "web"}, func(s *scene) {
				s.keeps = policy == "keep"
				assert.NilError(t, s.h.create("web", "on-remove="+policy))
				write(t, filepath.Join(s.h.cfg.Root, "web", "page"), "rows")
			}, func(s *scene, killed bool) {
				present := s.check("web", "rows")
				assert.Assert(t, !present || killed)
				assert.NilError(t, s.h.remove("web"))
				assert.Assert(t, !s.check("web", "rows"))
				assert.NilError(t, s.h.create("web"), "the name is not free")
				claims, err := filepath.Glob(filepath.Join(s.h.cfg.Root, ".berth/trash/*.json"))
				assert.NilError(t, err)
				want := 1
				if policy == "keep" {
					want = 0
				}
				assert.Equal(t, len(claims), want)
			})
			assert.Assert(t, steps >= 4, "only %d steps", steps)
		})
	}
}

func TestKilledAtAnyStepOfMountAndExpire(t *testing.T) {
	everyStep(t, order{Request: "mount", Name: "web"}, func(s *scene) {
		assert.NilError(t, s.h.create("web"))
		write(t, filepath.Join(s.h.cfg.Root, "web", "page"), "rows")
	}, func(s *scene, killed bool) {
		assert.Equal(t, len(s.h.mountsBelow()) == 0, killed)
		assert.NilError(t, s.h.unmount("web", "id"))
		assert.Assert(t, s.check("web", "rows"))
	})
	everyStep(t, order{Request: "expire"}, func(s *scene) {
		assert.NilError(t, s.h.create("web", "on-remove=purge"))
		write(t, filepath.Join(s.h.cfg.Root, "web", "page"), "rows")
		assert.NilError(t, s.h.remove("web"))
	}, func(s *scene, killed bool) {
		s.h.expire(t.Context())
		left, err := os.ReadDir(filepath.Join(s.h.cfg.Root, ".berth", "trash"))
		assert.NilError(t, err)
		assert.Equal(t, len(left), 0)
		assert.Equal(t, read(t, filepath.Join(s.h.cfg.Root, "other", "f")), "other")
	})
}

// Recovery itself is killed, one step further each time.
func TestKilledAtAnyStepOfRecovery(t *testing.T) {
	for _, request := range []string{"create", "remove"} {
		recoveries := 0
		for first := 0; ; first++ {
			s := newScene(t, order{Request: request, Name: "web", Die: first})
			content := ""
			if request == "remove" {
				content = "rows"
				assert.NilError(t, s.h.create("web"))
				write(t, filepath.Join(s.h.cfg.Root, "web", "page"), content)
			}
			s.h.stop()
			killed := s.order.run(t)
			s.order.Request = "recover"
			for s.order.Die = 0; killed && s.order.run(t); s.order.Die++ {
				recoveries++
			}
			s.h.start()
			s.check("web", content)
			if !killed {
				break
			}
		}
		assert.Assert(t, recoveries >= 2, "recovery was killed %d times", recoveries)
	}
}

// An error, unlike a crash, is undone at once and leaves the volume as it was.
func TestAnErrorAtAnyStepIsUndone(t *testing.T) {
	for _, request := range []string{"create", "remove"} {
		for _, failure := range []error{unix.EIO, unix.ENOSPC} {
			for fail := 0; ; fail++ {
				steps, armed := 0, false
				root := t.TempDir()
				h := newHost(t, root, func(c *Config) {
					c.step = func(step, _ string) error {
						if !armed || strings.HasPrefix(step, "undo") {
							return nil
						}
						steps++
						if steps == fail+1 {
							return failure
						}
						return nil
					}
				})
				assert.NilError(t, h.create("web"))
				write(t, filepath.Join(root, "web", "page"), "rows")
				before := tree(t, root)
				call := func() error { return h.create("new") }
				if request == "remove" {
					call = func() error { return h.remove("web") }
				}
				armed = true
				err := call()
				armed = false
				if err == nil {
					assert.Assert(t, fail >= 4)
					break
				}
				assert.ErrorIs(t, err, failure)
				if exists(filepath.Join(root, "web")) {
					assert.DeepEqual(t, tree(t, root), before)
				}
				h.tend(t.Context())
				assert.NilError(t, call())
				if request == "create" {
					assert.DeepEqual(t, h.list(), []string{"new", "web"})
				} else {
					assert.DeepEqual(t, h.list(), []string{})
					assert.DeepEqual(t, trash(t, root), []string{"web"})
				}
			}
		}
	}
}
