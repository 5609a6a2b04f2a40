package schedule

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	// lookEvery bounds how long a Runner does not look: jobs come and go, the clock is
	// set, and a host that was suspended wakes up with timers that stood still.
	lookEvery = time.Minute
	// retryFirst is how long a job rests after its first failure. Each further one in
	// a row doubles it, up to retryMost.
	retryFirst = time.Minute
	retryMost  = time.Hour
	// defaultConcurrency is how many jobs run at once. They are snapshots, which
	// compete for the same disk.
	defaultConcurrency = 2
	// maxError bounds the text of an error that is stored.
	maxError = 1000
)

// ErrElsewhere says that somebody else is doing a job. It is no failure, and the job is
// looked at again after a minute: then the other one has done it, or has died.
var ErrElsewhere = errors.New("done by another host")

// A Job is the work that one volume's schedule asks for.
type Job struct {
	UUID     string
	Schedule Schedule
	// Due is set by the Runner: the point in the schedule that this run is for, the
	// last one when several were missed. A retry is for the same point until the next
	// comes. It is the same on all hosts, so that a snapshot that is named after it is
	// made once, however many hosts try, and is found to exist when a run is repeated.
	Due time.Time
}

// A State is what is known of one job. Its zero times mean never.
type State struct {
	// Schedule is the text that Next was computed from.
	Schedule string
	// Next is when it is due to run, or to be tried again. It may be past while the
	// job waits for others to end.
	Next time.Time
	// Started is when the run began that has not ended yet, or that was interrupted
	// because the process was killed.
	Started time.Time `json:",omitzero"`
	// Last is when the last run that came to an end began, and Error why it failed, ""
	// when it did not.
	Last  time.Time `json:",omitzero"`
	Error string    `json:",omitempty"`
	// Success is when the last run that did not fail began.
	Success time.Time `json:",omitzero"`
	// Failures in a row.
	Failures int `json:",omitempty"`
}

// A Store keeps the states of jobs, by UUID, beyond the process. Methods are called
// by one goroutine. What it fails to store is logged, and the Runner goes on with
// what it remembers.
type Store interface {
	Load() (map[string]State, error)
	Put(uuid string, s State) error
	// Delete forgets one; missing is no error.
	Delete(uuid string) error
}

// A Runner does jobs when they are due. Its fields are not changed after Run was
// called.
//
// It survives restarts: a job that was due meanwhile runs once, at once, however
// many times it was due. One that was running when the process was killed counts as
// failed. A job that takes longer than its interval leaves out the runs that it
// overlaps, and no job runs twice at a time. A volume that is seen for the first time
// waits for the next time its schedule names.
type Runner struct {
	// Jobs lists the jobs there are, without Due. It is called every minute and
	// after Wake, and must be quick. States of volumes that are not in the list are
	// forgotten, unless it is nil, which says that it is not known now and those that
	// were listed before go on.
	Jobs func() []Job
	// Do does one. It returns when ctx ends, which is when Run's does. While it hangs
	// it takes one of the places, so it bounds what may hang. It may be called for up to a
	// minute for a volume that is gone, which is no error.
	Do func(ctx context.Context, job Job) error
	// Concurrency is how many run at once, 2 when it is 0.
	Concurrency int
	Store       Store
	// Now is the clock, time.Now when it is nil. It may be set back and forth: a job
	// is never put off for longer than its schedule says.
	Now func() time.Time
	Log *logrus.Entry

	once sync.Once
	wake chan struct{}

	mu     sync.Mutex
	states map[string]State // guarded by mu; changed by Run's goroutine alone
}

// result is how a run ended.
type result struct {
	job Job
	err error
}

func (r *Runner) complete() {
	r.once.Do(func() {
		r.wake = make(chan struct{}, 1)
		if r.Concurrency <= 0 {
			r.Concurrency = defaultConcurrency
		}
		if r.Now == nil {
			r.Now = time.Now
		}
		if r.Log == nil {
			r.Log = logrus.NewEntry(logrus.StandardLogger())
		}
	})
}

// Wake makes Run look at the jobs at once, as after one was added.
func (r *Runner) Wake() {
	r.complete()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// State tells what is known of a volume's job; ok is false when nothing is. It may
// be called at any time.
func (r *Runner) State(uuid string) (s State, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok = r.states[uuid]
	return s, ok
}

// Run does the jobs until ctx ends, and returns when those that run have ended. The
// error is one of loading the states; nothing was done then. It is called once.
func (r *Runner) Run(ctx context.Context) error {
	r.complete()
	states, err := r.Store.Load()
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.states = make(map[string]State, len(states))
	r.mu.Unlock()
	for uuid, s := range states {
		if !s.Started.IsZero() {
			r.Log.WithField("volume", uuid).Warnf("the scheduled run that began at %s was interrupted", s.Started.Format(time.RFC3339))
			// Tried again after a rest, because the run may be what killed the process.
			r.put(uuid, r.failed(s, errors.New("interrupted: berthd ended meanwhile")))
			continue
		}
		r.set(uuid, s)
	}

	q := queue{running: make(map[string]bool)}
	results := make(chan result)
	for look := (time.Time{}); ctx.Err() == nil; {
		if !time.Now().Before(look) {
			r.look(&q)
			look = time.Now().Add(lookEvery)
		}
		timer := time.NewTimer(min(r.start(ctx, &q, results), time.Until(look)))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-r.wake:
			look = time.Time{}
		case end := <-results:
			r.end(ctx, end, &q)
		}
		timer.Stop()
	}
	for len(q.running) > 0 {
		r.end(ctx, <-results, &q)
	}
	return nil
}

// queue is what Run knows of the jobs between two looks at them.
type queue struct {
	// waiting are the jobs that do not run, the one that is due first at the front. Due
	// is when.
	waiting []Job
	running map[string]bool
}

// add puts a job into its place, behind those that are due at the same time.
func (q *queue) add(job Job) {
	i, _ := slices.BinarySearchFunc(q.waiting, job, func(a, b Job) int {
		if a.Due.After(b.Due) {
			return 1
		}
		return -1
	})
	q.waiting = slices.Insert(q.waiting, i, job)
}

// look asks which jobs there are and when they are due.
func (r *Runner) look(q *queue) {
	jobs := r.Jobs()
	if jobs == nil {
		return
	}
	r.forget(jobs)
	now := r.Now()
	q.waiting = q.waiting[:0]
	seen := make(map[string]bool, len(jobs))
	for _, job := range jobs {
		if job.Schedule.IsZero() || q.running[job.UUID] || seen[job.UUID] {
			continue
		}
		seen[job.UUID] = true
		if job.Due = r.plan(job, now); !job.Due.IsZero() {
			q.waiting = append(q.waiting, job)
		}
	}
	slices.SortStableFunc(q.waiting, func(a, b Job) int { return a.Due.Compare(b.Due) })
}

// start begins what is due and has a place, and returns how long nothing else is.
func (r *Runner) start(ctx context.Context, q *queue, results chan<- result) time.Duration {
	now := r.Now()
	for len(q.waiting) > 0 {
		job := q.waiting[0]
		if job.Due.After(now) {
			return job.Due.Sub(now)
		}
		if len(q.running) >= r.Concurrency {
			break // the end of one of them comes here again
		}
		q.waiting = q.waiting[1:]
		if last := job.Schedule.LastFor(job.UUID, now); !last.IsZero() {
			job.Due = last
		}
		s, _ := r.State(job.UUID)
		s.Started = now
		// On record before the first change: if the run kills this process, the next one
		// does not begin with it at once, over and over.
		r.put(job.UUID, s)
		q.running[job.UUID] = true
		go func() { results <- result{job, r.Do(ctx, job)} }()
	}
	return lookEvery
}

// plan gives when a job is due next, and stores that when it is news.
func (r *Runner) plan(job Job, now time.Time) time.Time {
	s, known := r.State(job.UUID)
	natural := job.Schedule.NextFor(job.UUID, now)
	switch {
	case !known, s.Schedule != job.Schedule.String():
		s.Schedule, s.Next, s.Failures = job.Schedule.String(), natural, 0
	case s.Next.IsZero() && !natural.IsZero():
		s.Next = natural
	case s.Next.After(natural) && s.Next.After(now.Add(retryFirst)):
		// The clock was set back.
		s.Next = natural
	default:
		return s.Next
	}
	r.put(job.UUID, s)
	return s.Next
}

// end notes how a run ended.
func (r *Runner) end(ctx context.Context, end result, q *queue) {
	uuid := end.job.UUID
	delete(q.running, uuid)
	s, ok := r.State(uuid)
	if !ok {
		return
	}
	if end.err != nil && ctx.Err() != nil {
		// It was told to stop. It is due still, when this is started again.
		s.Started = time.Time{}
		r.put(uuid, s)
		return
	}
	switch {
	case errors.Is(end.err, ErrElsewhere):
		s.Started, s.Next = time.Time{}, r.Now().Add(retryFirst)
		r.Log.WithField("volume", uuid).Debug(end.err)
	case end.err != nil:
		s = r.failed(s, end.err)
		natural := end.job.Schedule.NextFor(uuid, r.Now())
		if !natural.IsZero() && natural.Before(s.Next) {
			s.Next = natural
		}
		s.Next = later(s.Next, r.Now().Add(retryFirst))
		r.Log.WithField("volume", uuid).WithError(end.err).Warnf("scheduled run failed, %d in a row; the next try is at %s", s.Failures, s.Next.UTC().Format(time.RFC3339))
	default:
		s.Last, s.Success, s.Started = s.Started, s.Started, time.Time{}
		s.Error, s.Failures = "", 0
		// From now, not from the start: what it has overlapped is left out.
		s.Next = end.job.Schedule.NextFor(uuid, r.Now())
	}
	r.put(uuid, s)
	if !s.Next.IsZero() {
		end.job.Due = s.Next
		q.add(end.job)
	}
}

// failed is the state after a run that failed now.
func (r *Runner) failed(s State, err error) State {
	s.Last, s.Started = s.Started, time.Time{}
	s.Failures++
	s.Error = err.Error()
	if len(s.Error) > maxError {
		s.Error = strings.ToValidUTF8(s.Error[:maxError], "") + "…"
	}
	pause := retryMost
	if shift := s.Failures - 1; shift < 6 { // 2^6 minutes are more than an hour
		pause = retryFirst << shift
	}
	s.Next = r.Now().Add(pause)
	return s
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// forget drops the states of volumes that have no job. One that runs still is
// forgotten too: its end finds no state, and is the end of it.
func (r *Runner) forget(jobs []Job) {
	there := make(map[string]bool, len(jobs))
	for _, job := range jobs {
		there[job.UUID] = !job.Schedule.IsZero()
	}
	r.mu.Lock()
	var gone []string
	for uuid := range r.states {
		if !there[uuid] {
			gone = append(gone, uuid)
			delete(r.states, uuid)
		}
	}
	r.mu.Unlock()
	for _, uuid := range gone {
		if err := r.Store.Delete(uuid); err != nil {
			r.Log.WithField("volume", uuid).WithError(err).Warn("forget when scheduled runs were")
		}
	}
}

// set changes what is remembered.
func (r *Runner) set(uuid string, s State) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.states[uuid] = s
}

// put changes it and stores it.
func (r *Runner) put(uuid string, s State) {
	r.set(uuid, s)
	if err := r.Store.Put(uuid, s); err != nil {
		r.Log.WithField("volume", uuid).WithError(err).Warn("store when scheduled runs are")
	}
}
