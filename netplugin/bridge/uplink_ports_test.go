package bridge_test

import (
	"net/netip"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
)

// The host is on the LAN of the uplink with another link, too, and publishes ports
// there. With br_netfilter its translation would get hold of frames that are only
// switched.
func TestContainersOfAnUplinkReachPublishedPorts(t *testing.T) {
	for _, filter := range []string{"0", "1"} {
		t.Run("filter "+filter, func(t *testing.T) {
			host, lan := newUplink(t)
			host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+filter, "net.bridge.bridge-nf-call-ip6tables="+filter)
			host.Run("iptables", "-P", "FORWARD", "DROP")
			host.Run("ip6tables", "-P", "FORWARD", "DROP")
			// The LAN is a switch, with both links of the host.
			host.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "lan1", "netns", lan.Path())
			lan.Run("ip", "link", "add", "sw", "type", "bridge")
			for _, name := range []string{"lan0", "lan1"} {
				lan.Run("ip", "link", "set", name, "master", "sw", "up")
			}
			lan.Run("ip", "link", "set", "sw", "up")
			onLAN := []string{"10.0.1.200", "fd00:0:0:1::200"}
			host.Run("ip", "addr", "add", onLAN[0]+"/24", "dev", "eth0")
			host.Run("ip", "addr", "add", onLAN[1]+"/64", "dev", "eth0", "nodad")
			host.Run("ip", "link", "set", "eth0", "up")

			m, n, other := mode(t, host), uplinked(1), modetest.Network(2)
			assert.NilError(t, m.EnsureNetwork(t.Context(), n))
			ep := uplinkedEndpoint(n, 1)
			assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
			c := plug(t, host, ep)

			assert.NilError(t, m.EnsureNetwork(t.Context(), other))
			web := modetest.Endpoint(other, 1)
			var err error
			web.Ports, err = m.ReservePorts(t.Context(), other, web, []options.PortRequest{{Proto: options.TCP, HostPort: 80, HostPortEnd: 80, ContainerPort: 80}})
			assert.NilError(t, err)
			assert.NilError(t, m.EnsureEndpoint(t.Context(), other, web))
			server := plug(t, host, web)
			for _, s := range other.Subnets {
				server.Run("ip", "route", "add", "default", "via", s.Gateway.String())
			}
			assert.NilError(t, m.EnsurePorts(t.Context(), other, web))
			for _, a := range onLAN {
				reach(t, c, []netip.Addr{netip.MustParseAddr(a)}, true, "published port")
			}
		})
	}
}
