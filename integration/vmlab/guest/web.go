package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/vishvananda/netns"
)

// Fetch gets a page from a server on the LAN as a program of the node does,
// asking again while the server starts.
func (n *Node) Fetch(addr string, port int, page string) string {
	n.t.Helper()
	url := fmt.Sprintf("http://%s/%s", net.JoinHostPort(addr, strconv.Itoa(port)), page)
	client := http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: n.dial},
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		text, err := get(client, url)
		if err == nil {
			return text
		}
		if time.Now().After(end) {
			n.t.Fatalf("%s: %v", n.Name, err)
		}
	}
}

func get(client http.Client, url string) (string, error) {
	answer, err := client.Get(url)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(answer.Body)
	if err := errors.Join(err, answer.Body.Close()); err != nil {
		return "", err
	}
	if answer.StatusCode != http.StatusOK {
		return "", fmt.Errorf("get %s: %s", url, answer.Status)
	}
	return string(text), nil
}

// dial connects from the node's network namespace. A socket belongs to the
// namespace of the thread that made it, so the thread is given up afterwards.
func (n *Node) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromPid(n.pid)
		if err != nil {
			done <- result{err: err}
			return
		}
		if err := errors.Join(netns.Set(ns), ns.Close()); err != nil {
			done <- result{err: err}
			return
		}
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, network, addr)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
