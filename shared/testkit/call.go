package testkit

import (
	"io"
	"net"
	"time"

	"gotest.tools/v3/assert"
)

// Serve answers TCP connections to port 80 of the namespace, of both families,
// with the address that they come from, until the test ends.
func (n *Netns) Serve() {
	n.tb.Helper()
	var l net.Listener
	n.Do(func() {
		var err error
		l, err = net.Listen("tcp", ":80")
		assert.NilError(n.tb, err)
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed below
			}
			from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			_, _ = io.WriteString(c, from) // the caller notices what is missing
			_ = c.Close()
		}
	}()
	n.tb.Cleanup(func() {
		_ = l.Close()
		<-done
	})
}

// Call connects from the namespace to port 80 of addr and returns the address
// that the server saw, or "" when there was no answer within the time.
func (n *Netns) Call(addr string, wait time.Duration) string {
	n.tb.Helper()
	var seen string
	n.Do(func() {
		d := net.Dialer{Timeout: wait}
		c, err := d.Dial("tcp", net.JoinHostPort(addr, "80"))
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		if c.SetDeadline(time.Now().Add(wait)) != nil {
			return
		}
		if b, err := io.ReadAll(c); err == nil {
			seen = string(b)
		}
	})
	return seen
}
