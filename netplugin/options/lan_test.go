package options

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
)

// lanNetwork parses a network of these options (k=v words) and subnets, gateways
// after a slash-less "@".
func lanNetwork(internal bool, words string, subnets ...string) (Network, []string, error) {
	opts := map[string]any{}
	for word := range strings.FieldsSeq(words) {
		key, value, _ := strings.Cut(word, "=")
		opts[key] = value
	}
	var v4, v6 []*network.IPAMData
	for _, s := range subnets {
		pool, gateway, _ := strings.Cut(s, "@")
		data := &network.IPAMData{Pool: pool, Gateway: gateway}
		if strings.Contains(pool, ":") {
			v6 = append(v6, data)
		} else {
			v4 = append(v4, data)
		}
	}
	return ParseNetwork("n", map[string]any{keyGeneric: opts, keyInternal: internal}, v4, v6)
}

func TestLANNetworks(t *testing.T) {
	for _, c := range []struct {
		words string
		mode  Mode
		want  LAN
	}{
		{"parent=eth1", ModeMacvlan, LAN{Parent: "eth1", Type: "bridge"}},
		{"mode=macvlan", ModeMacvlan, LAN{Type: "bridge"}},
		{"mode=macvlan parent=", ModeMacvlan, LAN{Type: "bridge"}},
		{"macvlan_mode=", ModeMacvlan, LAN{Type: "bridge"}},
		{"macvlan_mode=passthru parent=eth1.50 bcqueuelen=3000", ModeMacvlan, LAN{Parent: "eth1.50", Type: "passthru", BroadcastQueue: 3000}},
		{"macvlan_mode=vepa parent=eth1 gateway4=nat", ModeMacvlan, LAN{Parent: "eth1", Type: "vepa"}},
		{"ipvlan_mode=l3s parent=eth1", ModeIPvlan, LAN{Parent: "eth1", Type: "l3s", Flag: "bridge"}},
		{"mode=ipvlan parent=eth1 ipvlan_flag=vepa", ModeIPvlan, LAN{Parent: "eth1", Type: "l2", Flag: "vepa"}},
		{"ipvlan_flag=private", ModeIPvlan, LAN{Type: "l2", Flag: "private"}},
		{"parent=eth1 host-access=", ModeMacvlan, LAN{Parent: "eth1", Type: "bridge", HostAccess: true}},
		{"parent=eth1 host-access=false", ModeMacvlan, LAN{Parent: "eth1", Type: "bridge"}},
		{"parent=eth1 host-access=10.2.0.9,fd00:1::9", ModeMacvlan, LAN{
			Parent: "eth1", Type: "bridge", HostAccess: true, HostAddrs: []netip.Addr{netip.MustParseAddr("10.2.0.9"), netip.MustParseAddr("fd00:1::9")},
		}},
		{"parent=eth1 publish=gwbridge", ModeMacvlan, LAN{Parent: "eth1", Type: "bridge", GatewayBridge: true}},
	} {
		n, warnings, err := lanNetwork(false, c.words, "10.2.0.0/24", "fd00:1::/64")
		assert.NilError(t, err, c.words)
		assert.Equal(t, len(warnings), 0, "%v", warnings)
		assert.Equal(t, n.Mode, c.mode, c.words)
		assert.DeepEqual(t, n.LAN, c.want, compareNetip())
		assert.Assert(t, n.IsLAN() && !n.Masquerade && !n.Publishes() && n.SkipGateway4() && n.SkipGateway6())
	}
}

func TestWrongLANOptionsAreNamed(t *testing.T) {
	for _, c := range []struct{ words, want string }{
		{"mode=bridge parent=eth1", `option parent="eth1": it is for networks of mode macvlan and ipvlan, the network has mode bridge`},
		{"host-access=true", `option host-access="true": it is for networks of mode macvlan and ipvlan, create it with -o mode=macvlan or ipvlan`},
		{"bcqueuelen=100", "it is for networks of mode macvlan, create it with -o mode=macvlan"},
		{"mode=macvlan ipvlan_mode=l2", `option ipvlan_mode="l2": it is for networks of mode ipvlan, the network has mode macvlan`},
		{"macvlan_mode=bridge ipvlan_mode=l2", `option macvlan_mode="bridge": it is for networks of mode macvlan, create it with`},
		{"publish=gwbridge", "option publish=gwbridge: it is for networks of mode macvlan and ipvlan, a bridge network publishes ports itself"},
		{"macvlan_mode=source", `option macvlan_mode="source": want bridge, private, vepa or passthru`},
		{"ipvlan_mode=l4", `option ipvlan_mode="l4": want l2, l3 or l3s`},
		{"ipvlan_flag=x", `want bridge, private or vepa`},
		{"parent=lo", "the kernel uses this name itself"},
		{"parent=eth1/0", "want 1 to 15 of"},
		{"parent=eth1.4095", `option parent="eth1.4095": want a VLAN ID from 1 to 4094 after the dot, as eth1.50`},
		{"parent=eth1.0", "want a VLAN ID"},
		{"parent=eth1.007", "want a VLAN ID"},
		{"parent=eth1 bcqueuelen=0", `option bcqueuelen="0": want a number from 1 to 1000000`},
		{"parent=eth1 icc=false", `option icc="false": not for a network of mode macvlan: whether containers reach each other is said by macvlan_mode or ipvlan_flag`},
		{"parent=eth1 com.docker.network.bridge.name=br1", `option com.docker.network.bridge.name="br1": not for a network of mode macvlan: there is no bridge`},
		{"parent=eth1 gateway4=routed", "not for a network of mode macvlan: there is no bridge"},
		{"parent=eth1 masquerade=true", "not for a network of mode macvlan"},
		{"ipvlan_mode=l2 publish=host-firewall", "not for a network of mode ipvlan: the containers are reached by their own addresses"},
		{"parent=eth1 rate.out=1mbit", "the host has no end of the containers' links that it could limit"},
		{"mode=macvlan host-access=true", `option host-access="true": want a parent too`},
		{"parent=eth1 macvlan_mode=private host-access=true", `options host-access="true" and macvlan_mode=private: the kernel keeps such links apart`},
		{"parent=eth1 macvlan_mode=passthru host-access=true", "leave one of them out"},
		{"parent=eth1 macvlan_mode=vepa host-access=true", "the containers reach the host already"},
		{"parent=eth1 ipvlan_flag=private host-access=10.2.0.9", "ipvlan_flag=private"},
		{"parent=eth1 ipvlan_mode=l2 host-access=true", "with ipvlan_mode=l2 the host needs an address of its own"},
		{"parent=eth1 host-access=maybe", `option host-access="maybe": want true, false or an address`},
		{"parent=eth1 host-access=10.3.0.9", "option host-access=10.3.0.9: want the address of a host in a subnet of the network: it has 10.2.0.0/24"},
		{"parent=eth1 host-access=10.2.0.9,10.2.0.8", "addresses 10.2.0.8 and 10.2.0.9 are both in subnet 10.2.0.0/24: want one for each"},
		{"parent=eth1 host-access=10.2.0.1", "it is the gateway of subnet 10.2.0.0/24"},
	} {
		_, _, err := lanNetwork(false, c.words, "10.2.0.0/24@10.2.0.1", "fd00:1::/64")
		assert.ErrorContains(t, err, c.want, c.words)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}

func TestVLANs(t *testing.T) {
	for name, want := range map[string]string{"eth1.50": "eth1 50", "a.b.4094": "a.b 4094", "eth1": "", "eth1.": "", ".50": "", "eth1.x": "", "eth1.4095": "", "eth1.050": ""} {
		base, id, ok := LAN{Parent: name}.VLAN()
		assert.Equal(t, ok, want != "", name)
		if ok {
			wantBase, wantID, _ := strings.Cut(want, " ")
			assert.Equal(t, base, wantBase)
			n, err := parseInt("", wantID, 1, 4094)
			assert.NilError(t, err)
			assert.Equal(t, id, n)
		}
	}
}

func TestWaysOutOfALAN(t *testing.T) {
	one, six := netip.MustParsePrefix("10.2.0.5/24"), netip.MustParsePrefix("fd00:1::5/64")
	ep := Endpoint{ID: "e", NetworkID: "n", IPv4: one, IPv6: six}
	for _, c := range []struct {
		words        string
		internal     bool
		four, six    string
		routes, warn int
		bridge       bool
	}{
		{"parent=eth1", false, "10.2.0.1", "", 0, 0, false},
		{"parent=eth1", true, "", "", 0, 1, false},
		{"mode=macvlan", false, "", "", 0, 1, false},
		{"parent=eth1 publish=gwbridge", false, "", "", 0, 0, true},
		{"parent=eth1 publish=gwbridge", true, "", "", 0, 1, false},
		{"parent=eth1 ipvlan_mode=l2", false, "10.2.0.1", "", 0, 0, false},
		{"parent=eth1 ipvlan_mode=l3", false, "", "", 4, 1, false},
		{"parent=eth1 ipvlan_mode=l3s", false, "", "", 4, 1, false},
		{"parent=eth1 ipvlan_mode=l3 publish=gwbridge", false, "", "", 0, 1, true},
		{"ipvlan_mode=l3", false, "", "", 0, 1, false},
	} {
		n, warnings, err := lanNetwork(c.internal, c.words, "10.2.0.0/24@10.2.0.1", "fd00:1::/64")
		assert.NilError(t, err)
		text := func(a netip.Addr) string {
			if !a.IsValid() {
				return ""
			}
			return a.String()
		}
		assert.Equal(t, text(n.GatewayOf(one.Addr())), c.four, "%+v", c)
		assert.Equal(t, text(n.GatewayOf(six.Addr())), c.six, "%+v", c)
		assert.Equal(t, len(n.RoutesOf(ep)), c.routes, "%+v", c)
		assert.Equal(t, len(warnings), c.warn, "%+v %v", c, warnings)
		assert.Equal(t, n.WantsGatewayBridge(), c.bridge, "%+v", c)
	}
}

func TestEndpointsOfALAN(t *testing.T) {
	macvlan, _, err := lanNetwork(false, "parent=eth1 host-access=10.2.0.9", "10.2.0.0/24")
	assert.NilError(t, err)
	ipvlan, _, err := lanNetwork(false, "parent=eth1 ipvlan_mode=l2", "10.2.0.0/24")
	assert.NilError(t, err)
	passthru, _, err := lanNetwork(false, "parent=eth1 macvlan_mode=passthru", "10.2.0.0/24")
	assert.NilError(t, err)
	assert.Assert(t, !macvlan.SharesMAC() && ipvlan.SharesMAC() && passthru.SharesMAC())
	for _, c := range []struct {
		n          Network
		addr, mac  string
		opts       map[string]any
		want       string
		isConflict bool
	}{
		{n: macvlan, addr: "10.2.0.5/24", mac: "02:00:00:00:00:01"},
		{n: passthru, addr: "10.2.0.5/24", mac: "02:00:00:00:00:01"},
		{n: ipvlan, addr: "10.2.0.5/24"},
		{n: ipvlan, addr: "10.2.0.5/24", mac: "02:00:00:00:00:01", want: "the containers of an ipvlan network have that of the parent"},
		{n: macvlan, addr: "10.2.0.9/24", want: "address 10.2.0.9 is the host's", isConflict: true},
		{n: macvlan, opts: map[string]any{"rate.in": "1mbit"}, want: "options rate.in and rate.out: not for a network of mode macvlan"},
	} {
		_, _, err := ParseEndpoint(c.n, "e", &network.EndpointInterface{Address: c.addr, MacAddress: c.mac}, c.opts)
		if c.want == "" {
			assert.NilError(t, err)
			continue
		}
		assert.ErrorContains(t, err, c.want)
		assert.Equal(t, errdefs.IsConflict(err), c.isConflict)
	}
}

func TestNamesOfSharedLinks(t *testing.T) {
	private, peer := PrivateLinks(strings.Repeat("0123456789ab", 5) + "cdef")
	assert.Equal(t, private, "bp0123456789ab")
	assert.Equal(t, peer, "bq0123456789ab")
	shim := ShimName("eth1.50")
	assert.Assert(t, strings.HasPrefix(shim, "bs") && len(shim) <= maxLinkName && shim != ShimName("eth1"), shim)
	// Names of parents may look like IDs.
	assert.Assert(t, ShimName("0123456789abc") != ShimName("0123456789abd"))
}
