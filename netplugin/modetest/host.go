package modetest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// host is the namespace that a mode works in.
type host struct {
	t     testing.TB
	ns    *testkit.Netns
	links *link.Handle
}

func (s Suite) newHost(t testing.TB) *host {
	t.Helper()
	ns := testkit.NewNetns(t)
	if s.Prepare != nil {
		s.Prepare(ns)
	}
	h, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	// Turned on for good, so that it is no difference between two snapshots.
	ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	return &host{t: t, ns: ns, links: h}
}

// snapshot is all that a mode may change, as text, without what differs each
// time: indices, and the order in which links were made.
func (h *host) snapshot() string {
	h.t.Helper()
	links, err := h.links.List()
	assert.NilError(h.t, err)
	names := map[int]string{}
	for _, l := range links {
		names[l.Index] = l.Name
	}
	var lines []string
	for _, l := range links {
		addrs, err := h.links.Addrs(l.Name)
		assert.NilError(h.t, err)
		lines = append(lines, fmt.Sprintf("%s: %s master %q peer %q mtu %d mac %s up %v port %+v owner %s addresses %v",
			l.Name, l.Kind, names[l.Master], names[l.Peer], l.MTU, h.mac(l), l.Up, l.Port, l.Owner, addrs))
		for _, key := range []string{"ipv4/conf/%s/route_localnet", "ipv4/conf/%s/send_redirects", "ipv6/conf/%s/disable_ipv6"} {
			value, err := h.links.Sysctl(fmt.Sprintf(key, l.Name))
			assert.NilError(h.t, err)
			lines = append(lines, fmt.Sprintf(key, l.Name)+" "+value)
		}
		filters := h.ns.Run("tc", "filter", "show", "dev", l.Name, "ingress")
		lines = append(lines, indices().ReplaceAllString(filters, ""))
	}
	for _, qdisc := range strings.Split(h.ns.Run("tc", "qdisc", "show"), "\n") {
		lines = append(lines, handles().ReplaceAllString(qdisc, "qdisc $1"))
	}
	routes, err := h.links.Routes()
	assert.NilError(h.t, err)
	for _, r := range routes {
		if !r.Dst.Addr().IsLinkLocalUnicast() {
			lines = append(lines, fmt.Sprintf("route %s dev %s", r.Dst, names[r.Link]))
		}
	}
	slices.Sort(lines)
	return strings.Join(append(lines, h.ns.Run("nft", "list", "ruleset")), "\n")
}

// handles and indices are numbers that the kernel picks.
func handles() *regexp.Regexp { return regexp.MustCompile(`qdisc ([a-z_]+) [0-9a-f]+:`) }
func indices() *regexp.Regexp { return regexp.MustCompile(`index \d+ ref \d+`) }

// mac leaves out the addresses that the kernel invents for host ends.
func (h *host) mac(l link.Link) string {
	if l.Owner.Endpoint != "" {
		return "any"
	}
	return l.MAC.String()
}

// plug does dockerd's part: it moves the endpoint's link into a container of its
// own and configures it there.
func (h *host) plug(n options.Network, ep options.Endpoint) *testkit.Netns {
	h.t.Helper()
	container := testkit.NewNetns(h.t)
	h.ns.Run("ip", "link", "set", ep.ContainerLink, "netns", container.Path(), "name", "eth0")
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		argv := []string{"ip", "addr", "add", p.String(), "dev", "eth0"}
		if p.Addr().Is6() {
			argv = append(argv, "nodad")
		}
		container.Run(argv...)
	}
	container.Run("ip", "link", "set", "eth0", "up")
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if gateway := n.GatewayOf(p.Addr()); gateway.IsValid() {
			container.Run("ip", "route", "add", "default", "via", gateway.String())
		}
	}
	for _, r := range n.RoutesOf(ep) {
		container.Run("ip", "route", "add", r.Destination.String(), "dev", "eth0")
	}
	container.Serve()
	return container
}

// errUp is the error of a limited context.
var errUp = errors.New("the time of the request is up")

// limited is a context that ends after it has been asked a number of times: at
// each place where a mode looks whether to go on, in turn.
type limited struct {
	context.Context
	left atomic.Int64
	done chan struct{}
}

func limit(ctx context.Context, asks int) *limited {
	l := &limited{Context: ctx, done: make(chan struct{})}
	l.left.Store(int64(asks))
	return l
}

func (l *limited) Err() error {
	switch left := l.left.Add(-1); {
	case left >= 0:
		return nil
	case left == -1:
		close(l.done)
	}
	return errUp
}

func (l *limited) Done() <-chan struct{} { return l.done }
