package pluginapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/sdk"
	"github.com/docker/go-plugins-helpers/volume"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// DefaultTimeout is a driver's deadline. dockerd's own, where it has one, is
	// 30 s; after that it repeats the call with an empty body.
	DefaultTimeout = 25 * time.Second
	// grace is what a driver gets beyond its deadline before the answer is sent
	// without it: a driver may be stuck in a system call that no context ends.
	grace = 2 * time.Second
)

// Config says what a Server offers. Services that are nil are not offered.
type Config struct {
	Network *Service[NetworkDriver]
	IPAM    *Service[IPAMDriver]
	Volume  *Service[VolumeDriver]

	// What dockerd asks when it registers a driver. These answers never wait: a
	// driver that does not give them while dockerd starts stays unregistered.
	NetworkCapabilities NetworkCapabilities
	IPAMCapabilities    IPAMCapabilities
	AddressSpaces       ipam.AddressSpacesResponse
	VolumeCapabilities  volume.Capability

	// Extra are handlers of other things than Docker's calls, by the path prefix
	// that they serve, with a "/" at both ends. Shutdown waits for their requests
	// as for Docker's, but may cut the end of an answer whose length was not said;
	// deadlines are their own affair.
	Extra map[string]http.Handler

	Log *logrus.Entry
	// Metrics registers the counters of RPCs.
	Metrics prometheus.Registerer
	// Timeout of one call; 0 is DefaultTimeout.
	Timeout time.Duration
}

// A Server answers dockerd on one socket for all drivers of a Config.
type Server struct {
	handler sdk.Handler
	log     *logrus.Entry
	timeout time.Duration
	total   *prometheus.CounterVec
	seconds *prometheus.HistogramVec

	mu       sync.Mutex // guards all following fields
	listener net.Listener
	conns    map[net.Conn]struct{}
	draining bool
	inFlight int
	idle     chan struct{} // closed when draining and nothing is in flight
}

// New returns a Server with the routes of every driver in cfg. The error is that
// of registering the metrics.
func New(cfg Config) (*Server, error) {
	s := &Server{
		log:     cfg.Log,
		timeout: cfg.Timeout,
		conns:   make(map[net.Conn]struct{}),
		idle:    make(chan struct{}),
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "berth_rpc_total", Help: "Calls from dockerd by method and kind of result.",
		}, []string{"method", "kind"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "berth_rpc_seconds", Help: "Duration of calls from dockerd by method.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}, []string{"method"}),
	}
	if s.timeout == 0 {
		s.timeout = DefaultTimeout
	}
	if err := errors.Join(cfg.Metrics.Register(s.total), cfg.Metrics.Register(s.seconds)); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}

	var manifest struct{ Implements []string }
	if cfg.Network != nil {
		manifest.Implements = append(manifest.Implements, "NetworkDriver")
	}
	if cfg.IPAM != nil {
		manifest.Implements = append(manifest.Implements, "IpamDriver")
	}
	if cfg.Volume != nil {
		manifest.Implements = append(manifest.Implements, "VolumeDriver")
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	s.handler = sdk.NewHandler(string(text))
	// A 404 tells dockerd that a call it can do without is not implemented.
	s.handler.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusNotFound, errorBody{Err: fmt.Sprintf("berth does not know the call %s", r.URL.Path)})
	})
	if cfg.Network != nil {
		s.routeNetwork(cfg.Network, cfg.NetworkCapabilities)
	}
	if cfg.IPAM != nil {
		s.routeIPAM(cfg.IPAM, cfg.IPAMCapabilities, cfg.AddressSpaces)
	}
	if cfg.Volume != nil {
		s.routeVolume(cfg.Volume, cfg.VolumeCapabilities)
	}
	for prefix, extra := range cfg.Extra {
		s.handler.HandleFunc(prefix, s.counted(extra))
	}
	return s, nil
}

// counted lets Shutdown wait for the handler's requests, and refuses them then.
func (s *Server) counted(handler http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.begin() {
			w.Header().Set("Connection", "close")
			refuseStatus(w, fault.Unavailable("berthd is stopping; try again"))
			return
		}
		defer s.end()
		handler.ServeHTTP(w, r)
		// It counts as answered when it is sent.
		_ = http.NewResponseController(w).Flush()
	}
}

// Serve answers on l until Shutdown and then returns nil. It is called once.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		return l.Close()
	}
	s.listener = l
	s.mu.Unlock()

	err := s.handler.Serve(&trackingListener{Listener: l, server: s})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return nil
	}
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}

// Shutdown stops accepting, waits until every running call is answered or ctx
// ends, and closes the connections. A connection that is cut during a call makes
// dockerd repeat it with an empty body, so it comes last.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	var err error
	if s.listener != nil {
		err = ignoreClosed(s.listener.Close())
	}
	if s.inFlight == 0 {
		s.closeIdleLocked()
	}
	s.mu.Unlock()

	select {
	case <-s.idle:
	case <-ctx.Done():
		err = errors.Join(err, fmt.Errorf("calls still running at shutdown: %w", ctx.Err()))
	}

	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, conn := range conns {
		err = errors.Join(err, ignoreClosed(conn.Close()))
	}
	return err
}

// begin counts a call in; it is false when the server is shutting down.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.inFlight++
	return true
}

func (s *Server) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight--
	if s.draining && s.inFlight == 0 {
		s.closeIdleLocked()
	}
}

func (s *Server) closeIdleLocked() {
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// trackingListener remembers its connections, because sdk.Handler keeps its
// http.Server, and with it the graceful shutdown, to itself.
type trackingListener struct {
	net.Listener
	server *Server
}

func (l *trackingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tracked := &trackedConn{Conn: conn, server: l.server}
	l.server.mu.Lock()
	defer l.server.mu.Unlock()
	l.server.conns[tracked] = struct{}{}
	return tracked, nil
}

type trackedConn struct {
	net.Conn
	server *Server
}

func (c *trackedConn) Close() error {
	c.server.mu.Lock()
	delete(c.server.conns, c)
	c.server.mu.Unlock()
	return c.Conn.Close()
}

// statusOf maps a kind to the HTTP status. dockerd shows the text and looks at
// no status but 404, which it takes for "call not implemented"; a network that is
// not found must not answer that.
func statusOf(err error) int {
	switch fault.Kind(err) {
	case "ok":
		return http.StatusOK
	case "invalid":
		return http.StatusBadRequest
	case "notfound":
		return http.StatusGone
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

type errorBody struct {
	Err string
}

// reply sends the whole answer before it returns, length first: a call counts as
// answered then, and Shutdown may close its connection.
func reply(w http.ResponseWriter, status int, body any) {
	text, err := json.Marshal(body)
	if err != nil {
		// The answers are structs of this package and of the helpers.
		panic(fmt.Sprintf("encode %T: %v", body, err))
	}
	w.Header().Set("Content-Type", sdk.DefaultContentTypeV1_1)
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	// dockerd may have hung up; there is nobody to tell.
	_, _ = w.Write(text)
	_ = http.NewResponseController(w).Flush()
}
