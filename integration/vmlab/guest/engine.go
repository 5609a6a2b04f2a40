package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netns"
)

// Image is the name of the image that StartEngine imports: busybox and links for
// its programs.
const Image = "busybox:latest"

// engineLimit is how long each part of an engine may take to its first answer.
// Under software emulation it takes about 5 s on a machine that does nothing else.
const engineLimit = 2 * time.Minute

// StartEngine runs a Docker Engine of the node's own, gives it Image, and returns
// when it answers. It has no networks but the host's, which would take as long as
// the rest of its start.
func (n *Node) StartEngine() {
	n.t.Helper()
	// dockerd gives a containerd that it starts itself 15 s, too little here.
	const containerd = "/run/containerd/containerd.sock"
	n.Start("containerd", "containerd", "--log-level=error").waitUp(n.t, engineLimit, n.listens(containerd))
	n.Start("dockerd", "dockerd", "--log-level=warn", "--containerd="+containerd,
		"--bridge=none", "--iptables=false", "--ip6tables=false").waitUp(n.t, engineLimit, n.engineAnswers)
	archive, err := busyboxArchive()
	if err != nil {
		n.t.Fatal(err)
	}
	if r := n.TryWithInput(archive, "docker", "import", "-", Image); r.Err != nil {
		n.t.Fatalf("%s: import %s: %v\n%s", n.Name, Image, r.Err, r.Out)
	}
}

// Docker runs a docker command on the node that has to succeed; args are one
// line, split at blanks.
func (n *Node) Docker(line string) string {
	n.t.Helper()
	return n.Must(append([]string{"docker"}, strings.Fields(line)...)...)
}

// DockerFails runs a docker command on the node that has to fail within limit
// with a message that holds the words.
func (n *Node) DockerFails(line string, limit time.Duration, words ...string) string {
	n.t.Helper()
	return n.MustFail(limit, words, append([]string{"docker"}, strings.Fields(line)...)...)
}

func (n *Node) engineAnswers() bool {
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var dialer net.Dialer
				return dialer.DialContext(ctx, "unix", n.Path("/run/docker.sock"))
			},
		},
	}
	answer, err := client.Get("http://docker/_ping")
	if err != nil {
		return false
	}
	return answer.Body.Close() == nil && answer.StatusCode == http.StatusOK
}

// busyboxArchive is the file tree of Image as a tar archive.
func busyboxArchive() (string, error) {
	binary, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, dir := range []string{"bin/", "etc/", "tmp/", "www/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return "", err
		}
	}
	head := &tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755, Size: int64(len(binary))}
	if err := w.WriteHeader(head); err != nil {
		return "", err
	}
	if _, err := w.Write(binary); err != nil {
		return "", err
	}
	for _, name := range []string{"sh", "cat", "cp", "echo", "httpd", "ls", "mkdir", "rm", "sleep", "sync", "true", "wget"} {
		link := &tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777}
		if err := w.WriteHeader(link); err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return out.String(), nil
}

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
