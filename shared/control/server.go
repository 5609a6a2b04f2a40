package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// maxRequest bounds a request's body, in bytes.
	maxRequest = 1 << 20
	// requestTimeout bounds a request; the removal of a network with a thousand
	// endpoints takes seconds.
	requestTimeout = time.Minute
	// readTimeout bounds the reading of a body that is on the way.
	readTimeout = 10 * time.Second
)

// A Config is what a Server tells and where it asks.
type Config struct {
	// Info holds what does not change. GoVersion, PID and Started are filled in
	// when empty; Services name what the daemon serves, and their states are
	// ServiceStarting until told.
	Info Info
	// Checks look at the host, whether or not a service runs. They are called
	// concurrently.
	Checks []func(context.Context) []Finding
	// Metrics answers GET .../metrics.
	Metrics http.Handler
	Log     *logrus.Entry
}

// A Server is the http.Handler of all paths below Prefix. It answers before the
// services are ready and when they cannot start: that is when it is needed. All
// methods may be called concurrently.
type Server struct {
	mux    *http.ServeMux
	checks []func(context.Context) []Finding
	log    *logrus.Entry
	// stopping is closed when calls that take long are to end.
	stopping chan struct{}
	stop     sync.Once
	// pause and beat are progressPause and heartbeat but in tests.
	pause, beat time.Duration

	mu      sync.Mutex // guards all following fields
	info    Info
	network Networks
	volume  VolumeAdmin
}

// New returns a Server of a daemon whose services are starting.
func New(cfg Config) *Server {
	s := &Server{mux: http.NewServeMux(), checks: cfg.Checks, log: cfg.Log, info: cfg.Info, stopping: make(chan struct{}), pause: progressPause, beat: heartbeat}
	if s.info.Started.IsZero() {
		s.info.Started = time.Now()
	}
	if s.info.GoVersion == "" {
		s.info.GoVersion = runtime.Version()
	}
	if s.info.PID == 0 {
		s.info.PID = os.Getpid()
	}
	s.info.Services = slices.Clone(cfg.Info.Services)
	for i := range s.info.Services {
		service := &s.info.Services[i]
		service.State, service.Reason, service.Since = ServiceStarting, "", s.info.Started
	}

	get := func(path string, serve func(*http.Request) (any, error)) {
		s.handle(http.MethodGet, path, serve)
	}
	get(pathInfo, func(*http.Request) (any, error) { return s.currentInfo(), nil })
	get(pathDoctor, func(r *http.Request) (any, error) { return s.findings(r.Context()), nil })
	get(pathNetworks, func(r *http.Request) (any, error) {
		n, err := s.networks()
		if err != nil {
			return nil, err
		}
		return list(n.Networks(r.Context()))
	})
	get(pathNetworks+"/{id}", func(r *http.Request) (any, error) {
		n, err := s.networks()
		if err != nil {
			return nil, err
		}
		return n.Network(r.Context(), r.PathValue("id"))
	})
	s.handle(http.MethodDelete, pathNetworks+"/{id}", s.removeNetwork)
	get(pathEndpoints, func(r *http.Request) (any, error) { return list(s.endpoints(r)) })
	s.handle(http.MethodPost, pathCollect, s.collect)
	get(pathPorts, func(r *http.Request) (any, error) {
		endpoints, err := s.endpoints(r)
		var ports []Port
		for _, ep := range endpoints {
			ports = append(ports, ep.Ports...)
		}
		return list(ports, err)
	})
	get(pathLeases, func(r *http.Request) (any, error) {
		n, err := s.networks()
		if err != nil {
			return nil, err
		}
		return list(n.Leases(r.Context(), r.URL.Query().Get("network")))
	})
	s.handle(http.MethodPost, pathReserve, s.reserve)
	s.handle(http.MethodPost, pathRelease, s.release)
	get(pathPools, func(r *http.Request) (any, error) {
		n, err := s.networks()
		if err != nil {
			return nil, err
		}
		return list(n.Pools(r.Context()))
	})
	s.routeVolumes()
	if cfg.Metrics != nil {
		s.mux.Handle(http.MethodGet+" "+Prefix+version+"/"+pathMetrics, cfg.Metrics)
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, fault.Invalid("berthd does not know %s %s", r.Method, r.URL.Path))
	})
	return s
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// SetNetworks tells that the network service is ready.
func (s *Server) SetNetworks(n Networks) {
	s.mu.Lock()
	s.network = n
	s.mu.Unlock()
	s.setState(NetworkService, ServiceReady, "")
}

// Ready tells that a service is ready that has nothing to administer.
func (s *Server) Ready(service string) { s.setState(service, ServiceReady, "") }

// Refuse tells why a service cannot start.
func (s *Server) Refuse(service string, reason error) {
	s.setState(service, ServiceRefusing, reason.Error())
}

// State returns a service's state; "" for one that the daemon does not have.
func (s *Server) State(service string) ServiceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, have := range s.info.Services {
		if have.Name == service {
			return have.State
		}
	}
	return ""
}

func (s *Server) setState(service string, state ServiceState, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.info.Services {
		have := &s.info.Services[i]
		if have.Name == service && (have.State != state || have.Reason != reason) {
			have.State, have.Reason, have.Since = state, reason, time.Now()
		}
	}
}

func (s *Server) currentInfo() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	info := s.info
	info.Services = slices.Clone(info.Services)
	return info
}

// networks returns the network service, or why there is none.
func (s *Server) networks() (Networks, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.network != nil {
		return s.network, nil
	}
	for _, service := range s.info.Services {
		if service.Name != NetworkService {
			continue
		}
		if service.State == ServiceRefusing {
			return nil, fault.Unavailable("the network service cannot start: %s", service.Reason)
		}
		return nil, fault.Unavailable("the network service is still starting; try again")
	}
	return nil, fault.Unavailable("this Berth daemon serves no networks")
}

func (s *Server) endpoints(r *http.Request) ([]Endpoint, error) {
	n, err := s.networks()
	if err != nil {
		return nil, err
	}
	return n.Endpoints(r.Context(), r.URL.Query().Get("network"))
}

func (s *Server) removeNetwork(r *http.Request) (any, error) {
	n, err := s.networks()
	if err != nil {
		return nil, err
	}
	id := r.PathValue("id")
	if err := n.RemoveNetwork(r.Context(), id); err != nil {
		return nil, err
	}
	s.log.WithField("network", id).Warn("network removed by an operator")
	return struct{}{}, nil
}

func (s *Server) collect(r *http.Request) (any, error) {
	var req CollectRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	n, err := s.networks()
	if err != nil {
		return nil, err
	}
	return n.Collect(r.Context(), req)
}

func (s *Server) reserve(r *http.Request) (any, error) {
	var req ReserveRequest
	err := decode(r.Body, &req)
	if err == nil {
		req.Addr, err = leaseAddr(req.Network, req.Addr)
	}
	if err == nil {
		req.Key, err = LeaseKey(req.Key)
	}
	if err != nil {
		return nil, err
	}
	n, err := s.networks()
	if err != nil {
		return nil, err
	}
	lease, err := n.ReserveLease(r.Context(), req)
	if err != nil {
		return nil, err
	}
	s.log.WithFields(logrus.Fields{"network": req.Network, "address": req.Addr, "key": req.Key}).Info("address reserved by an operator")
	return lease, nil
}

func (s *Server) release(r *http.Request) (any, error) {
	var req ReleaseRequest
	err := decode(r.Body, &req)
	if err == nil {
		req.Addr, err = leaseAddr(req.Network, req.Addr)
	}
	if err != nil {
		return nil, err
	}
	n, err := s.networks()
	if err != nil {
		return nil, err
	}
	lease, err := n.ReleaseLease(r.Context(), req)
	if err != nil {
		return nil, err
	}
	s.log.WithFields(logrus.Fields{"network": req.Network, "address": req.Addr, "state": lease.State}).Info("address released by an operator")
	return lease, nil
}

// handle adds a call. What it serves is sent as JSON.
func (s *Server) handle(method, path string, serve func(*http.Request) (any, error)) {
	s.mux.HandleFunc(method+" "+Prefix+version+"/"+path, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		r = r.WithContext(ctx)
		err := readBody(w, r)
		var answer any
		if err == nil {
			answer, err = s.guarded(r, serve)
		}
		if err != nil {
			s.log.WithError(err).WithFields(logrus.Fields{"path": r.URL.Path, "kind": fault.Kind(err)}).Debug("administration refused")
			refuse(w, statusOf(err), err)
			return
		}
		reply(w, http.StatusOK, answer)
	})
}

// guarded calls serve and makes an error of a panic: the daemon is worth more than
// the answer.
func (s *Server) guarded(r *http.Request, serve func(*http.Request) (any, error)) (answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.WithFields(logrus.Fields{"path": r.URL.Path, "stack": string(debug.Stack())}).Errorf("panic: %v", p)
			err = fmt.Errorf("internal error in %s, see the plugin's log", r.URL.Path)
		}
	}()
	return serve(r)
}

// list makes an empty list of none, which JSON tells apart.
func list[T any](items []T, err error) (any, error) {
	if items == nil {
		items = []T{}
	}
	return items, err
}

// readBody puts the whole body into the request. A client that stops sending must
// not keep the daemon from ending, and net/http cancels the context of a request
// that goes on under a deadline for reading, so only this is under one.
func readBody(w http.ResponseWriter, r *http.Request) error {
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(readTimeout)) // not every connection can
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	_ = control.SetReadDeadline(time.Time{})
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return fault.Invalid("request body: want at most %d bytes", maxRequest)
	case err != nil:
		return fault.Invalid("read request body: %w", err)
	}
	r.Body = io.NopCloser(bytes.NewReader(text))
	return nil
}

// decode reads one JSON object; fields that are not known are passed over.
func decode(body io.Reader, into any) error {
	text, err := io.ReadAll(body)
	if err != nil {
		return fault.Invalid("read request body: %w", err)
	}
	if text = bytes.Trim(text, " \t\r\n"); len(text) == 0 || text[0] != '{' {
		return fault.Invalid("request body: want a JSON object")
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fault.Invalid("request body: %w", err)
	}
	return nil
}

// errorBody is an error on the wire. Err has the name that Docker's plugin
// protocol uses.
type errorBody struct {
	Err, Kind string
}

func refuse(w http.ResponseWriter, status int, err error) {
	reply(w, status, errorBody{Err: err.Error(), Kind: fault.Kind(err)})
}

// statusOf is for people who use curl; Client reads the Kind.
func statusOf(err error) int {
	switch fault.Kind(err) {
	case "invalid":
		return http.StatusBadRequest
	case "notfound":
		return http.StatusNotFound
	case "conflict":
		return http.StatusConflict
	case "exhausted":
		return http.StatusInsufficientStorage
	case "unavailable", "timeout":
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

func reply(w http.ResponseWriter, status int, body any) {
	text, err := json.Marshal(body)
	if err != nil {
		// The answers are structs of this package.
		panic(fmt.Sprintf("encode %T: %v", body, err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)+1))
	w.WriteHeader(status)
	// The client may have hung up; there is nobody to tell.
	_, _ = w.Write(append(text, '\n'))
}
