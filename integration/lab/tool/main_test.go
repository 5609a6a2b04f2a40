package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// freePort is a port of the loopback that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	assert.NilError(t, err)
	return port
}

// asked runs ask and returns what it prints.
func asked(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	assert.NilError(t, err)
	defer out.Close()
	stdout := os.Stdout
	os.Stdout = out
	defer func() { os.Stdout = stdout }()
	err = ask(args)
	text, readErr := os.ReadFile(out.Name())
	assert.NilError(t, readErr)
	return string(text), err
}

func TestAskAndPeer(t *testing.T) {
	plain, named, echo, sink, source := freePort(t), freePort(t), freePort(t), freePort(t), freePort(t)
	t.Setenv("WHO", "srv")
	go func() {
		_ = peer([]string{plain, named + "=as:other", echo + "=echo", sink + "=sink", source + "=source:1000000"})
	}()
	// The last port is there when all are.
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := asked(t, "-receive", "127.0.0.1:"+source); err == nil {
			break
		}
	}

	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"tcp":     {[]string{"127.0.0.1:" + plain}, "srv 127.0.0.1\n"},
		"udp":     {[]string{"-u", "127.0.0.1:" + plain}, "srv 127.0.0.1\n"},
		"from":    {[]string{"-from", "127.0.0.9:0", "127.0.0.1:" + named}, "other 127.0.0.9\n"},
		"hold":    {[]string{"-hold", "120ms", "127.0.0.1:" + echo}, " lines\n"},
		"send":    {[]string{"-send", "100000", "127.0.0.1:" + sink}, " kbit/s\n"},
		"receive": {[]string{"-receive", "127.0.0.1:" + source}, " kbit/s\n"},
	} {
		got, err := asked(t, c.args...)
		assert.NilError(t, err, name)
		assert.Assert(t, strings.HasSuffix(got, c.want), "%s: got %q, want %q", name, got, c.want)
	}
	_, err := asked(t, "-t", "100ms", "127.0.0.1:"+echo)
	assert.ErrorContains(t, err, "timeout")
	_, err = asked(t, "127.0.0.1:"+freePort(t))
	assert.ErrorContains(t, err, "refused")
	assert.ErrorContains(t, peer([]string{freePort(t) + "=bagpipe"}), "bagpipe")
}
