package lab

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// echoMain serves on the port in its first argument until it is killed.
func echoMain() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "echo: want a port")
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "echo:", echo(context.Background(), os.Args[1]))
	os.Exit(1)
}

// echo returns only when it cannot listen any more.
func echo(ctx context.Context, port string) error {
	var config net.ListenConfig
	udp, err := config.ListenPacket(ctx, "udp", ":"+port)
	if err != nil {
		return err
	}
	tcp, err := config.Listen(ctx, "tcp", ":"+port)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 2048)
		for {
			if _, from, err := udp.ReadFrom(buf); err == nil {
				_, _ = udp.WriteTo([]byte(peerLine(from)), from)
			}
		}
	}()
	for {
		c, err := tcp.Accept()
		if err != nil {
			return err
		}
		go echoTCP(c)
	}
}

// echoTCP answers HTTP if the peer speaks it within a moment, else bare.
func echoTCP(c net.Conn) {
	defer c.Close()
	line := peerLine(c.RemoteAddr())
	_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	r := bufio.NewReader(c)
	first, _ := r.ReadString('\n')
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if strings.Contains(first, "HTTP/") {
		for {
			header, err := r.ReadString('\n')
			if err != nil || strings.TrimSpace(header) == "" {
				break
			}
		}
		fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", len(line))
	}
	fmt.Fprint(c, line)
}

func peerLine(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		host = a.String()
	}
	return "peer " + strings.TrimPrefix(host, "::ffff:") + "\n"
}
