package enginetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
)

// errInjected is what an interrupted step returns.
var errInjected = errors.New("interrupted by the test")

// How a call is interrupted.
const (
	// killed: the step and all after it fail, so that nothing is undone.
	killed = "killed"
	// failed: the step fails, the call undoes what it did.
	failed = "failed"
	// cancelled: ctx ends before the step.
	cancelled = "cancelled"
)

// interrupt makes call with the bench's place, interrupted before its step number n,
// from 0. reached is false when it has fewer steps.
func (b *bench) interrupt(how string, n int, call func(ctx context.Context) error) (reached bool, err error) {
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	steps := 0
	b.place.Step = func(string) error {
		steps++
		switch {
		case steps <= n:
			return nil
		case how == killed, how == failed && steps == n+1:
			return errInjected
		case how == cancelled:
			cancel()
		}
		return nil
	}
	defer func() { b.place.Step = nil }()
	err = call(ctx)
	return steps > n, err
}

// A scene is a call on a volume of its own.
type scene struct {
	call func(ctx context.Context) error
	// before checks that all is as it was before the call, after that it has ended.
	before, after func(t testing.TB)
	// again completes the call after a kill; nil makes the call once more.
	again func(t testing.TB)
}

// interruptions plays a scene once for each step and way of interruption.
func (b *bench) interruptions(hows []string, set func(name string) scene) {
	b.t.Helper()
	for _, how := range hows {
		for n := 0; ; n++ {
			name := fmt.Sprintf("%s-%d", how, n)
			s := set(name)
			reached, err := b.interrupt(how, n, s.call)
			if reached && how != cancelled {
				assert.ErrorIs(b.t, err, errInjected, name)
			} else if !reached {
				assert.NilError(b.t, err, name)
			}
			switch {
			case err == nil:
			case how != killed:
				b.clean()
				s.before(b.t)
				assert.NilError(b.t, s.call(b.t.Context()), name)
			case s.again != nil:
				s.again(b.t)
			default:
				assert.NilError(b.t, s.call(b.t.Context()), name)
			}
			s.after(b.t)
			b.clean()
			if !reached {
				assert.Assert(b.t, n > 0, "the engine does not call Place.Before")
				break
			}
			assert.Assert(b.t, n < 100, "no end of steps")
		}
	}
}

func testCreateInterrupted(b *bench) {
	uid := uint32(1000)
	b.interruptions([]string{killed, failed, cancelled}, func(name string) scene {
		v := b.volume(name)
		call := func(ctx context.Context) error {
			created, err := b.engine.Create(ctx, b.place, v, engine.Attributes{UID: &uid})
			if err == nil && !created {
				return errors.New("it was there")
			}
			return err
		}
		before := func(t testing.TB) { assert.Assert(t, !b.found(name), name) }
		return scene{
			call: call, before: before,
			after: func(t testing.TB) {
				assert.Assert(t, b.found(name), name)
				b.attach(v)
				assert.Equal(t, b.stat(v).Uid, uid)
				b.detach(v)
			},
			again: func(t testing.TB) {
				assert.NilError(t, b.engine.Abandon(b.place, v), name)
				before(t)
				assert.NilError(t, call(t.Context()), name)
			},
		}
	})
}

func testMovesInterrupted(b *bench) {
	for kind, set := range map[string]func(v engine.Volume) (moved engine.Volume, call func(ctx context.Context) error){
		"retire": func(v engine.Volume) (engine.Volume, func(ctx context.Context) error) {
			return engine.Volume{}, func(ctx context.Context) error { return b.engine.Retire(ctx, b.place, v) }
		},
		"reinstate": func(v engine.Volume) (engine.Volume, func(ctx context.Context) error) {
			assert.NilError(b.t, b.engine.Retire(b.t.Context(), b.place, v))
			return v, func(ctx context.Context) error { return b.engine.Reinstate(ctx, b.place, v) }
		},
		"rename": func(v engine.Volume) (engine.Volume, func(ctx context.Context) error) {
			moved := v
			moved.Name = v.Name + "-new"
			return moved, func(ctx context.Context) error { return b.engine.Rename(ctx, b.place, v, moved.Name) }
		},
	} {
		b.interruptions([]string{killed, failed, cancelled}, func(name string) scene {
			v := b.create(kind + name)
			b.write(v, "f", name)
			b.detach(v)
			moved, call := set(v)
			found := b.found(v.Name)
			return scene{
				call:   call,
				before: func(t testing.TB) { assert.Equal(t, b.found(v.Name), found, name) },
				after: func(t testing.TB) {
					if moved.Name == "" {
						assert.Assert(t, !b.found(v.Name))
						assert.NilError(t, b.engine.Reinstate(t.Context(), b.place, v))
						moved = v
					}
					b.attach(moved)
					assert.Equal(t, b.read(moved, "f"), name)
					b.detach(moved)
				},
			}
		})
	}
}

func testSnapshotInterrupted(b *bench) {
	v := b.create("web")
	b.write(v, "f", "x")
	b.interruptions([]string{killed, failed, cancelled}, func(name string) scene {
		call := func(ctx context.Context) error {
			_, err := b.engine.Snapshot(ctx, b.place, v, name, nil)
			return err
		}
		before := func(t testing.TB) { assert.Assert(t, !b.hasSnapshot(v, name), name) }
		return scene{
			call: call, before: before,
			after: func(t testing.TB) {
				assert.Equal(t, b.readSnapshot(v, name, "f"), "x")
				assert.Equal(t, b.read(v, "f"), "x")
			},
			again: func(t testing.TB) {
				if b.hasSnapshot(v, name) {
					assert.Equal(t, b.readSnapshot(v, name, "f"), "x")
				}
				assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, name), name)
				before(t)
				assert.NilError(t, call(t.Context()), name)
			},
		}
	})
	b.interruptions([]string{killed}, func(name string) scene {
		name = "remove-" + name
		b.snapshot(v, name)
		return scene{
			call: func(ctx context.Context) error { return b.engine.RemoveSnapshot(ctx, b.place, v, name) },
			again: func(t testing.TB) {
				if b.hasSnapshot(v, name) {
					assert.Equal(t, b.readSnapshot(v, name, "f"), "x")
				}
				assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, name), name)
			},
			after: func(t testing.TB) { assert.Assert(t, !b.hasSnapshot(v, name), name) },
		}
	})
}

func testCloneInterrupted(b *bench) {
	v := b.create("web")
	b.write(v, "f", "x")
	b.snapshot(v, "s")
	b.write(v, "f", "y")
	for _, abandon := range []bool{false, true} {
		b.interruptions([]string{killed, failed, cancelled}, func(name string) scene {
			clone := b.volume(fmt.Sprintf("%s-%t", name, abandon))
			call := func(ctx context.Context) error {
				_, err := b.engine.Clone(ctx, b.place, v, "s", clone, nil)
				return err
			}
			before := func(t testing.TB) { assert.Assert(t, !b.found(clone.Name), name) }
			s := scene{
				call: call, before: before,
				after: func(t testing.TB) {
					assert.Equal(t, b.read(v, "f"), "y")
					b.attach(clone)
					assert.Equal(t, b.read(clone, "f"), "x")
					b.detach(clone)
				},
			}
			if abandon {
				s.again = func(t testing.TB) {
					assert.NilError(t, b.engine.Abandon(b.place, clone), name)
					b.clean()
					before(t)
					assert.NilError(t, call(t.Context()), name)
				}
			}
			return s
		})
	}
}

func testAbandonInterrupted(b *bench) {
	v := b.create("web")
	b.write(v, "f", "x")
	for _, kind := range []string{"empty", "clone"} {
		b.interruptions([]string{killed}, func(name string) scene {
			given := b.volume(kind + name)
			var err error
			if kind == "clone" {
				_, err = b.engine.Clone(b.t.Context(), b.place, v, "", given, nil)
			} else {
				_, err = b.engine.Create(b.t.Context(), b.place, given, engine.Attributes{})
			}
			assert.NilError(b.t, err)
			return scene{
				call: func(context.Context) error { return b.engine.Abandon(b.place, given) },
				after: func(t testing.TB) {
					assert.Assert(t, !b.found(given.Name), name)
					assert.Equal(t, b.read(v, "f"), "x")
				},
			}
		})
	}
}

func testRollbackInterrupted(b *bench) {
	// set makes a volume that is to go back from "y" to snapshot s, "x".
	set := func(name string) scene {
		v := b.create(name)
		b.write(v, "f", "x")
		b.snapshot(v, "s")
		b.write(v, "f", "y")
		return scene{
			call: func(ctx context.Context) error {
				_, err := b.engine.Rollback(ctx, b.place, v, "s", "kept", nil)
				return err
			},
			before: func(t testing.TB) {
				assert.Equal(t, b.read(v, "f"), "y")
				assert.Equal(t, b.readSnapshot(v, "s", "f"), "x")
				assert.Assert(t, !b.hasSnapshot(v, "kept"))
			},
			after: func(t testing.TB) {
				assert.Equal(t, b.read(v, "f"), "x")
				assert.Equal(t, b.readSnapshot(v, "s", "f"), "x")
				assert.Equal(t, b.readSnapshot(v, "kept", "f"), "y")
				b.write(v, "f", "z")
				_, err := b.engine.Rollback(t.Context(), b.place, v, "s", "kept", nil)
				assert.NilError(t, err)
				assert.Equal(t, b.read(v, "f"), "z")
				b.detach(v)
			},
		}
	}
	b.interruptions([]string{killed, failed, cancelled}, set)
	// Who repeats it can be killed as well.
	steps := 0
	for reached := true; reached; steps++ {
		reached, _ = b.interrupt(killed, steps, set(fmt.Sprintf("count-%d", steps)).call)
	}
	for first := range steps {
		for second := range steps {
			s := set(fmt.Sprintf("twice-%d-%d", first, second))
			_, _ = b.interrupt(killed, first, s.call)
			_, _ = b.interrupt(killed, second, s.call)
			assert.NilError(b.t, s.call(b.t.Context()))
			s.after(b.t)
		}
	}
}

// Several volumes go through all calls at the same time.
func testTogether(b *bench) {
	shared := b.create("shared")
	b.write(shared, "f", "shared")
	b.snapshot(shared, "s")
	var group errgroup.Group
	for i := range 6 {
		name := fmt.Sprint(i)
		group.Go(func() error { return b.live(shared, b.volume(name), b.volume("clone"+name)) })
	}
	assert.NilError(b.t, group.Wait())
	assert.Equal(b.t, b.read(shared, "f"), "shared")
	b.clean()
}

// live makes a volume that is a clone, changes it, takes it back and removes it.
func (b *bench) live(from, v, clone engine.Volume) error {
	ctx, e, p := b.t.Context(), b.engine, b.place
	expect := func(want string) error {
		data, err := e.Open(p, v)
		if err != nil {
			return err
		}
		defer data.Close()
		got, err := os.ReadFile(filepath.Join(procPath(data), "f"))
		if err == nil && string(got) != want {
			err = fmt.Errorf("%s has %q, want %q", v.Name, got, want)
		}
		return err
	}
	for range 3 {
		steps := []func() error{
			func() error { _, err := e.Clone(ctx, p, from, "s", v, nil); return err },
			func() error { return e.Attach(ctx, p, v) },
			func() error { return expect("shared") },
			func() error { _, err := e.Snapshot(ctx, p, v, "one", nil); return err },
			func() error {
				data, err := e.Open(p, v)
				if err != nil {
					return err
				}
				defer data.Close()
				return os.WriteFile(filepath.Join(procPath(data), "f"), []byte(v.Name), 0o600)
			},
			func() error { _, err := e.Clone(ctx, p, v, "", clone, nil); return err },
			func() error { _, err := e.Usage(ctx, p, v); return err },
			func() error { _, err := e.Rollback(ctx, p, v, "one", "two", nil); return err },
			func() error { return expect("shared") },
			func() error { _, err := e.Rollback(ctx, p, v, "two", "three", nil); return err },
			func() error { return expect(v.Name) },
			func() error { return e.RemoveSnapshot(ctx, p, v, "one") },
			func() error { return e.Detach(ctx, p, v) },
			func() error { return errors.Join(e.Retire(ctx, p, v), e.Retire(ctx, p, clone)) },
			func() error { return errors.Join(e.Destroy(ctx, p, v), e.Destroy(ctx, p, clone)) },
		}
		for i, step := range steps {
			if err := step(); err != nil {
				return fmt.Errorf("step %d of %s: %w", i, v.Name, err)
			}
		}
	}
	return nil
}

func testDestroyInterrupted(b *bench) {
	b.interruptions([]string{killed}, func(name string) scene {
		v := b.create(name)
		b.write(v, "f", "x")
		b.snapshot(v, "one")
		b.snapshot(v, "two")
		b.detach(v)
		assert.NilError(b.t, b.engine.Retire(b.t.Context(), b.place, v))
		return scene{
			call: func(ctx context.Context) error { return b.engine.Destroy(ctx, b.place, v) },
			after: func(t testing.TB) {
				for _, dir := range []interface{ Names() ([]string, error) }{b.place.Trash, b.place.Snapshots} {
					names, err := dir.Names()
					assert.NilError(t, err)
					assert.Equal(t, len(names), 0, "%s: %v", name, names)
				}
			},
		}
	})
}
