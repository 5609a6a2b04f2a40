package bridge_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// uplinked is network i with the uplink eth1. Its gateways are those of the LAN.
func uplinked(i int) options.Network {
	n := modetest.Network(i)
	n.Uplink, n.Masquerade, n.MTU = "eth1", false, 0
	for at, s := range n.Subnets {
		n.Subnets[at].Gateway, n.Subnets[at].ContainerGateway = netip.Addr{}, s.Gateway
	}
	return n
}

// uplinkedEndpoint is endpoint i of it.
func uplinkedEndpoint(n options.Network, i int) options.Endpoint {
	plain := n
	plain.Subnets = nil
	for _, s := range n.Subnets {
		plain.Subnets = append(plain.Subnets, options.Subnet{Pool: s.Pool, Gateway: s.ContainerGateway})
	}
	return modetest.Endpoint(plain, i)
}

// newUplink gives a host the link eth1, down, to a LAN on which one host has the gateway
// addresses of network 1.
func newUplink(t *testing.T) (host, lan *testkit.Netns) {
	t.Helper()
	host, lan = testkit.NewNetns(t), testkit.NewNetns(t)
	host.Run("ip", "link", "add", "eth1", "mtu", "1450", "type", "veth", "peer", "name", "lan0")
	host.Run("ip", "link", "set", "lan0", "netns", lan.Path())
	for _, s := range uplinked(1).Subnets {
		a := netip.PrefixFrom(s.ContainerGateway, s.Pool.Bits()).String()
		if s.Pool.Addr().Is6() {
			lan.Run("ip", "addr", "add", a, "dev", "lan0", "nodad")
		} else {
			lan.Run("ip", "addr", "add", a, "dev", "lan0")
		}
	}
	lan.Run("ip", "link", "set", "lan0", "up")
	lan.Serve()
	return host, lan
}

// reach calls each other by both families, for at most this long.
func reach(t *testing.T, from *testkit.Netns, to []netip.Addr, want bool, what string) {
	t.Helper()
	patience := 300 * time.Millisecond
	if want {
		patience = 3 * time.Second
	}
	for _, a := range to {
		assert.Equal(t, from.Call(a.String(), patience) != "", want, "%s: %s", what, a)
	}
}

func addrsOf(ep options.Endpoint) []netip.Addr { return []netip.Addr{ep.IPv4.Addr(), ep.IPv6.Addr()} }

func TestUplinkContract(t *testing.T) {
	const networks = 8
	modetest.Run(t, modetest.Suite{
		New: func(t testing.TB, ns *testkit.Netns) modetest.Mode { return mode(t, ns) },
		Network: func(i int) options.Network {
			n := uplinked(i)
			n.MTU, n.Uplink, n.UplinkUp = 1400, fmt.Sprint("eth", i%networks), true
			return n
		},
		Endpoint:      uplinkedEndpoint,
		NetworkLinks:  func(n options.Network) []string { return []string{n.Bridge} },
		EndpointLinks: func(ep options.Endpoint) []string { return []string{ep.HostLink, ep.ContainerLink} },
		Variants: map[string]func(*options.Network){
			"checked": func(n *options.Network) { n.SpoofCheck, n.NoICC = true, true },
		},
		Prepare: func(ns *testkit.Netns) {
			for i := range networks {
				here, there := fmt.Sprint("eth", i), fmt.Sprint("lan", i)
				ns.Run("ip", "link", "add", here, "address", fmt.Sprintf("02:00:00:00:aa:%02x", i), "type", "veth",
					"peer", "name", there, "address", fmt.Sprintf("02:00:00:00:bb:%02x", i))
				ns.Run("ip", "link", "set", here, "up")
				ns.Run("ip", "link", "set", there, "up")
			}
		},
	})
}

func TestContainersOnTheLANOfAnUplink(t *testing.T) {
	for _, filter := range []string{"0", "1"} {
		for _, noICC := range []bool{false, true} {
			t.Run(fmt.Sprintf("filter %s, apart %t", filter, noICC), func(t *testing.T) {
				host, lan := newUplink(t)
				host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+filter, "net.bridge.bridge-nf-call-ip6tables="+filter)
				// As dockerd does.
				host.Run("iptables", "-P", "FORWARD", "DROP")
				host.Run("ip6tables", "-P", "FORWARD", "DROP")
				host.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0")
				host.Run("ip", "addr", "add", "10.0.1.200/32", "dev", "eth0")
				host.Run("ip", "link", "set", "eth0", "up")
				host.Serve()
				m, n := mode(t, host), uplinked(1)
				n.NoICC = noICC
				n, err := m.Adopt(t.Context(), n)
				assert.NilError(t, err)
				assert.Equal(t, n.MTU, 1450)
				assert.Assert(t, !n.UplinkUp)
				assert.NilError(t, m.EnsureNetwork(t.Context(), n))
				assert.NilError(t, m.EnsureNetwork(t.Context(), n))
				var eps []options.Endpoint
				var boxes []*testkit.Netns
				for i := range 2 {
					ep := uplinkedEndpoint(n, i+1)
					assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
					eps, boxes = append(eps, ep), append(boxes, plug(t, host, ep))
				}
				gateways := []netip.Addr{n.Subnets[0].ContainerGateway, n.Subnets[1].ContainerGateway}
				for i, c := range boxes {
					reach(t, lan, addrsOf(eps[i]), true, "from the LAN")
					reach(t, c, gateways, true, "to the LAN")
				}
				reach(t, boxes[0], addrsOf(eps[1]), !noICC, "between containers")
				// The host has no address here, and says nothing of those that it has elsewhere.
				assert.Equal(t, host.Run("ip", "-o", "addr", "show", "dev", n.Bridge), "")
				reach(t, lan, []netip.Addr{netip.MustParseAddr("10.0.1.200")}, false, "to the host")
				assert.Equal(t, host.Run("cat", "/proc/sys/net/ipv4/ip_forward"), "0")

				// All is as it was.
				assert.NilError(t, m.RemoveNetwork(t.Context(), n))
				assert.NilError(t, m.RemoveNetwork(t.Context(), n))
				l, ok, err := handle(t, host).Get("eth1")
				assert.NilError(t, err)
				assert.Assert(t, ok && l.Master == 0 && !l.Up && l.MTU == 1450)
				_, ok, err = handle(t, host).Get(n.Bridge)
				assert.NilError(t, err)
				assert.Assert(t, !ok)
			})
		}
	}
}

// The host does not become a router between the LAN and its other networks.
func TestUplinkIsApartFromOtherNetworks(t *testing.T) {
	host, lan := newUplink(t)
	m, n, other := mode(t, host), uplinked(1), modetest.Network(2)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureNetwork(t.Context(), other))
	ep := modetest.Endpoint(other, 1)
	assert.NilError(t, m.EnsureEndpoint(t.Context(), other, ep))
	c := plug(t, host, ep)
	for _, s := range other.Subnets {
		c.Run("ip", "route", "add", "default", "via", s.Gateway.String())
	}
	l, _, err := handle(t, host).Get(n.Bridge)
	assert.NilError(t, err)
	for _, s := range other.Subnets {
		// Somebody who sends to the bridge's own MAC address.
		via := "10.0.1.77"
		if s.Pool.Addr().Is6() {
			via = netip.PrefixFrom(n.Subnets[1].Pool.Addr(), 64).Addr().Next().Next().String()
		}
		lan.Run("ip", "neigh", "replace", via, "lladdr", l.MAC.String(), "dev", "lan0", "nud", "permanent")
		lan.Run("ip", "route", "add", s.Pool.String(), "via", via)
	}
	// The way back, so that it is the rules that stop it.
	host.Run("ip", "route", "add", n.Subnets[0].Pool.String(), "dev", n.Bridge)
	reach(t, lan, addrsOf(ep), false, "from the LAN to another network")
	reach(t, lan, []netip.Addr{other.Subnets[0].Gateway, other.Subnets[1].Gateway}, false, "from the LAN to the host")
	reach(t, c, []netip.Addr{n.Subnets[0].ContainerGateway}, false, "from another network to the LAN")
}

func TestUplinkThatWasUpStaysUp(t *testing.T) {
	host, _ := newUplink(t)
	host.Run("ip", "link", "set", "eth1", "up")
	m := mode(t, host)
	n, err := m.Adopt(t.Context(), uplinked(1))
	assert.NilError(t, err)
	assert.Assert(t, n.UplinkUp)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	l, _, err := handle(t, host).Get("eth1")
	assert.NilError(t, err)
	assert.Assert(t, l.Up && l.Master == 0)
}

func TestUplinksThatCannotBeHad(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare []string
		change  func(*options.Network)
		want    string
	}{
		{"address", []string{"ip addr add 192.0.2.5/24 dev eth1"}, nil, `uplink "eth1" has the address 192.0.2.5/24, which the host would lose: make a bridge of the host's own`},
		{"IPv6 address", []string{"ip link set eth1 up", "ip addr add 2001:db8::5/64 dev eth1 nodad"}, nil, `has the address 2001:db8::5/64, which the host would lose: if it does not need it, run ` + "`sysctl -w net.ipv6.conf.eth1.disable_ipv6=1`"},
		{"route", []string{"ip link set eth1 up", "ip route add default dev eth1"}, nil, `has a route to 0.0.0.0/0, which the host would lose`},
		{"port of a bridge", []string{"ip link add br0 type bridge", "ip link set eth1 master br0"}, nil, `is a port of bridge "br0": give its name as option bridge=br0 instead`},
		{"port of Docker's", []string{"ip link add docker0 type bridge", "ip link set eth1 master docker0"}, nil, `is a port of bridge "docker0", which is Docker's: choose another link`},
		{"missing", nil, func(n *options.Network) { n.Uplink = "eth9" }, `option uplink=eth9: uplink "eth9" does not exist: the host has eth1`},
		{"VLAN of nothing", nil, func(n *options.Network) { n.Uplink = "eth9.5" }, `option uplink=eth9.5: link "eth9" of VLAN "eth9.5" does not exist`},
		{"bridge", []string{"ip link add br0 type bridge"}, func(n *options.Network) { n.Uplink = "br0" }, `uplink "br0" is a bridge: give its name as option bridge=br0 instead`},
		{"loopback", nil, func(n *options.Network) { n.Uplink = "lo" }, "no Ethernet link"},
		{"adopted", []string{"ip link add br0 type bridge"}, func(n *options.Network) { n.Bridge = "br0" }, `bridge "br0" exists and is not Berth's: plug "eth1" into it yourself`},
		{"MTU", nil, func(n *options.Network) { n.MTU = 1451 }, `option mtu=1451: it is more than that of uplink "eth1", 1450`},
	} {
		t.Run(c.name, func(t *testing.T) {
			host, _ := newUplink(t)
			for _, line := range c.prepare {
				host.Run(strings.Fields(line)...)
			}
			n := uplinked(1)
			if c.change != nil {
				c.change(&n)
			}
			_, err := mode(t, host).Adopt(t.Context(), n)
			assert.ErrorContains(t, err, c.want)
			assert.Assert(t, errdefs.IsConflict(err) || errdefs.IsInvalidArgument(err))
		})
	}
}

// Somebody gives the uplink an address between two starts of Berth: it stays the
// host's, and nothing is left of the network.
func TestFailedUplinkLeavesNothing(t *testing.T) {
	host, _ := newUplink(t)
	host.Run("ip", "addr", "add", "192.0.2.5/24", "dev", "eth1")
	m, n := mode(t, host), uplinked(1)
	assert.ErrorContains(t, m.EnsureNetwork(t.Context(), n), "plug uplink eth1 into bridge")
	_, ok, err := handle(t, host).Get(n.Bridge)
	assert.NilError(t, err)
	assert.Assert(t, !ok)
	out, _ := host.Try("nft", "list", "tables")
	assert.Assert(t, !strings.Contains(out, "berth"), "%s", out)

	host.Run("ip", "addr", "flush", "dev", "eth1")
	host.Run("ip", "link", "add", "mv0", "link", "eth1", "type", "macvlan")
	assert.ErrorContains(t, m.EnsureNetwork(t.Context(), n), "macvlan or ipvlan links are on it")
}

func TestUplinkIsPluggedInAgain(t *testing.T) {
	host, lan := newUplink(t)
	m, n := mode(t, host), uplinked(1)
	n, err := m.Adopt(t.Context(), n)
	assert.NilError(t, err)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	ep := uplinkedEndpoint(n, 1)
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	plug(t, host, ep)
	all := []options.Network{n}
	drift := func(want string) {
		t.Helper()
		found, err := m.Drift(all)
		assert.NilError(t, err)
		if want == "" {
			assert.Equal(t, len(found), 0, "%v", found)
			return
		}
		assert.Equal(t, found[n.ID], fmt.Sprintf("bridge %q %s", n.Bridge, want))
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		found, err = m.Drift(all)
		assert.NilError(t, err)
		assert.Equal(t, len(found), 0, "%v", found)
		reach(t, lan, addrsOf(ep), true, want)
	}
	drift("")
	host.Run("ip", "link", "set", "eth1", "nomaster")
	drift(`has lost its uplink "eth1"`)
	host.Run("ip", "link", "set", "eth1", "down")
	drift(`has its uplink "eth1" down`)
	host.Run("ip", "link", "set", "eth1", "nomaster")
	host.Run("ip", "link", "set", "eth1", "name", "away") // as if it were gone
	found, err := m.Drift(all)
	assert.NilError(t, err)
	assert.Equal(t, found[n.ID], fmt.Sprintf(`bridge %q lacks its uplink "eth1"`, n.Bridge))
	err = m.EnsureNetwork(t.Context(), n)
	assert.ErrorContains(t, err, `uplink "eth1" does not exist: the host has away`)
	assert.Assert(t, errdefs.IsNotFound(err))
	host.Run("ip", "link", "set", "away", "name", "eth1")
	drift(`has lost its uplink "eth1"`)
}

// The machines of the LAN remember the container that had the addresses before.
func TestLANLearnsOfNewContainers(t *testing.T) {
	host, lan := newUplink(t)
	m, n := mode(t, host), uplinked(1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	defer func() { cancel(); <-done }()
	time.Sleep(200 * time.Millisecond) // it begins
	ep := uplinkedEndpoint(n, 1)
	for _, a := range addrsOf(ep) {
		lan.Run("ip", "neigh", "replace", a.String(), "lladdr", "02:00:00:00:66:66", "dev", "lan0", "nud", "stale")
	}
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	plug(t, host, ep)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if known := lan.Run("ip", "neigh", "show", "dev", "lan0"); strings.Count(known, ep.MAC.String()) < len(addrsOf(ep)) {
			return poll.Continue("the LAN knows %s", known)
		}
		return poll.Success()
	})
}

// A container that sends with another MAC or IP address than its own is not heard.
func TestSpoofCheck(t *testing.T) {
	host, lan := newUplink(t)
	m, n := mode(t, host), uplinked(1)
	n.SpoofCheck = true
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	ep, sibling := uplinkedEndpoint(n, 1), uplinkedEndpoint(n, 2)
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, sibling))
	c, other := plug(t, host, ep), plug(t, host, sibling)
	works := func(want bool, what string, addrs ...netip.Addr) {
		t.Helper()
		lan.Run("ip", "neigh", "flush", "all")
		if addrs == nil {
			addrs = addrsOf(ep)
		}
		reach(t, lan, addrs, want, what)
	}
	works(true, "own MAC")
	reach(t, other, addrsOf(ep), true, "sibling")
	c.Run("ip", "link", "set", "eth0", "address", "02:00:00:00:66:66")
	works(false, "another MAC")
	c.Run("ip", "link", "set", "eth0", "address", sibling.MAC.String())
	works(false, "sibling's MAC")
	c.Run("ip", "link", "set", "eth0", "address", ep.MAC.String())
	works(true, "own MAC again")

	// It takes addresses that nobody has, and those of the gateway.
	c.Run("ip", "addr", "add", "10.0.1.99/24", "dev", "eth0")
	c.Run("ip", "addr", "add", "fd00:0:0:1::99/64", "dev", "eth0", "nodad")
	works(false, "address of nobody", netip.MustParseAddr("10.0.1.99"), netip.MustParseAddr("fd00:0:0:1::99"))
	works(true, "beside its own")
	// Repaired after the port was out of the bridge, and without its guard.
	host.Run("tc", "qdisc", "del", "dev", ep.HostLink, "ingress")
	host.Run("ip", "link", "set", ep.HostLink, "nomaster")
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	works(true, "repaired")
	works(false, "repaired", netip.MustParseAddr("10.0.1.99"), netip.MustParseAddr("fd00:0:0:1::99"))
}
