package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// progressPause is the shortest time between two lines of progress.
	progressPause = 200 * time.Millisecond
	// heartbeat is the longest time without a line: it tells the two sides that the
	// other one is there.
	heartbeat = 5 * time.Second
	// writeTimeout bounds the sending of a line to a client that does not read.
	writeTimeout = 30 * time.Second
	// exportTimeout is the same for a client that gets an archive.
	exportTimeout = 10 * time.Minute
	// partingTimeout bounds the sending of what comes after the end of a call's context.
	partingTimeout = 2 * time.Second
)

// streamType is the Content-Type of an answer in lines. A call that fails or ends
// before there is anything to tell has an ordinary answer.
const streamType = "application/x-ndjson"

// errStopping ends calls that would go on for long while the daemon ends.
var errStopping = errors.New("berthd is stopping; try again")

// A line of an answer has one of Progress, Data, Result and Kind. After a line with Data
// come so many bytes of an archive. The last two are in the last line, Kind with the
// text of the error.
type line struct {
	Progress *Progress       `json:",omitempty"`
	Data     int             `json:",omitempty"`
	Result   json.RawMessage `json:",omitempty"`
	Err      string          `json:",omitempty"`
	Kind     string          `json:",omitempty"`
}

// Stop ends calls that take long, now and in the future: what they began is undone.
// It does not wait. A daemon calls it before it waits for its requests.
func (s *Server) Stop() { s.stop.Do(func() { close(s.stopping) }) }

// stream adds a POST that may take long. The answer is one line of JSON for each
// bit of progress and a last one with what serve returned.
func (s *Server) stream(path string, serve func(*http.Request, func(Progress)) (any, error)) {
	s.handleLong(path, func(w http.ResponseWriter, r *http.Request) {
		if err := readBody(w, r); err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		s.answer(w, r, writeTimeout, func(r *http.Request, _ io.Writer, progress func(Progress)) (any, error) { return serve(r, progress) })
	})
}

// handleLong adds a POST whose context ends when the server stops.
func (s *Server) handleLong(path string, serve http.HandlerFunc) {
	s.mux.HandleFunc(http.MethodPost+" "+Prefix+version+"/"+path, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		go func() {
			select {
			case <-s.stopping:
				cancel(errStopping)
			case <-ctx.Done():
			}
		}()
		serve(w, r.WithContext(ctx))
	})
}

// answer sends in lines what serve tells, writes and returns. patience is how long a
// line may take.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, patience time.Duration, serve func(*http.Request, io.Writer, func(Progress)) (any, error)) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	r = r.WithContext(ctx)
	out := &lines{ctx: ctx, w: w, pause: s.pause, beat: s.beat, patience: patience}
	// A line that is being sent does not wait for its client as long as it would.
	defer context.AfterFunc(ctx, out.limit)()
	answer, err := out.follow(cancel, func(progress func(Progress)) (any, error) {
		return s.guarded(r, func(r *http.Request) (any, error) { return serve(r, out, progress) })
	})
	if err != nil && errors.Is(context.Cause(ctx), errStopping) {
		err = fault.Unavailable("%w", errStopping)
	}
	if err != nil {
		s.log.WithError(err).WithField("path", r.URL.Path).WithField("kind", fault.Kind(err)).Debug("administration refused")
	}
	out.end(answer, err)
}

// lines are the lines of one answer. Progress and the parts of an archive may come from
// two goroutines.
type lines struct {
	ctx         context.Context //nolint:containedctx // of one request
	w           http.ResponseWriter
	pause, beat time.Duration
	// patience is how long a line may take until ctx ends.
	patience time.Duration

	sending      sync.Mutex // held while a line is sent; guards begun and ended
	begun, ended bool
	deadline     sync.Mutex // guards the connection's deadline
}

// errEnded is for what writes to an answer that has been given.
var errEnded = errors.New("the request has been answered")

// Write sends a part of an archive.
func (l *lines) Write(part []byte) (int, error) {
	if len(part) == 0 {
		return 0, nil
	}
	if l.ctx.Err() != nil {
		return 0, context.Cause(l.ctx)
	}
	if err := l.send(line{Data: len(part)}, part); err != nil {
		return 0, err
	}
	return len(part), nil
}

// follow runs work and sends its progress. Work that nobody waits for any more is
// cancelled, and has ended when follow returns.
func (l *lines) follow(cancel context.CancelCauseFunc, work func(func(Progress)) (any, error)) (answer any, err error) {
	var mu sync.Mutex // guards latest and fresh
	var latest Progress
	var fresh bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		answer, err = work(func(p Progress) {
			mu.Lock()
			defer mu.Unlock()
			latest, fresh = p, true
		})
	}()
	tick := time.NewTicker(l.pause)
	defer tick.Stop()
	sent := time.Now()
	for {
		select {
		case <-done:
			return answer, err
		case now := <-tick.C:
			mu.Lock()
			p, due := latest, fresh || now.Sub(sent) >= l.beat
			fresh = false
			mu.Unlock()
			if !due {
				continue
			}
			if err := l.send(line{Progress: &p}, nil); err != nil {
				cancel(err)
				<-done
				return answer, err
			}
			sent = now
		}
	}
}

// end sends the result. The client may have hung up; there is nobody to tell. Work that
// was given up can write nothing after it.
func (l *lines) end(answer any, err error) {
	l.sending.Lock()
	defer l.sending.Unlock()
	defer func() { l.ended = true }()
	switch {
	case !l.begun && err != nil:
		refuse(l.w, statusOf(err), err)
	case !l.begun:
		reply(l.w, http.StatusOK, answer)
	case err != nil:
		_ = l.put(line{Err: err.Error(), Kind: fault.Kind(err)}, nil)
	default:
		text, err := json.Marshal(answer)
		if err != nil {
			// The answers are structs of this package.
			panic(fmt.Sprintf("encode %T: %v", answer, err))
		}
		_ = l.put(line{Result: text}, nil)
	}
}

// send sends a line and the bytes that it announces.
func (l *lines) send(one line, part []byte) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	if l.ended {
		return errEnded
	}
	return l.put(one, part)
}

// put is send for who holds l.sending.
func (l *lines) put(one line, part []byte) error {
	text, err := json.Marshal(one)
	if err != nil {
		return fmt.Errorf("encode a line: %w", err)
	}
	if !l.begun {
		l.w.Header().Set("Content-Type", streamType)
		l.begun = true
	}
	l.limit()
	conn := http.NewResponseController(l.w)
	defer func() { _ = conn.SetWriteDeadline(time.Time{}) }()
	if _, err := l.w.Write(append(text, '\n')); err != nil {
		return err
	}
	if len(part) > 0 {
		if _, err := l.w.Write(part); err != nil {
			return err
		}
	}
	return conn.Flush()
}

// limit sets the time until which what is being sent must be sent.
func (l *lines) limit() {
	l.deadline.Lock()
	defer l.deadline.Unlock()
	patience := l.patience
	if l.ctx.Err() != nil {
		patience = partingTimeout
	}
	_ = http.NewResponseController(l.w).SetWriteDeadline(time.Now().Add(patience)) // not every connection can
}
