package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// dialTimeout bounds the connecting; the socket is of this host.
	dialTimeout = 5 * time.Second
	// answerTimeout is for calls whose context has no deadline.
	answerTimeout = requestTimeout + 5*time.Second
	// maxAnswer bounds an answer, in bytes: 100,000 endpoints.
	maxAnswer = 256 << 20
)

// A Client asks one daemon. Every error has the kind that the daemon gave it;
// unavailable is also a socket where no Berth answers. All methods may be called
// concurrently.
type Client struct {
	socket string
	http   *http.Client
	// silence is the constant but in tests.
	silence time.Duration
}

// NewClient returns a Client of the daemon that listens on a unix socket. It does
// not connect yet.
func NewClient(socket string) *Client {
	dialer := net.Dialer{Timeout: dialTimeout}
	return &Client{socket: socket, silence: silence, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Socket is the path that the Client connects to.
func (c *Client) Socket() string { return c.socket }

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info asks what the daemon is and how its services are.
func (c *Client) Info(ctx context.Context) (info Info, _ error) {
	return info, c.call(ctx, http.MethodGet, pathInfo, nil, &info)
}

// Networks lists all networks, the oldest first.
func (c *Client) Networks(ctx context.Context) (networks []Network, _ error) {
	return networks, c.call(ctx, http.MethodGet, pathNetworks, nil, &networks)
}

// Network asks for one network by its whole ID.
func (c *Client) Network(ctx context.Context, id string) (network Network, _ error) {
	return network, c.call(ctx, http.MethodGet, pathNetworks+"/"+url.PathEscape(id), nil, &network)
}

// RemoveNetwork is Networks.RemoveNetwork.
func (c *Client) RemoveNetwork(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, pathNetworks+"/"+url.PathEscape(id), nil, nil)
}

// Endpoints lists the endpoints of a network, or of all if that is "".
func (c *Client) Endpoints(ctx context.Context, network string) (endpoints []Endpoint, _ error) {
	return endpoints, c.call(ctx, http.MethodGet, pathEndpoints+inNetwork(network), nil, &endpoints)
}

// Collect is Networks.Collect.
func (c *Client) Collect(ctx context.Context, req CollectRequest) (report CollectReport, _ error) {
	return report, c.call(ctx, http.MethodPost, pathCollect, req, &report)
}

// Ports lists what the endpoints of a network publish, or of all if that is "".
func (c *Client) Ports(ctx context.Context, network string) (ports []Port, _ error) {
	return ports, c.call(ctx, http.MethodGet, pathPorts+inNetwork(network), nil, &ports)
}

// Leases lists the leases of a network, or of all if that is "".
func (c *Client) Leases(ctx context.Context, network string) (leases []Lease, _ error) {
	return leases, c.call(ctx, http.MethodGet, pathLeases+inNetwork(network), nil, &leases)
}

// ReserveLease is Networks.ReserveLease.
func (c *Client) ReserveLease(ctx context.Context, req ReserveRequest) (lease Lease, _ error) {
	return lease, c.call(ctx, http.MethodPost, pathReserve, req, &lease)
}

// ReleaseLease is Networks.ReleaseLease.
func (c *Client) ReleaseLease(ctx context.Context, req ReleaseRequest) (lease Lease, _ error) {
	return lease, c.call(ctx, http.MethodPost, pathRelease, req, &lease)
}

// Pools lists all pools, the oldest first.
func (c *Client) Pools(ctx context.Context) (pools []Pool, _ error) {
	return pools, c.call(ctx, http.MethodGet, pathPools, nil, &pools)
}

// Doctor asks for the findings about the host and the services.
func (c *Client) Doctor(ctx context.Context) (findings []Finding, _ error) {
	return findings, c.call(ctx, http.MethodGet, pathDoctor, nil, &findings)
}

// Metrics returns the metrics in Prometheus' text format.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	ctx, cancel := withDeadline(ctx)
	defer cancel()
	return c.do(ctx, http.MethodGet, pathMetrics, nil)
}

func inNetwork(id string) string {
	if id == "" {
		return ""
	}
	return "?" + url.Values{"network": {id}}.Encode()
}

// call sends a request, as JSON unless it is nil, and reads the answer unless it
// is nil.
func (c *Client) call(ctx context.Context, method, path string, request, answer any) error {
	ctx, cancel := withDeadline(ctx)
	defer cancel()
	var body io.Reader
	if request != nil {
		text, err := json.Marshal(request)
		if err != nil {
			return fmt.Errorf("encode %T: %w", request, err)
		}
		body = bytes.NewReader(text)
	}
	text, err := c.do(ctx, method, path, body)
	if err != nil || answer == nil {
		return err
	}
	return c.decode(text, answer)
}

func (c *Client) decode(text []byte, answer any) error {
	if err := json.Unmarshal(text, answer); err != nil {
		return fault.Unavailable("%s: not an answer of Berth: %w", c.socket, err)
	}
	return nil
}

func withDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, answerTimeout)
}

// do sends a request and returns the body of an answer that is no error.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) ([]byte, error) {
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return nil, c.unreachable(err)
	}
	defer resp.Body.Close()
	return c.read(resp, path)
}

// send sends a request. The caller closes the answer's body.
func (c *Client) send(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	// The host's name is of no use on a unix socket, but HTTP wants one.
	req, err := http.NewRequestWithContext(ctx, method, "http://berth"+Prefix+version+"/"+path, body)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", path, err)
	}
	switch body.(type) {
	case nil:
	case *upload:
		req.Header.Set("Content-Type", "application/octet-stream")
	default:
		req.Header.Set("Content-Type", "application/json")
	}
	return c.http.Do(req)
}

// read returns the body of an answer that is no error.
func (c *Client) read(resp *http.Response, path string) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, c.unreachable(err)
	}
	if len(text) > maxAnswer {
		return nil, fault.Exhausted("%s: the answer to %s is larger than %d bytes", c.socket, path, maxAnswer)
	}
	if resp.StatusCode == http.StatusOK {
		return text, nil
	}
	var refused errorBody
	err = json.Unmarshal(text, &refused)
	if refused.Kind == "" && refused.Err != "" && resp.StatusCode == http.StatusServiceUnavailable {
		refused.Kind = "unavailable" // the socket's other side, while it stops
	}
	if err != nil || refused.Kind == "" {
		return nil, fault.Unavailable("%s: what answers there is not Berth, or is older than this command (status %s)", c.socket, resp.Status)
	}
	return nil, ofKind(refused)
}

// unreachable is the error of a connection, without the URL, which says nothing.
func (c *Client) unreachable(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: no answer: %w", c.socket, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault.Unavailable("%s: permission denied; run the command as root", c.socket)
	case errors.Is(err, unix.ENOENT):
		return fault.Unavailable("%s: there is no such socket; is the plugin enabled?", c.socket)
	case errors.Is(err, unix.ECONNREFUSED):
		return fault.Unavailable("%s: nobody listens there any more; is berthd running?", c.socket)
	default:
		return fault.Unavailable("%s: %w", c.socket, err)
	}
}

// ofKind is the error that the daemon had.
func ofKind(refused errorBody) error {
	switch refused.Kind {
	case "invalid":
		return fault.Invalid("%s", refused.Err)
	case "notfound":
		return fault.NotFound("%s", refused.Err)
	case "conflict":
		return fault.Conflict("%s", refused.Err)
	case "exhausted":
		return fault.Exhausted("%s", refused.Err)
	case "unavailable":
		return fault.Unavailable("%s", refused.Err)
	case "timeout":
		return fmt.Errorf("%s: %w", refused.Err, context.DeadlineExceeded)
	default:
		return errors.New(refused.Err)
	}
}
