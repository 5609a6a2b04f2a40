package volplugin

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// still is the rest of containers that are not there.
type still struct {
	begin, disturbed, end error
	until                 time.Time
	steps                 *[]string
}

func (s *still) Level() control.Consistency  { return control.ConsistencyQuiesced }
func (s *still) Did() []string               { return []string{"db: hook"} }
func (s *still) Until() time.Time            { return s.until }
func (s *still) Still(context.Context) error { return s.disturbed }

func (s *still) End(context.Context) error {
	*s.steps = append(*s.steps, "end")
	return s.end
}

// noting says when a backup is made of the snapshot.
type noting struct {
	backup.Engine
	steps *[]string
}

func (n noting) Backup(ctx context.Context, source backup.Source, tell func(backup.Progress)) (backup.Result, error) {
	*n.steps = append(*n.steps, "backup")
	return n.Engine.Backup(ctx, source, tell)
}

func TestContainersAreAtRestForTheSnapshotOfABackup(t *testing.T) {
	for name, c := range map[string]struct {
		rest  still
		err   string
		steps []string
		told  string
	}{
		"all well":            {steps: []string{"begin web", "end", "backup"}},
		"a hook that fails":   {rest: still{begin: errors.New("exit status 3")}, err: "exit status 3", steps: []string{"begin web"}},
		"disturbed":           {rest: still{disturbed: fault.Conflict("somebody has started db")}, err: "somebody has started db", steps: []string{"begin web", "end"}},
		"too slow":            {rest: still{until: time.Now()}, err: "label berth.backup.timeout", steps: []string{"begin web", "end"}},
		"a hook for the end":  {rest: still{end: errors.New("exit status 4")}, steps: []string{"begin web", "end", "backup"}, told: "exit status 4"},
		"nothing to be quiet": {steps: []string{"begin quiet", "backup"}},
	} {
		k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
		volume := "web"
		if strings.HasPrefix(name, "nothing") {
			volume = "quiet"
		}
		assert.NilError(t, k.create(volume))
		k.target()
		found, _, err := k.home.find(t.Context(), volume)
		assert.NilError(t, err)
		assert.NilError(t, k.home.prepare(t.Context(), found.Record), name)
		var steps []string
		c.rest.steps = &steps
		if c.rest.until.IsZero() {
			c.rest.until = time.Now().Add(time.Hour)
		}
		k.wrapped(func(e backup.Engine) backup.Engine { return noting{e, &steps} })
		k.Driver.cfg.Quiesce = func(_ context.Context, name string) (Rest, error) {
			steps = append(steps, "begin "+name)
			if name == "quiet" || c.rest.begin != nil {
				return nil, c.rest.begin
			}
			return &c.rest, nil
		}
		done, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: volume}, quiet)
		want := control.ConsistencyQuiesced
		if volume == "quiet" {
			want = control.ConsistencyNone
		}
		if c.err == "" {
			assert.NilError(t, err, name)
			assert.Equal(t, done.Consistency, want, name)
		} else {
			assert.ErrorContains(t, err, c.err, name)
		}
		assert.DeepEqual(t, steps, c.steps)
		assert.Equal(t, len(k.left(volume)), 0, "%s: %v", name, k.left(volume))
		k.mu.Lock()
		assert.Assert(t, c.told == "" || slices.ContainsFunc(k.told, func(e notify.Event) bool { return e.Failed && strings.Contains(e.Text, c.told) }), "%s: %v", name, k.told)
		k.mu.Unlock()
	}
}
