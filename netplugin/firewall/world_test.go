package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// A world is a host with an uplink to one neighbour, some networks and their
// containers. Everybody listens on port 80 and answers with the address that it
// was called from.
type world struct {
	t     *testing.T
	host  *testkit.Netns
	links *link.Handle
	m     *Manager
	who   map[string]*testkit.Netns
}

// The host's addresses on the LAN, and the neighbour's.
const (
	hostLAN4, hostLAN6   = "192.0.2.1", "fd00:ff::1"
	neighbour4           = "192.0.2.2"
	neighbour6           = "fd00:ff::2"
	waitYes, waitNo      = 3 * time.Second, 400 * time.Millisecond
	docker4, docker6     = "172.18.0", "fd00:18:"
	dockerBridge, uplink = "br-0123456789ab", "eth0"
)

func newWorld(t *testing.T) *world {
	w := &world{t: t, host: testkit.NewNetns(t), who: map[string]*testkit.Netns{}}
	h, err := link.Open(link.Options{NetNS: w.host.File()})
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	w.links = h
	w.m, err = New(Options{Links: h})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, w.m.Close()) })
	w.who["host"] = w.host
	w.host.Serve()

	lan := testkit.NewNetns(t)
	w.host.Run("ip", "link", "add", uplink, "type", "veth", "peer", "name", "lan0")
	w.host.Run("ip", "link", "set", "lan0", "netns", lan.Path())
	addrs(w.host, uplink, hostLAN4+"/24", hostLAN6+"/64")
	addrs(lan, "lan0", neighbour4+"/24", neighbour6+"/64")
	w.host.Run("ip", "route", "add", "default", "via", neighbour4)
	w.host.Run("ip", "-6", "route", "add", "default", "via", neighbour6)
	// The neighbour sends everything to the host, also what is not for it.
	lan.Run("ip", "route", "add", "default", "via", hostLAN4)
	lan.Run("ip", "-6", "route", "add", "default", "via", hostLAN6)
	w.who["lan"] = lan
	lan.Serve()
	w.host.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	return w
}

func addrs(ns *testkit.Netns, name string, list ...string) {
	ns.Run("ip", "link", "set", name, "up")
	for _, a := range list {
		argv := []string{"ip", "addr", "add", a, "dev", name}
		if strings.Contains(a, ":") {
			argv = append(argv, "nodad")
		}
		ns.Run(argv...)
	}
}

// berth makes a Berth network: v4 and v6 are the first three bytes and the first
// half of its subnets.
func (w *world) berth(name, v4, v6 string, n Network) Network {
	w.t.Helper()
	n.Bridge = name
	n.Subnets = prefixes(v4+".0/24", v6+":/64")
	_, err := w.links.EnsureBridge(link.Bridge{Name: name, NetworkID: name, IPv6: true})
	assert.NilError(w.t, err)
	addrs(w.host, name, v4+".1/24", v6+":1/64")
	return n
}

// docker makes the bridge of a Docker network.
func (w *world) docker() {
	w.host.Run("ip", "link", "add", dockerBridge, "type", "bridge")
	addrs(w.host, dockerBridge, docker4+".1/24", docker6+":1/64")
}

// container puts a container on a bridge, with a default route, as number n.
func (w *world) container(name, bridge, v4, v6 string, n int) {
	w.t.Helper()
	ns := testkit.NewNetns(w.t)
	if strings.HasPrefix(bridge, "bth") {
		_, err := w.links.EnsureVeth(link.Veth{Host: "v" + name, Container: "c" + name, EndpointID: name, Master: bridge})
		assert.NilError(w.t, err)
	} else {
		w.host.Run("ip", "link", "add", "v"+name, "type", "veth", "peer", "name", "c"+name)
		w.host.Run("ip", "link", "set", "v"+name, "master", bridge, "up")
	}
	w.host.Run("ip", "link", "set", "c"+name, "netns", ns.Path(), "name", "eth0")
	addrs(ns, "eth0", fmt.Sprintf("%s.%d/24", v4, n), fmt.Sprintf("%s:%d/64", v6, n))
	ns.Run("ip", "route", "add", "default", "via", v4+".1")
	ns.Run("ip", "-6", "route", "add", "default", "via", v6+":1")
	w.who[name] = ns
	ns.Serve()
}

// A path is one line of a table of who reaches whom. seen is the expected source
// address: "" when no connection is possible, "any" when it does not matter.
type path struct{ from, to, seen string }

// expect checks all paths at once.
func (w *world) expect(paths []path) {
	w.t.Helper()
	type result struct {
		path
		got string
	}
	results := make(chan result)
	for _, p := range paths {
		go func() {
			wait := waitYes
			if p.seen == "" {
				wait = waitNo
			}
			results <- result{p, w.who[p.from].Call(p.to, wait)}
		}()
	}
	for range paths {
		r := <-results
		switch {
		case r.seen == "" && r.got != "":
			w.t.Errorf("%s reaches %s", r.from, r.to)
		case r.seen != "" && r.got == "":
			w.t.Errorf("%s does not reach %s", r.from, r.to)
		case r.seen != "any" && r.seen != r.got:
			w.t.Errorf("%s is seen by %s as %s, not %s", r.from, r.to, r.got, r.seen)
		}
	}
}

// addrOf is address n of a network in one of its families.
func addrOf(v6 bool, v4net, v6net string, n int) string {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("%s:%d", v6net, n)).String()
	}
	return fmt.Sprintf("%s.%d", v4net, n)
}
