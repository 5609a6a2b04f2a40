// Package load measures a TCP path: a server that takes what it is sent, and the
// three clients of it that say how much goes through, how long an answer takes and
// how many connections can be made.
//
// The first byte of a connection tells the server what to do with the rest.
package load

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"
)

// What a connection begins with.
const (
	opSink = 'S' // count everything up to the end of the stream, and answer with the count
	opEcho = 'E' // send every byte back
)

// bufferSize is what a stream is written and read in: large, so that it is the path
// that is measured and not the number of system calls.
const bufferSize = 256 << 10

// Serve answers connections until ctx ends, which is no error.
func Serve(ctx context.Context, l net.Listener) error {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			go serveConn(ctx, c)
		case errors.Is(err, net.ErrClosed):
			return err
		default:
			// Out of descriptors, or the connection is gone already.
			time.Sleep(time.Millisecond)
		}
	}
}

func serveConn(ctx context.Context, c net.Conn) {
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	var op [1]byte
	if _, err := io.ReadFull(c, op[:]); err != nil {
		return
	}
	switch op[0] {
	case opSink:
		if n, err := drain(c); err == nil {
			_, _ = c.Write(binary.BigEndian.AppendUint64(nil, n))
		}
	case opEcho:
		// Not io.Copy, which would splice(2): this is for single bytes.
		var b [1]byte
		for {
			if _, err := c.Read(b[:]); err != nil {
				return
			}
			if _, err := c.Write(b[:]); err != nil {
				return
			}
		}
	}
}

// drain reads to the end of the stream.
func drain(c io.Reader) (uint64, error) {
	var total uint64
	buf := make([]byte, bufferSize)
	for {
		n, err := c.Read(buf)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
