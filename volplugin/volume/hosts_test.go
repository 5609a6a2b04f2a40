package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// Two hosts create the same two hundred volumes at the same time: each volume is made
// once, and both hosts are told of it.
func TestTwoHostsRaceToCreate(t *testing.T) {
	path := mounttest.Tmpfs(t, 64<<20)
	a, b := openRoot(t, location(path, "a")), openRoot(t, location(path, "b"))
	source, err := a.Create(t.Context(), "source", options.Spec{})
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(path, "source", "page"), []byte("x"), 0o600))
	for round := range 200 {
		spec := options.Spec{}
		if round%4 == 0 {
			spec.From = &options.Source{Volume: source.Name}
		}
		name := fmt.Sprintf("race-%d", round)
		var recs [2]Record
		var errs [2]error
		var wg sync.WaitGroup
		for i, host := range []*Root{a, b} {
			wg.Go(func() { recs[i], errs[i] = host.Create(t.Context(), name, spec) })
		}
		wg.Wait()
		assert.NilError(t, errors.Join(errs[:]...))
		assert.Equal(t, recs[0].UUID, recs[1].UUID)
		assert.Assert(t, !recs[0].Adopted && !recs[1].Adopted)
		rec, err := a.Record(name)
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		content, err := os.ReadFile(filepath.Join(path, name, "page"))
		if spec.From == nil {
			assert.Assert(t, os.IsNotExist(err))
		} else {
			assert.NilError(t, err)
			assert.Equal(t, string(content), "x")
		}
	}
	assert.DeepEqual(t, leftIn(t, path), []string(nil))
}

func leftIn(t *testing.T, path string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(path, ".berth", "tmp"))
	assert.NilError(t, err)
	var names []string
	for _, entry := range entries {
		// The mark of a complete clone goes when somebody attaches it.
		if !strings.HasSuffix(entry.Name(), ".cloned") {
			names = append(names, entry.Name())
		}
	}
	return names
}

// Hosts do all that can be done with a volume to the same few at the same time.
// Whatever comes first, nothing is lost and nothing is left half done.
func TestHostsRaceWithEverything(t *testing.T) {
	memory := mounttest.Tmpfs(t, 128<<20)
	s := newScene(t, memory, "create")
	s.order.Now = time.Now()
	var mu sync.Mutex
	removed := 0
	var wg sync.WaitGroup
	for n, host := range []string{"a", "b", "c"} {
		random := rand.New(rand.NewPCG(uint64(n), uint64(time.Now().UnixNano())))
		root := openRoot(t, Location{Path: s.order.Root, Engines: s.order.engines(), Host: host, Now: time.Now})
		wg.Go(func() {
			for range 200 {
				name, to := fmt.Sprintf("v%d", random.IntN(3)), fmt.Sprintf("v%d", random.IntN(3))
				ctx := context.Background()
				var err error
				switch random.IntN(9) {
				case 0, 1:
					_, err = root.Create(ctx, name, options.Spec{})
				case 2:
					_, err = root.Create(ctx, name, options.Spec{From: &options.Source{Volume: "web", Snapshot: "old"}})
				case 3:
					_, err = root.CreateSnapshot(ctx, name, SnapshotOptions{}, nil)
				case 4:
					if list, errList := root.Snapshots(ctx, name); errList == nil && len(list) > 0 {
						_, err = root.Rollback(ctx, name, list[0].Name, nil)
					}
				case 5:
					_, err = root.Rename(ctx, name, to)
				case 6:
					err = root.Remove(ctx, name)
				case 7:
					_, err = root.RestoreTrash(ctx, name, to)
				case 8:
					_, err = root.Update(ctx, name, func(rec *Record) error {
						rec.Labels = map[string]string{"by": host}
						return nil
					})
				}
				if err != nil && !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) && !errors.Is(err, errTaken) {
					t.Errorf("host %s: %v", host, err)
				}
				mu.Lock()
				removed++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, host := range []string{"a", "b", "c"} {
		s.order.Host = host
		s.recover()
	}
	for _, line := range s.show() {
		assert.Assert(t, !strings.Contains(line, "MISSING") && !strings.HasPrefix(line, "loose"), "%s", line)
		fields := strings.Fields(line)
		if fields[0] == "volume" || fields[0] == "snapshot" {
			assert.Equal(t, fields[2], "ready", line)
		}
	}
	assert.DeepEqual(t, s.trees(), []string(nil))
}

// A claim that its host took to the grave is broken when it is old, by one host only.
func TestAClaimOfADeadHostIsBroken(t *testing.T) {
	path := t.TempDir()
	a, b := openRoot(t, location(path, "a")), openRoot(t, location(path, "b"))
	_, err := a.Create(t.Context(), "web", options.Spec{})
	assert.NilError(t, err)
	dead := func(age time.Duration) {
		t.Helper()
		data, err := json.Marshal(claim{Host: "a", Process: "killed", At: time.Now()})
		assert.NilError(t, err)
		assert.NilError(t, a.makeFile(t.Context(), a.tmp, claimPrefix+"web", data))
		at := time.Now().Add(-age)
		assert.NilError(t, os.Chtimes(filepath.Join(path, ".berth/tmp", claimPrefix+"web"), at, at))
	}
	dead(0)
	label := func(r *Root, value string) error {
		_, err := r.Update(t.Context(), "web", func(rec *Record) error {
			rec.Labels = map[string]string{"by": value}
			return nil
		})
		return err
	}
	err = label(b, "b")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "host a is changing it")
	// The host itself goes on at once.
	assert.NilError(t, label(a, "a"))
	dead(staleAfter + time.Minute)
	assert.NilError(t, label(b, "b"))
	// What another goroutine of this process holds is alive.
	release, err := a.claim(t.Context(), "web")
	assert.NilError(t, err)
	err = label(a, "c")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.NilError(t, release())
	assert.NilError(t, label(a, "c"))
	assert.DeepEqual(t, leftIn(t, path), []string(nil))
}

// Updates of two hosts at once are all there.
func TestUpdatesOfTwoHostsAreNotLost(t *testing.T) {
	path := mounttest.Tmpfs(t, 16<<20)
	hosts := []*Root{openRoot(t, location(path, "a")), openRoot(t, location(path, "b"))}
	_, err := hosts[0].Create(t.Context(), "web", options.Spec{})
	assert.NilError(t, err)
	var wg sync.WaitGroup
	for n, host := range hosts {
		wg.Go(func() {
			for i := range 20 {
				_, err := host.Update(t.Context(), "web", func(rec *Record) error {
					labels := map[string]string{fmt.Sprintf("%d-%d", n, i): "x"}
					for key, value := range rec.Labels {
						labels[key] = value
					}
					rec.Labels = labels
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	rec, err := hosts[0].Record("web")
	assert.NilError(t, err)
	assert.Equal(t, len(rec.Labels), 40)
	_, err = hosts[0].Update(t.Context(), "web", func(rec *Record) error {
		rec.Name = "site"
		return nil
	})
	assert.ErrorContains(t, err, "cannot be updated")
	assert.Assert(t, !slices.Contains(leftIn(t, path), "claim.web"))
}
