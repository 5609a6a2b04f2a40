package schedule_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/schedule"
)

// store keeps states as the driver does, as JSON.
type store struct {
	mu    sync.Mutex
	saved map[string][]byte
	fails error
}

func (s *store) Load() (map[string]schedule.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]schedule.State)
	for uuid, data := range s.saved {
		var state schedule.State
		if err := json.Unmarshal(data, &state); err != nil {
			return nil, err
		}
		out[uuid] = state
	}
	return out, s.fails
}

func (s *store) Put(uuid string, state schedule.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails != nil {
		return s.fails
	}
	data, err := json.Marshal(state)
	if s.saved == nil {
		s.saved = make(map[string][]byte)
	}
	s.saved[uuid] = data
	return err
}

func (s *store) Delete(uuid string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.saved, uuid)
	return s.fails
}

func (s *store) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.saved)
}

// copy is what a process that is killed now leaves behind.
func (s *store) copy() *store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &store{saved: maps.Clone(s.saved)}
}

// A run is what Do was called for.
type run struct {
	uuid    string
	at, due time.Time
}

// host runs jobs in the bubble of a test.
type host struct {
	*schedule.Runner
	store *store

	mu   sync.Mutex
	jobs []schedule.Job
	runs []run
	most int // at once
	now  int
	do   func(ctx context.Context, n int) error // n-th run, from 0

	stop context.CancelFunc
	done chan error
}

func start(t *testing.T, s *store, jobs ...schedule.Job) *host {
	h := prepare(s, jobs...)
	h.start(t)
	return h
}

func prepare(s *store, jobs ...schedule.Job) *host {
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &host{store: s, jobs: jobs}
	h.Runner = &schedule.Runner{Store: s, Log: logrus.NewEntry(log), Jobs: func() []schedule.Job {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.jobs
	}, Do: func(ctx context.Context, job schedule.Job) error {
		h.mu.Lock()
		n := len(h.runs)
		h.runs = append(h.runs, run{job.UUID, time.Now(), job.Due})
		h.now++
		h.most = max(h.most, h.now)
		do := h.do
		h.mu.Unlock()
		defer func() { h.mu.Lock(); defer h.mu.Unlock(); h.now-- }()
		if do != nil {
			return do(ctx, n)
		}
		return nil
	}}
	return h
}

func (h *host) start(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	h.stop, h.done = stop, make(chan error, 1)
	go func() { h.done <- h.Run(ctx) }()
	synctest.Wait()
}

// end stops the runner and waits for it.
func (h *host) end(t *testing.T) {
	t.Helper()
	h.stop()
	assert.NilError(t, <-h.done)
}

// during lets time go by.
func (h *host) during(d time.Duration) []run {
	time.Sleep(d) // in the bubble: no time at all
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	runs := h.runs
	h.runs = nil
	return runs
}

func (h *host) set(jobs []schedule.Job) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.jobs = jobs
}

func job(t testing.TB, uuid, text string) schedule.Job {
	return schedule.Job{UUID: uuid, Schedule: parse(t, text)}
}

func TestJobsRunWhenTheyAreDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		jobs := []schedule.Job{job(t, "a", "@hourly"), job(t, "b", "@hourly"), job(t, "c", "@every 3h"), job(t, "d", "30 3 * * *"), {UUID: "e"}}
		h := start(t, &store{}, jobs...)
		want := make(map[string]time.Time)
		for _, job := range jobs[:4] {
			want[job.UUID] = job.Schedule.NextFor(job.UUID, time.Now())
		}
		count := make(map[string]int)
		for _, run := range h.during(48 * time.Hour) {
			count[run.uuid]++
			assert.Assert(t, run.at.Equal(want[run.uuid]), "%s ran at %s, not %s", run.uuid, run.at, want[run.uuid])
			assert.Assert(t, run.due.Equal(run.at))
			for _, job := range jobs {
				if job.UUID == run.uuid {
					want[run.uuid] = job.Schedule.NextFor(run.uuid, run.at)
				}
			}
		}
		assert.DeepEqual(t, count, map[string]int{"a": 48, "b": 48, "c": 16, "d": 2})
		state, ok := h.State("d")
		assert.Assert(t, ok)
		assert.Assert(t, state.Next.Equal(want["d"]) && state.Error == "" && state.Last.Equal(state.Success) && !state.Last.IsZero())
		_, ok = h.State("e")
		assert.Assert(t, !ok)
		h.end(t)
	})
}

func TestMissedRunsAreMadeUpForOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a := &store{}, job(t, "a", "@hourly")
		h := start(t, s, a)
		assert.Equal(t, len(h.during(50*time.Minute)), 1)
		h.end(t)
		time.Sleep(10*time.Hour + 13*time.Minute)

		h = start(t, s, a)
		missed := h.during(0)
		assert.Equal(t, len(missed), 1)
		assert.Assert(t, missed[0].due.Equal(a.Schedule.LastFor("a", time.Now())), "it is for the last of those that were missed")
		assert.Assert(t, missed[0].due.Before(time.Now()))
		next := h.during(time.Hour)
		assert.Equal(t, len(next), 1)
		assert.Assert(t, next[0].at.Equal(a.Schedule.NextFor("a", missed[0].at)))
		h.end(t)

		// Not missed, not made up for.
		h = start(t, s, a)
		assert.Equal(t, len(h.during(0)), 0)
		h.end(t)
	})
}

func TestARunThatWasKilledRestsAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a := &store{}, job(t, "a", "@daily")
		h := prepare(s, a)
		var left *store
		h.do = func(context.Context, int) error { left = s.copy(); return nil }
		h.start(t)
		assert.Equal(t, len(h.during(50*time.Minute)), 1)
		h.end(t)

		for i := range 4 {
			// The process ends in the middle of each run.
			h = prepare(left, a)
			h.do = func(context.Context, int) error { left = h.store.copy(); return nil }
			restart := time.Now()
			h.start(t)
			state, _ := h.State("a")
			assert.Equal(t, state.Failures, i+1)
			assert.ErrorContains(t, errors.New(state.Error), "interrupted")
			assert.Assert(t, state.Started.IsZero())
			pause := time.Minute << i
			assert.Equal(t, len(h.during(pause-time.Second)), 0)
			runs := h.during(time.Second)
			assert.Equal(t, len(runs), 1)
			assert.Equal(t, runs[0].at.Sub(restart), pause)
			h.end(t)
		}
	})
}

func TestFailuresAreTriedAgainAndShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := prepare(&store{}, job(t, "a", "@daily"))
		h.do = func(_ context.Context, n int) error {
			if n < 9 {
				return fmt.Errorf("failure %d", n)
			}
			return nil
		}
		h.start(t)
		// Between tries: 1, 2, 4, 8, 16, 32, 60, 60, 60 minutes.
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		h.mu.Lock()
		first := h.runs[0].at
		h.mu.Unlock()
		state, _ := h.State("a")
		assert.Assert(t, state.Failures > 0 && state.Error == fmt.Sprintf("failure %d", state.Failures-1), "%+v", state)
		assert.Assert(t, state.Success.IsZero() && state.Last.Equal(first) || state.Failures > 1)
		runs := h.during(12 * time.Hour)
		var minutes []int
		for i := range runs[1:] {
			minutes = append(minutes, int(runs[i+1].at.Sub(runs[i].at)/time.Minute))
			assert.Assert(t, runs[i+1].due.Equal(runs[0].due), "a retry is for the same point in the schedule")
		}
		assert.DeepEqual(t, minutes, []int{1, 2, 4, 8, 16, 32, 60, 60, 60})
		state, _ = h.State("a")
		assert.Assert(t, state.Failures == 0 && state.Error == "" && state.Success.Equal(runs[9].at))
		assert.Assert(t, state.Next.After(time.Now().Add(6*time.Hour)), "the retries have not moved the schedule")
		h.end(t)
	})
}

func TestWhatAnotherHostDoesIsLookedAtAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := prepare(&store{}, job(t, "a", "@daily"))
		h.do = func(_ context.Context, n int) error {
			switch n {
			case 0:
				return errors.New("no")
			case 1, 2, 3:
				return fmt.Errorf("%w: host b", schedule.ErrElsewhere)
			}
			return nil
		}
		h.start(t)
		runs := h.during(25 * time.Hour)
		assert.Assert(t, len(runs) >= 5, "%d", len(runs))
		for i := range 4 {
			assert.Equal(t, runs[i+1].at.Sub(runs[i].at), time.Minute)
			assert.Assert(t, runs[i+1].due.Equal(runs[0].due))
		}
		state, _ := h.State("a")
		assert.Assert(t, state.Failures == 0 && state.Error == "", "%+v", state)
		h.end(t)
	})
}

// A job with a short interval that always fails runs at its own pace, but never
// sooner than a minute after a failure.
func TestFailuresKeepToTheSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := prepare(&store{}, job(t, "a", "@every 10m"), job(t, "b", "@every 1m"))
		h.do = func(context.Context, int) error { return errors.New("no") }
		h.start(t)
		h.during(3 * time.Hour) // the pauses have grown to more than the intervals
		last := make(map[string]time.Time)
		count := make(map[string]int)
		for _, run := range h.during(5 * time.Hour) {
			count[run.uuid]++
			if before, ok := last[run.uuid]; ok {
				assert.Assert(t, run.at.Sub(before) >= time.Minute)
			}
			last[run.uuid] = run.at
		}
		assert.Assert(t, count["a"] >= 29 && count["a"] <= 31, "%v", count)
		assert.Assert(t, count["b"] >= 290 && count["b"] <= 301, "%v", count)
		h.end(t)
	})
}

func TestALongJobDoesNotPileUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := job(t, "a", "@every 10m")
		h := prepare(&store{}, a)
		h.do = func(context.Context, int) error { time.Sleep(35 * time.Minute); return nil }
		h.start(t)
		runs := h.during(12 * time.Hour)
		assert.Equal(t, h.most, 1)
		for i := range runs[1:] {
			assert.Equal(t, runs[i+1].at.Sub(runs[i].at), 40*time.Minute)
			assert.Assert(t, runs[i+1].due.Equal(runs[i+1].at), "what was overlapped is left out")
		}
		h.end(t)
	})
}

func TestJobsWaitForAPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &store{}
		var jobs []schedule.Job
		for i := range 10 {
			jobs = append(jobs, job(t, fmt.Sprint(i), "@hourly"))
		}
		h := start(t, s, jobs...)
		h.end(t)
		time.Sleep(5*time.Hour + 30*time.Minute)
		for _, want := range []int{0, 1, 3} {
			h = prepare(s.copy(), append(jobs, jobs...)...) // what is listed twice is done once
			h.Concurrency = want
			h.do = func(context.Context, int) error { time.Sleep(30 * time.Second); return nil }
			h.start(t)
			runs := h.during(6 * time.Minute)
			assert.Equal(t, len(runs), 10)
			assert.Equal(t, h.most, max(want, 2*(1-min(want, 1))))
			begun := make(map[string]time.Time)
			for _, run := range runs {
				state, err := s.Load()
				assert.NilError(t, err)
				begun[run.uuid] = state[run.uuid].Next
			}
			for i := range runs[1:] {
				// Those that begin at one moment have no order.
				assert.Assert(t, want != 1 || !begun[runs[i+1].uuid].Before(begun[runs[i].uuid]), "who waited longest is first")
			}
			h.end(t)
		}
	})
}

func TestAVolumeThatVanishesIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, b := &store{}, job(t, "a", "@hourly"), job(t, "b", "@hourly")
		h := start(t, s, a, b)
		h.during(3 * time.Hour)
		h.set(nil) // the root is away: nothing is known
		h.during(3 * time.Hour)
		_, ok := h.State("a")
		assert.Assert(t, ok)
		h.set([]schedule.Job{b, {UUID: "a"}}) // a has no schedule any more
		h.during(time.Minute)
		_, ok = h.State("a")
		assert.Assert(t, !ok)
		assert.Equal(t, s.len(), 1)
		// While it runs, too.
		h.mu.Lock()
		h.do = func(context.Context, int) error { time.Sleep(20 * time.Minute); return nil }
		h.mu.Unlock()
		for len(h.during(time.Minute)) == 0 {
		}
		h.set([]schedule.Job{})
		h.Wake()
		h.during(time.Hour)
		assert.Equal(t, s.len(), 0)
		h.set([]schedule.Job{b})
		h.Wake()
		assert.Equal(t, len(h.during(0)), 0, "a volume that is new does not run at once")
		assert.Equal(t, s.len(), 1)
		h.end(t)
	})
}

func TestAScheduleThatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &store{}
		h := start(t, s, job(t, "a", "@monthly"))
		h.set([]schedule.Job{job(t, "a", "@every 1h")})
		h.Wake()
		assert.Equal(t, len(h.during(3*time.Hour)), 3)
		h.end(t)
		h = start(t, s, job(t, "a", "@every 2h"))
		assert.Equal(t, len(h.during(6*time.Hour)), 3)
		h.end(t)
	})
}

func TestTheClockIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		ahead := 4 * 365 * 24 * time.Hour
		h := prepare(&store{}, job(t, "a", "@hourly"))
		h.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }
		h.start(t)
		assert.Equal(t, len(h.during(3*time.Hour)), 3)
		mu.Lock()
		ahead = 0
		mu.Unlock()
		assert.Equal(t, len(h.during(3*time.Hour)), 3, "set back: it does not wait for four years")
		mu.Lock()
		ahead = 30 * 24 * time.Hour
		mu.Unlock()
		assert.Equal(t, len(h.during(2*time.Minute)), 1, "set forth: once, not 720 times")
		h.end(t)
	})
}

func TestStopWaitsForJobsAndDoesNotBlameThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a := &store{}, job(t, "a", "@hourly")
		h := prepare(s, a)
		ended := false
		h.do = func(ctx context.Context, _ int) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			ended = true
			return ctx.Err()
		}
		h.start(t)
		assert.Equal(t, len(h.during(50*time.Minute)), 1)
		h.end(t)
		assert.Assert(t, ended)

		h = start(t, s, a)
		runs := h.during(0)
		assert.Equal(t, len(runs), 1, "it is due still")
		state, _ := h.State("a")
		assert.Assert(t, state.Failures == 0 && state.Error == "")
		h.end(t)
	})
}

func TestAStoreThatFailsStopsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &store{}
		h := start(t, s, job(t, "a", "@every 1h"))
		s.mu.Lock()
		s.fails = errors.New("disk full")
		s.mu.Unlock()
		assert.Equal(t, len(h.during(5*time.Hour)), 5)
		h.end(t)
		assert.ErrorContains(t, h.Run(t.Context()), "disk full")
	})
}

// A thousand volumes are looked at once a minute, however many of them run.
func TestManyJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 1000
		hourly := parse(t, "@hourly")
		jobs := make([]schedule.Job, n)
		for i := range jobs {
			jobs[i] = schedule.Job{UUID: fmt.Sprint(i), Schedule: hourly}
		}
		h := prepare(&store{}, jobs...)
		looks, list := 0, h.Jobs
		h.Jobs = func() []schedule.Job { looks++; return list() }
		h.start(t)
		runs := h.during(2 * time.Hour)
		h.end(t)
		assert.Equal(t, len(runs), 2*n)
		assert.Assert(t, looks <= 2*60+1, "%d", looks)
	})
}
