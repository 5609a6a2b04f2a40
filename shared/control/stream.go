package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
)

// streamType is the Content-Type of an answer in lines. A call that fails or ends
// before there is anything to tell has an ordinary answer.
const streamType = "application/x-ndjson"

// errStopping ends calls that would go on for long while the daemon ends.
var errStopping = errors.New("berthd is stopping; try again")

// A line of an answer has one of Progress, Result and Kind. The last two are in the
// last line, Kind with the text of the error.
type line struct {
	Progress *Progress       `json:",omitempty"`
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
		r = r.WithContext(ctx)
		if err := readBody(w, r); err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		out := &lines{w: w, pause: s.pause, beat: s.beat}
		answer, err := out.follow(cancel, func(progress func(Progress)) (any, error) {
			return s.guarded(r, func(r *http.Request) (any, error) { return serve(r, progress) })
		})
		if err != nil && errors.Is(context.Cause(ctx), errStopping) {
			err = fault.Unavailable("%w", errStopping)
		}
		if err != nil {
			s.log.WithError(err).WithField("path", r.URL.Path).WithField("kind", fault.Kind(err)).Debug("administration refused")
		}
		out.end(answer, err)
	})
}

// lines are the lines of one answer.
type lines struct {
	w           http.ResponseWriter
	pause, beat time.Duration
	begun       bool
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
			if err := l.send(line{Progress: &p}); err != nil {
				cancel(err)
				<-done
				return answer, err
			}
			sent = now
		}
	}
}

// end sends the result. The client may have hung up; there is nobody to tell.
func (l *lines) end(answer any, err error) {
	switch {
	case !l.begun && err != nil:
		refuse(l.w, statusOf(err), err)
	case !l.begun:
		reply(l.w, http.StatusOK, answer)
	case err != nil:
		_ = l.send(line{Err: err.Error(), Kind: fault.Kind(err)})
	default:
		text, err := json.Marshal(answer)
		if err != nil {
			// The answers are structs of this package.
			panic(fmt.Sprintf("encode %T: %v", answer, err))
		}
		_ = l.send(line{Result: text})
	}
}

func (l *lines) send(one line) error {
	text, err := json.Marshal(one)
	if err != nil {
		return fmt.Errorf("encode a line: %w", err)
	}
	if !l.begun {
		l.w.Header().Set("Content-Type", streamType)
		l.begun = true
	}
	conn := http.NewResponseController(l.w)
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout)) // not every connection can
	defer func() { _ = conn.SetWriteDeadline(time.Time{}) }()
	if _, err := l.w.Write(append(text, '\n')); err != nil {
		return err
	}
	return conn.Flush()
}
