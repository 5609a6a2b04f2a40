package load

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// serve starts a server on loopback and counts what it accepts.
func serve(t *testing.T) (addr string, accepted *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	counted := &countingListener{Listener: l}
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, counted) }()
	t.Cleanup(func() {
		stop()
		assert.NilError(t, <-done)
	})
	return l.Addr().String(), &counted.n
}

type countingListener struct {
	net.Listener
	n atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

func TestThroughputCountsWhatArrived(t *testing.T) {
	addr, _ := serve(t)
	bits, err := Throughput(t.Context(), addr, 100*time.Millisecond)
	assert.NilError(t, err)
	// Loopback carries more than 10 Mbit/s and less than 10 Tbit/s anywhere.
	assert.Assert(t, bits > 1e7 && bits < 1e13, "%g bit/s", bits)
}

func TestRoundTripTakesTimeAndOneConnection(t *testing.T) {
	addr, accepted := serve(t)
	rtt, err := RoundTrip(t.Context(), addr, 50)
	assert.NilError(t, err)
	assert.Assert(t, rtt > 0 && rtt < time.Second, "%s", rtt)
	assert.Equal(t, accepted.Load(), int64(1))
}

func TestConnectionsMakesAsManyAsAsked(t *testing.T) {
	addr, accepted := serve(t)
	rate, err := Connections(t.Context(), addr, 41, 4)
	assert.NilError(t, err)
	assert.Assert(t, rate > 0)
	assert.Equal(t, accepted.Load(), int64(41))
}

func TestNobodyListeningIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	addr := l.Addr().String()
	assert.NilError(t, l.Close())
	_, err = Throughput(t.Context(), addr, time.Millisecond)
	assert.ErrorContains(t, err, "refused")
	_, err = RoundTrip(t.Context(), addr, 1)
	assert.ErrorContains(t, err, "refused")
	_, err = Connections(t.Context(), addr, 3, 2)
	assert.ErrorContains(t, err, "refused")
}

func TestNumbersBelowOneAreRefused(t *testing.T) {
	addr, _ := serve(t)
	_, err := RoundTrip(t.Context(), addr, 0)
	assert.ErrorContains(t, err, "want at least 1")
	_, err = Connections(t.Context(), addr, 1, 0)
	assert.ErrorContains(t, err, "want at least 1")
}
