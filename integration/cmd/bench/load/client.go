package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// dialTimeout bounds one connection attempt. It is less than the first
// retransmission of a SYN twice over, so that a lost packet shows as a slow
// connection and a path that leads nowhere as an error.
const dialTimeout = 5 * time.Second

func dial(ctx context.Context, addr string, op byte) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("connection to %s is no TCP", addr), c.Close())
	}
	if _, err := tcp.Write([]byte{op}); err != nil {
		return nil, errors.Join(err, tcp.Close())
	}
	return tcp, nil
}

// Throughput sends one stream to the server at addr for that long, and returns the
// bits per second that the server has received, until it says so.
func Throughput(ctx context.Context, addr string, duration time.Duration) (float64, error) {
	c, err := dial(ctx, addr, opSink)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	buf := make([]byte, bufferSize)
	begin := time.Now()
	for time.Since(begin) < duration {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	var count [8]byte
	if _, err := io.ReadFull(c, count[:]); err != nil {
		return 0, fmt.Errorf("the server's count: %w", err)
	}
	return float64(binary.BigEndian.Uint64(count[:])) * 8 / time.Since(begin).Seconds(), nil
}

// RoundTrip sends a byte n times over one connection, waiting for the answer each
// time, and returns the median time of that.
func RoundTrip(ctx context.Context, addr string, n int) (time.Duration, error) {
	if n < 1 {
		return 0, fmt.Errorf("%d round trips: want at least 1", n)
	}
	c, err := dial(ctx, addr, opEcho)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	times := make([]time.Duration, n)
	for i := range times {
		begin := time.Now()
		if err := bounce(c); err != nil {
			return 0, err
		}
		times[i] = time.Since(begin)
	}
	slices.Sort(times)
	return (times[(n-1)/2] + times[n/2]) / 2, nil
}

// bounce sends a byte and waits for it to come back.
func bounce(c net.Conn) error {
	b := [1]byte{'x'}
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:])
	return err
}

// Connections makes n connections, each with one byte there and back, by so many
// workers at once, and returns how many that are per second. They are reset at the
// end, so that none of the client's ports waits in TIME_WAIT for the next round.
func Connections(ctx context.Context, addr string, n, workers int) (float64, error) {
	if n < 1 || workers < 1 {
		return 0, fmt.Errorf("%d connections by %d workers: want at least 1 of each", n, workers)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg   sync.WaitGroup
		left atomic.Int64
	)
	left.Store(int64(n))
	begin := time.Now()
	for range workers {
		wg.Go(func() {
			for left.Add(-1) >= 0 && ctx.Err() == nil {
				if err := once(ctx, addr); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begin)
	return float64(n) / elapsed.Seconds(), context.Cause(ctx)
}

// once makes one connection and uses it.
func once(ctx context.Context, addr string) error {
	c, err := dial(ctx, addr, opEcho)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetLinger(0); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return err
	}
	return bounce(c)
}
