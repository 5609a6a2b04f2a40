package pluginapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// maxBody bounds a request. The largest that dockerd sends are port maps,
	// about 200 bytes for each published port, twice.
	maxBody = 16 << 20
	// readTimeout bounds the reading of a body that is on the way.
	readTimeout = 10 * time.Second
)

// errEmptyBody refuses a repeated delivery: dockerd's HTTP client repeats a call
// whose connection broke, without the body. The first delivery may have done its
// work.
var errEmptyBody = fault.Invalid("request body is empty: the connection broke in an earlier delivery of this call and its result is unknown; repeat the command")

// A route is one call of the protocol to a driver D.
type route[D, Req, Resp any] struct {
	method string
	// bare calls have no parameters; their body is not looked at.
	bare bool
	// quiet calls come several times for each container or volume; they are
	// logged at debug level when they succeed.
	quiet bool
	// fields name the objects of the request in the log.
	fields func(*Req) logrus.Fields
	serve  func(D, context.Context, *Req) (*Resp, error)
	// refuse writes an error; nil is refuseStatus.
	refuse func(http.ResponseWriter, error)
}

// register adds a route that service's driver serves.
func register[D, Req, Resp any](s *Server, service *Service[D], r route[D, Req, Resp]) {
	if r.refuse == nil {
		r.refuse = refuseStatus
	}
	s.handler.HandleFunc("/"+r.method, func(w http.ResponseWriter, hr *http.Request) {
		if !s.begin() {
			w.Header().Set("Connection", "close")
			r.refuse(w, fault.Unavailable("berthd is stopping; try again"))
			return
		}
		defer s.end()
		start := time.Now()
		fields := logrus.Fields{"method": r.method}
		resp, err := r.answer(s, service, w, hr, fields)
		s.record(r.method, r.quiet, fields, err, time.Since(start))
		if err != nil {
			r.refuse(w, err)
			return
		}
		reply(w, http.StatusOK, resp)
	})
}

// answer decodes the request, waits for the driver and calls it.
func (r route[D, Req, Resp]) answer(s *Server, service *Service[D], w http.ResponseWriter, hr *http.Request, fields logrus.Fields) (*Resp, error) {
	if hr.Method != http.MethodPost {
		return nil, fault.Invalid("%s: want POST, got %s", r.method, hr.Method)
	}
	req := new(Req)
	if !r.bare {
		var err error
		if req, err = decode[Req](w, hr); err != nil {
			return nil, err
		}
		if r.fields != nil {
			for name, value := range r.fields(req) {
				if value != "" {
					fields[name] = value
				}
			}
		}
	}

	ctx, cancel := context.WithTimeout(hr.Context(), s.timeout)
	defer cancel()
	driver, err := service.wait(ctx)
	if err != nil {
		return nil, err
	}
	type result struct {
		resp *Resp
		err  error
	}
	// The driver has a goroutine of its own: when a system call holds it beyond
	// its deadline, dockerd gets an answer all the same.
	done := make(chan result, 1)
	go func() {
		var res result
		defer func() {
			if p := recover(); p != nil {
				s.log.WithFields(fields).WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
				res = result{err: fmt.Errorf("internal error in %s, see the plugin's log", r.method)}
			}
			done <- res
		}()
		res.resp, res.err = r.serve(driver, ctx, req)
		if res.err == nil && res.resp == nil {
			res.err = fmt.Errorf("%s gave no answer", r.method)
		}
	}()
	select {
	case res := <-done:
		return res.resp, res.err
	case <-ctx.Done():
	}
	select {
	case res := <-done:
		return res.resp, res.err
	case <-time.After(grace):
		return nil, fmt.Errorf("%s did not finish within %s: %w", r.method, s.timeout, ctx.Err())
	}
}

// decode reads one JSON object. Unknown fields are left alone, since newer
// engines send more.
func decode[Req any](w http.ResponseWriter, hr *http.Request) (*Req, error) {
	// Only the body is under this deadline: on a connection that has one, net/http
	// would cancel the context of a call that takes longer.
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Now().Add(readTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, fmt.Errorf("read request: %w", err)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, hr.Body, maxBody))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return nil, fault.Invalid("request body: want at most %d bytes", maxBody)
		}
		return nil, fault.Invalid("read request body: %w", err)
	}
	if err := control.SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, fmt.Errorf("read request: %w", err)
	}
	return decodeBody[Req](body)
}

func decodeBody[Req any](body []byte) (*Req, error) {
	if len(body) == 0 {
		return nil, errEmptyBody
	}
	var req *Req
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, fault.Invalid("request body: %w", err)
	}
	if req == nil {
		return nil, fault.Invalid("request body is null; want a JSON object")
	}
	return req, nil
}

// record writes the one log line of a call and counts it.
func (s *Server) record(method string, quiet bool, fields logrus.Fields, err error, took time.Duration) {
	kind := fault.Kind(err)
	s.total.WithLabelValues(method, kind).Inc()
	s.seconds.WithLabelValues(method).Observe(took.Seconds())
	if quiet && kind == "ok" && !s.log.Logger.IsLevelEnabled(logrus.DebugLevel) {
		return // there are many of these
	}
	entry := s.log.WithFields(fields).WithFields(logrus.Fields{"kind": kind, "duration": took.Round(time.Microsecond).String()})
	switch kind {
	case "ok":
		if quiet {
			entry.Debug("answered")
		} else {
			entry.Info("answered")
		}
	case "internal", "timeout":
		entry.WithError(err).Error("failed")
	default:
		entry.WithError(err).Warn("refused")
	}
}

// refuseStatus answers network and IPAM calls: the kind as the status, the text
// in Err, which all engines show.
func refuseStatus(w http.ResponseWriter, err error) {
	reply(w, statusOf(err), errorBody{Err: err.Error()})
}

// refuseInBody answers volume calls: dockerd documents status 200 for them.
func refuseInBody(w http.ResponseWriter, err error) {
	reply(w, http.StatusOK, errorBody{Err: err.Error()})
}

// refuseOnlyMissing answers VolumeDriver.Get. dockerd takes every error in an
// answer for "no such volume", forgets the volume and makes an empty local one of
// that name at the next run. So only a certain "no" is answered; for all else the
// connection is cut, also for the repeated deliveries that follow, which dockerd
// takes for a driver that does not respond.
func refuseOnlyMissing(w http.ResponseWriter, err error) {
	certain := errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err)
	if certain && !errors.Is(err, errEmptyBody) {
		refuseInBody(w, err)
		return
	}
	panic(http.ErrAbortHandler)
}
