// Package guest furnishes a VM for scenarios: a LAN, nodes on it, an NFS server
// and engines. It is for the guest's side of package vmlab only: what it makes
// is never taken down, since the VM is thrown away after each test.
package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// LAN is one Ethernet segment, a bridge in a network namespace of its own, and
// the IPv4 network 10.77.0.0/24.
type LAN struct {
	netns string
	nodes int
}

// NewLAN makes the segment.
func NewLAN(t testing.TB) *LAN {
	t.Helper()
	lan := &LAN{netns: "lan"}
	must(t, "ip", "netns", "add", lan.netns)
	must(t, "ip", "-n", lan.netns, "link", "add", "br0", "type", "bridge")
	must(t, "ip", "-n", lan.netns, "link", "set", "br0", "up")
	return lan
}

// Node is a machine of the LAN: namespaces for processes, network, mounts and host
// name, an own /run, and own directories for what engines and Berth keep in
// /var/lib.
// Its methods are for one goroutine at a time.
type Node struct {
	Name string
	// Addr is the node's IPv4 address on the LAN's eth0.
	Addr string
	pid  int
	dir  string     // of the VM, for logs and what the node keeps in /var/lib
	t    testing.TB // whose steps are being done
	vm   testing.TB // the test that made the node, which ends last
}

// NewNode connects a further machine to the LAN.
func (l *LAN) NewNode(t testing.TB, name string) *Node {
	t.Helper()
	dir := filepath.Join("/nodes", name)
	init, err := startInit(name, dir)
	if err != nil {
		t.Fatalf("node %s: %v", name, err)
	}
	l.nodes++
	n := &Node{
		Name: name,
		Addr: fmt.Sprintf("10.77.0.%d", l.nodes),
		pid:  init.Pid,
		dir:  dir,
		t:    t,
		vm:   t,
	}
	must(t, "ip", "-n", l.netns, "link", "add", "to-"+name, "master", "br0",
		"type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(n.pid))
	must(t, "ip", "-n", l.netns, "link", "set", "to-"+name, "up")
	n.Must("ip", "address", "add", n.Addr+"/24", "dev", "eth0")
	n.Must("ip", "link", "set", "eth0", "up")
	n.Must("ip", "link", "set", "lo", "up")
	return n
}

// CountVLAN counts the frames from a node that go over the segment with the tag of a
// VLAN, and returns what says how many it were until now.
func (l *LAN) CountVLAN(t testing.TB, node string, id int) func() int {
	t.Helper()
	table := fmt.Sprintf("vlan%d", id)
	must(t, "ip", "netns", "exec", l.netns, "nft", fmt.Sprintf(
		"add table bridge %[1]s; add chain bridge %[1]s in { type filter hook prerouting priority 0; }; add rule bridge %[1]s in iifname to-%[2]s vlan id %[3]d counter",
		table, node, id))
	return func() int {
		t.Helper()
		text := must(t, "ip", "netns", "exec", l.netns, "nft", "list", "table", "bridge", table)
		_, after, found := strings.Cut(text, "counter packets ")
		digits, _, _ := strings.Cut(after, " ")
		count, err := strconv.Atoi(digits)
		if !found || err != nil {
			t.Fatalf("no counter in\n%s", text)
		}
		return count
	}
}

// LosePower ends all that the node runs, at once, and takes away what a reboot takes:
// mounts, /run, firewall rules, and links other than those of NewNode.
func (n *Node) LosePower() {
	n.t.Helper()
	n.Must("busybox", "kill", "-9", "-1")
	n.Must("sh", "-ec", `
		for dir in $(grep -o ' /var/lib/docker/[^ ]*\| /run/[^ ]*' /proc/mounts); do umount -l "$dir" 2>/dev/null || true; done
		umount -l /run
		mount -t tmpfs -o mode=755 tmpfs /run
		nft flush ruleset
		for link in $(ls /sys/class/net); do
			case $link in lo | eth0) ;; *) ip link del "$link" 2>/dev/null || true ;; esac
		done`)
}

// On is the same node for a subtest, which fails instead of the test that made the
// node.
func (n *Node) On(t testing.TB) *Node {
	node := *n
	node.t = t
	return &node
}

// Path is where the VM's own processes find a file of the node.
func (n *Node) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.pid), "root", path)
}

// ReadFile returns the text of a file of the node.
func (n *Node) ReadFile(path string) string {
	n.t.Helper()
	data, err := os.ReadFile(n.Path(path))
	if err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	return string(data)
}

// WriteFile makes a file of the node, and the directories it lies in.
func (n *Node) WriteFile(path, text string) {
	n.t.Helper()
	full := n.Path(path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
}

// Result is how a command of a node ended.
type Result struct {
	Out  string // standard output and standard error, without the last newline
	Err  error  // nil for exit status 0
	Took time.Duration
}

// commandLimit ends a command that hangs; none of a scenario takes that long.
const commandLimit = 100 * time.Second

// Try runs a command on the node.
func (n *Node) Try(argv ...string) Result {
	n.t.Helper()
	return n.TryFor(commandLimit, argv...)
}

// TryFor is Try with a limit of the caller's; a command that is stopped at the
// limit has context.DeadlineExceeded in Err.
func (n *Node) TryFor(limit time.Duration, argv ...string) Result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	cmd := n.command(ctx, argv...)
	cmd.WaitDelay = time.Second
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	took := time.Since(began)
	n.t.Logf("%s# %s (%.1f s)", n.Name, strings.Join(argv, " "), took.Seconds())
	return Result{Out: strings.TrimRight(string(out), "\n"), Err: err, Took: took}
}

// Must runs a command on the node that has to succeed and returns its output.
func (n *Node) Must(argv ...string) string {
	n.t.Helper()
	r := n.Try(argv...)
	if r.Err != nil {
		n.t.Fatalf("%s# %s: %v\n%s", n.Name, strings.Join(argv, " "), r.Err, r.Out)
	}
	return r.Out
}

// MustFail runs a command on the node that has to fail, in at most limit, and
// whose output has to hold each of the words. It returns the output.
func (n *Node) MustFail(limit time.Duration, words []string, argv ...string) string {
	n.t.Helper()
	r := n.Try(argv...)
	line := n.Name + "# " + strings.Join(argv, " ")
	if r.Err == nil {
		n.t.Fatalf("%s: succeeded, but has to fail\n%s", line, r.Out)
	}
	if r.Took > limit {
		n.t.Errorf("%s: failed after %.1f s, want within %s\n%s", line, r.Took.Seconds(), limit, r.Out)
	}
	for _, word := range words {
		if !strings.Contains(r.Out, word) {
			n.t.Errorf("%s: the message lacks %q:\n%s", line, word, r.Out)
		}
	}
	return r.Out
}

// must runs a command of the VM itself and returns its output.
func must(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}
