package options

import (
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
)

func TestUplinks(t *testing.T) {
	n, warnings, err := lanNetwork(false, "uplink=eth1.50 spoof-check=true icc=false gateway4=nat mtu=1400", "10.2.0.0/24@10.2.0.254", "fd00:1::/64@fd00:1::1")
	assert.NilError(t, err)
	assert.Equal(t, len(warnings), 0, "%v", warnings)
	assert.Assert(t, n.Mode == ModeBridge && !n.IsLAN() && !n.Masquerade && n.SpoofCheck && n.NoICC && !n.Publishes() && n.SkipGateway4() && n.SkipGateway6())
	assert.Equal(t, n.Uplink, "eth1.50")
	base, id, ok := n.SegmentVLAN()
	assert.Assert(t, ok && base == "eth1" && id == 50)
	// The gateway is a router of the LAN: the bridge must not take its address.
	assert.DeepEqual(t, n.Subnets, []Subnet{
		{Pool: netip.MustParsePrefix("10.2.0.0/24"), ContainerGateway: netip.MustParseAddr("10.2.0.254")},
		{Pool: netip.MustParsePrefix("fd00:1::/64"), ContainerGateway: netip.MustParseAddr("fd00:1::1")},
	}, compareNetip())
	assert.Equal(t, n.GatewayOf(netip.MustParseAddr("10.2.0.7")), netip.MustParseAddr("10.2.0.254"))
	assertStored(t, n)
	_, _, err = ParseEndpoint(n, "e", &network.EndpointInterface{Address: "10.2.0.254/24"}, nil)
	assert.Assert(t, errdefs.IsConflict(err))
	assert.ErrorContains(t, err, "address 10.2.0.254 is the network's gateway")

	n, _, err = lanNetwork(false, "uplink= spoof-check=true", "10.2.0.0/24@10.2.0.254")
	assert.NilError(t, err)
	assert.Assert(t, n.Uplink == "" && n.Masquerade && n.SpoofCheck && n.Publishes())
	assert.Equal(t, n.Subnets[0].Gateway, netip.MustParseAddr("10.2.0.254"))
}

func TestWrongUplinkOptionsAreNamed(t *testing.T) {
	for _, c := range []struct{ words, want string }{
		{"mode=macvlan uplink=eth1", `option uplink="eth1": it is for networks of mode bridge, the network has mode macvlan`},
		{"parent=eth1 spoof-check=true", `option spoof-check="true": it is for networks of mode bridge, create it with -o mode=bridge`},
		{"uplink=eth1 masquerade=true", `options uplink="eth1" and masquerade="true": the bridge has no address`},
		{"uplink=eth1 gateway4=routed", `options uplink="eth1" and gateway4="routed"`},
		{"uplink=eth1 publish=10.0.0.0/8", "the containers are reached by their own addresses, no port is published, leave one of them out"},
		{"uplink=eth1/0", "option uplink="},
		{"uplink=eth1.4095", "want a VLAN ID from 1 to 4094"},
		{"spoof-check=maybe", "option spoof-check="},
	} {
		_, _, err := lanNetwork(false, c.words, "10.2.0.0/24")
		assert.ErrorContains(t, err, c.want, c.words)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
	}
	_, _, err := lanNetwork(true, "uplink=eth1", "10.2.0.0/24")
	assert.ErrorContains(t, err, `option uplink="eth1": an internal network has no way out`)
}
