package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A Recorder is a plugin socket that passes every call on to another one and
// writes down what was said, one JSON object per line (RecordedCall).
type Recorder struct {
	// To is the socket of the real plugin.
	To string
	// Log gets the lines.
	Log io.Writer

	mu sync.Mutex
}

// A RecordedCall is one RPC of dockerd and its answer. Bodies are the exact text.
type RecordedCall struct {
	Method  string
	Headers map[string][]string
	Body    string
	Status  int
	Answer  string
}

// Serve accepts on the listener until it is closed.
func (r *Recorder) Serve(l net.Listener) error {
	err := http.Serve(l, r)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// ServeHTTP passes one call on.
func (r *Recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	call, err := r.forward(req)
	if err != nil {
		http.Error(w, `{"Err":"recorder: `+err.Error()+`"}`, http.StatusBadGateway)
		return
	}
	r.mu.Lock()
	err = json.NewEncoder(r.Log).Encode(call)
	r.mu.Unlock()
	if err != nil {
		fmt.Fprintln(os.Stderr, "recorder:", err)
	}
	w.Header().Set("Content-Type", "application/vnd.docker.plugins.v1.2+json")
	w.WriteHeader(call.Status)
	_, _ = io.WriteString(w, call.Answer)
}

func (r *Recorder) forward(req *http.Request) (RecordedCall, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return RecordedCall{}, err
	}
	out, err := http.NewRequestWithContext(req.Context(), req.Method, "http://plugin"+req.URL.Path, bytes.NewReader(body))
	if err != nil {
		return RecordedCall{}, err
	}
	out.Header = req.Header.Clone()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", r.To)
	}}
	resp, err := transport.RoundTrip(out)
	if err != nil {
		return RecordedCall{}, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return RecordedCall{
		Method: req.URL.Path, Headers: req.Header, Body: string(body), Status: resp.StatusCode, Answer: string(answer),
	}, err
}

// Record starts a Recorder inside the host: dockerd reaches it at the socket
// listen (below /run/docker/plugins), it reaches the plugin at the socket to. The
// calls are in the returned file.
func (h *Host) Record(ctx context.Context, listen, to string) (string, error) {
	name := "record-" + filepath.Base(listen)
	log := filepath.Join(h.Dir, "log", name+".jsonl")
	_, err := call(ctx, h.Dir, request{
		Op: "start", Name: name, Restart: true, Log: filepath.Join(h.Dir, "log", name+".log"),
		Argv: []string{"/proc/1/exe", proxyName, listen, to, log},
	})
	if err != nil {
		return "", err
	}
	return log, h.eventually(ctx, 5*time.Second, "test", "-S", listen)
}

// proxyMain is the Recorder's process: socket, real socket, file.
func proxyMain() {
	err := errors.New("want a socket, the real socket and a file")
	if len(os.Args) == 4 {
		err = proxy(context.Background(), os.Args[1], os.Args[2], os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func proxy(ctx context.Context, listen, to, file string) error {
	log, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	if err := os.Remove(listen); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "unix", listen)
	if err != nil {
		return err
	}
	return (&Recorder{To: to, Log: log}).Serve(l)
}
