// Command tool is what the hosts and containers of the lab ask each other with. Its
// name decides what it is: ask, a client, or peer, a server. It has only this file
// and needs nothing but the standard library.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	name := filepath.Base(os.Args[0])
	acts := map[string]func([]string) error{"ask": ask, "peer": peer}
	act, ok := acts[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "%s: start this as ask or peer\n", name)
		os.Exit(2)
	}
	if err := act(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// ask is a client for the servers of scenarios:
//
//	ask [-u] [-from ADDRESS:PORT] [-t 2s] ADDRESS:PORT   one request; prints the answer
//	ask -hold 5s ADDRESS:PORT         sends lines to an echo server for so long
//	ask -send BYTES ADDRESS:PORT      sends them, waits for a word; prints N kbit/s
//	ask -receive ADDRESS:PORT         reads to the end; prints N kbit/s
//
// It fails when no answer has come after -t, of a held connection to a line.
func ask(args []string) error {
	flags := flag.NewFlagSet("ask", flag.ContinueOnError)
	udp := flags.Bool("u", false, "UDP")
	from := flags.String("from", "", "address and port to ask from")
	patience := flags.Duration("t", 2*time.Second, "how long to wait for an answer")
	hold := flags.Duration("hold", 0, "how long to keep a connection busy")
	send := flags.Int("send", 0, "how many bytes to send")
	receive := flags.Bool("receive", false, "measure what comes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("want one ADDRESS:PORT")
	}
	// A port may be asked from again at once.
	dialer := net.Dialer{Timeout: *patience, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
		}), err)
	}}
	proto := "tcp"
	if *udp {
		proto = "udp"
	}
	if *from != "" {
		source, err := netip.ParseAddrPort(*from)
		if err != nil {
			return err
		}
		dialer.LocalAddr = net.TCPAddrFromAddrPort(source)
		if *udp {
			dialer.LocalAddr = net.UDPAddrFromAddrPort(source)
		}
	}
	c, err := dialer.Dial(proto, flags.Arg(0))
	if err != nil {
		return err
	}
	defer c.Close()
	switch {
	case *hold > 0:
		return holdOpen(c, *hold, *patience)
	case *send > 0 || *receive:
		return measure(c, *send)
	default:
		return askOnce(c, *patience)
	}
}

// askOnce prints what the peer says, without HTTP's header if it has one.
func askOnce(c net.Conn, patience time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	var answer []byte
	var err error
	if _, ok := c.(*net.UDPConn); ok {
		answer = make([]byte, 2048)
		var n int
		n, err = c.Read(answer)
		answer = answer[:n]
	} else {
		answer, err = io.ReadAll(c)
	}
	if err != nil {
		return err
	}
	if _, body, ok := bytes.Cut(answer, []byte("\r\n\r\n")); ok {
		answer = body
	}
	if len(answer) == 0 {
		return errors.New("the answer is empty")
	}
	_, err = os.Stdout.Write(answer)
	return err
}

// holdOpen keeps a connection to an echo server busy.
func holdOpen(c net.Conn, hold, patience time.Duration) error {
	end := time.Now().Add(hold)
	lines := 0
	for ; time.Now().Before(end); lines++ {
		line := fmt.Appendf(nil, "line %d\n", lines)
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := c.Write(line); err != nil {
			return fmt.Errorf("after %d lines: %w", lines, err)
		}
		back := make([]byte, len(line))
		if _, err := io.ReadFull(c, back); err != nil {
			return fmt.Errorf("after %d lines: %w", lines, err)
		}
		if !bytes.Equal(line, back) {
			return fmt.Errorf("sent %q, came back %q", line, back)
		}
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Println(lines, "lines")
	return nil
}

// measure sends n bytes, or reads if there are none, until the peer closes.
func measure(c net.Conn, n int) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	start := time.Now()
	if n > 0 {
		if _, err := io.CopyN(c, zeros{}, int64(n)); err != nil {
			return err
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			return errors.New("only TCP can be measured")
		}
		if err := tcp.CloseWrite(); err != nil {
			return err
		}
	}
	came, err := io.Copy(io.Discard, c)
	if err != nil {
		return err
	}
	if n == 0 {
		n = int(came)
	}
	fmt.Printf("%d kbit/s\n", int64(float64(n)*8/1000/time.Since(start).Seconds()))
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// peer is a server for scenarios: `peer PORT[=KIND]...` on TCP and UDP of both
// families. Without a kind it answers every request with one line: its $WHO, or
// "peer", and the address that it was asked from; with as:WHO the one that is given.
// The other kinds, of TCP only, are echo, sink, which answers when all has come, and
// source:BYTES.
func peer(args []string) error {
	if len(args) == 0 {
		return errors.New("want PORT[=as:WHO|=echo|=sink|=source:BYTES]")
	}
	ended := make(chan error)
	for _, arg := range args {
		port, kind, _ := strings.Cut(arg, "=")
		tcp, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		who := os.Getenv("WHO")
		if name, ok := strings.CutPrefix(kind, "as:"); ok {
			kind, who = "", name
		}
		if who == "" {
			who = "peer"
		}
		answer, err := answerTo(kind, who)
		if err != nil {
			return err
		}
		go func() { ended <- serveTCP(tcp, answer) }()
		if kind != "" {
			continue
		}
		udp, err := net.ListenPacket("udp", ":"+port)
		if err != nil {
			return err
		}
		go func() { ended <- serveUDP(udp, who) }()
	}
	return <-ended
}

// answerTo returns what is done with a connection.
func answerTo(kind, who string) (func(net.Conn), error) {
	kind, size, _ := strings.Cut(kind, ":")
	switch kind {
	case "":
		return func(c net.Conn) { answerHTTP(c, who) }, nil
	case "echo":
		return func(c net.Conn) { _, _ = io.Copy(c, c) }, nil
	case "sink":
		return func(c net.Conn) {
			n, _ := io.Copy(io.Discard, c)
			fmt.Fprintln(c, n)
		}, nil
	case "source":
		n, err := strconv.ParseInt(size, 10, 64)
		return func(c net.Conn) { _, _ = io.CopyN(c, zeros{}, n) }, err
	default:
		return nil, fmt.Errorf("kind %q: want as:WHO, echo, sink or source:BYTES", kind)
	}
}

func serveTCP(l net.Listener, answer func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			answer(c)
			// What a client has not read any more is lost on it anyway.
			_ = c.Close()
		}()
	}
}

// answerHTTP reads a request to its empty line.
func answerHTTP(c net.Conn, who string) {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	var request []byte
	for !bytes.Contains(request, []byte("\r\n\r\n")) {
		part := make([]byte, 2048)
		n, err := c.Read(part)
		if err != nil {
			return
		}
		request = append(request, part[:n]...)
	}
	line := whoAsked(who, c.RemoteAddr())
	fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(line), line)
}

func serveUDP(c net.PacketConn, who string) error {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = c.WriteTo([]byte(whoAsked(who, from)), from)
	}
}

// whoAsked is the line of an answer.
func whoAsked(who string, a net.Addr) string {
	address := a.String()
	if from, err := netip.ParseAddrPort(address); err == nil {
		address = from.Addr().Unmap().String()
	}
	return who + " " + address + "\n"
}
