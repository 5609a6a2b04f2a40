package options

import (
	"encoding/json"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
)

func testNetwork() Network {
	return Network{ID: "n", Mode: ModeBridge, ContainerPrefix: "eth", Routes: []Route{{Destination: netip.MustParsePrefix("10.8.0.0/16")}}, Subnets: []Subnet{
		{Pool: netip.MustParsePrefix("10.2.0.0/24"), Gateway: netip.MustParseAddr("10.2.0.1")},
		{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
	}}
}

func TestParseEndpoint(t *testing.T) {
	mac := net.HardwareAddr{0x02, 0x42, 0xac, 0x11, 0x00, 0x02}
	for _, tc := range []struct {
		name     string
		iface    *network.EndpointInterface
		opts     map[string]any
		want     Endpoint
		warnings int
	}{
		{name: "no interface", want: Endpoint{ID: "e", NetworkID: "n"}},
		{name: "both addresses", iface: &network.EndpointInterface{Address: "10.2.0.2/24", AddressIPv6: "fd00:1::2/64"},
			want: Endpoint{ID: "e", NetworkID: "n", IPv4: netip.MustParsePrefix("10.2.0.2/24"), IPv6: netip.MustParsePrefix("fd00:1::2/64")}},
		{name: "what --mac-address sends", iface: &network.EndpointInterface{MacAddress: "02:42:ac:11:00:02"},
			opts: map[string]any{keyEndpointMAC: "AkKsEQAC"}, want: Endpoint{ID: "e", NetworkID: "n", MAC: mac}},
		{name: "options of Berth", opts: map[string]any{"mac": "02-42-AC-11-00-02", "ifname": "lan0"},
			want: Endpoint{ID: "e", NetworkID: "n", MAC: mac, ContainerName: "lan0"}},
		{name: "routes and rates", iface: &network.EndpointInterface{Address: "10.2.0.2/24"}, opts: map[string]any{
			"routes": "10.9.0.0/16 via 10.2.0.254; fd00:9::/64", "rate.in": "10mbit", "rate.out": "8000",
		}, want: Endpoint{ID: "e", NetworkID: "n", IPv4: netip.MustParsePrefix("10.2.0.2/24"), RateIn: 10_000_000, RateOut: 8000, Routes: []Route{
			{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParseAddr("10.2.0.254")}, {Destination: netip.MustParsePrefix("fd00:9::/64")},
		}}},
		{name: "one MAC, twice", iface: &network.EndpointInterface{MacAddress: "02:42:ac:11:00:02"}, opts: map[string]any{"mac": "02:42:ac:11:00:02"},
			want: Endpoint{ID: "e", NetworkID: "n", MAC: mac}},
		{name: "options of Docker", opts: map[string]any{
			keyIfname: "lan0", keyPortMap: []any{map[string]any{"Port": 80.0}}, keyExposedPorts: []any{},
			"com.docker.network.endpoint.dnsservers": []any{"10.0.0.1"}, "com.docker.network.endpoint.sysctls": "net.ipv4.conf.IFNAME.x=1",
			"com.docker.network.shiny": 1.0,
		}, want: Endpoint{ID: "e", NetworkID: "n", ContainerName: "lan0"}, warnings: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, warnings, err := ParseEndpoint(testNetwork(), "e", tc.iface, tc.opts)
			assert.NilError(t, err)
			assert.DeepEqual(t, got, tc.want, compareNetip())
			assert.Equal(t, len(warnings), tc.warnings, "%v", warnings)
		})
	}
}

func TestWrongEndpointsAreNamed(t *testing.T) {
	for _, tc := range []struct {
		name  string
		iface network.EndpointInterface
		opts  map[string]any
		want  string
	}{
		{name: "address without length", iface: network.EndpointInterface{Address: "10.2.0.2"}, want: `address "10.2.0.2": want an address with a prefix length`},
		{name: "families swapped", iface: network.EndpointInterface{Address: "fd00:1::2/64"}, want: "want an address with a prefix length"},
		{name: "elsewhere", iface: network.EndpointInterface{Address: "10.3.0.2/24"}, want: "address 10.3.0.2/24 is in no subnet of the network: it has 10.2.0.0/24, fd00:1::/64"},
		{name: "other length", iface: network.EndpointInterface{Address: "10.2.0.2/16"}, want: "want the prefix length of subnet 10.2.0.0/24"},
		{name: "gateway", iface: network.EndpointInterface{Address: "10.2.0.1/24"}, want: "address 10.2.0.1 is the network's gateway"},
		{name: "broadcast", iface: network.EndpointInterface{Address: "10.2.0.255/24"}, want: "want the address of a host"},
		{name: "multicast MAC", iface: network.EndpointInterface{MacAddress: "01:00:5e:00:00:01"}, want: `MacAddress="01:00:5e:00:00:01": want a unicast MAC address`},
		{name: "no MAC", iface: network.EndpointInterface{MacAddress: "00:00:00:00:00:00"}, want: "want a unicast MAC address"},
		{name: "long MAC", opts: map[string]any{"mac": "02:42:ac:11:00:02:00:01"}, want: "want a unicast MAC address"},
		{name: "two MACs", opts: map[string]any{"mac": "02:42:ac:11:00:02", keyEndpointMAC: "AkKsEQAD"}, want: "option mac=02:42:ac:11:00:02: the endpoint has MAC address 02:42:ac:11:00:03 already"},
		{name: "two MACs, one of --mac-address", iface: network.EndpointInterface{MacAddress: "02:42:ac:11:00:03"}, opts: map[string]any{"mac": "02:42:ac:11:00:02"}, want: "the endpoint has MAC address 02:42:ac:11:00:03 already, by --mac-address"},
		{name: "two names", opts: map[string]any{"ifname": "a", keyIfname: "b"}, want: "are the same one"},
		{name: "name with a slash", opts: map[string]any{keyIfname: "../x"}, want: `option com.docker.network.endpoint.ifname="../x": want 1 to 15 of`},
		{name: "no string", opts: map[string]any{"ifname": true}, want: "want a string, got bool"},
		{name: "near", opts: map[string]any{"ifnam": "x"}, want: `unknown option "ifnam": did you mean ifname`},
		{name: "near route", opts: map[string]any{"route": "x"}, want: "did you mean routes?"},
		{name: "rate", opts: map[string]any{"rate.out": "10mbps"}, want: `option rate.out="10mbps": want bits per second from 8kbit to 100gbit`},
		{name: "route elsewhere", opts: map[string]any{"routes": "10.9.0.0/16 via 10.3.0.1"}, want: "want the address of a host in a subnet of the network: it has 10.2.0.0/24, fd00:1::/64"},
		{name: "route of the network", opts: map[string]any{"routes": "10.8.0.0/16"}, want: "option routes: route to 10.8.0.0/16: the network has one to it"},
		{name: "route to an own subnet", opts: map[string]any{"routes": "fd00:1::/64"}, want: "route to fd00:1::/64: it is a subnet of the network itself"},
		{name: "route via itself", iface: network.EndpointInterface{Address: "10.2.0.9/24"}, opts: map[string]any{"routes": "10.9.0.0/16 via 10.2.0.9"}, want: "route to 10.9.0.0/16 via 10.2.0.9: it is the container's own address"},
		{name: "far", opts: map[string]any{"colour": "x"}, want: `unknown option "colour": Berth has ifname, mac, rate.in, rate.out and routes`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := ParseEndpoint(testNetwork(), "e", &tc.iface, tc.opts)
			assert.ErrorContains(t, err, tc.want)
			assert.Assert(t, errdefs.IsInvalidArgument(err) || errdefs.IsConflict(err), "%v", err)
		})
	}
	_, _, err := ParseEndpoint(testNetwork(), "../e", nil, nil)
	assert.ErrorContains(t, err, `EndpointID "../e"`)
}

func TestGenerateMAC(t *testing.T) {
	ep := Endpoint{ID: "e1", NetworkID: "n", IPv4: netip.MustParsePrefix("10.2.0.2/24")}
	mac := GenerateMAC(ep)
	assert.Equal(t, len(mac), 6)
	assert.Equal(t, mac[0]&0x03, byte(0x02), "%s is not locally administered unicast", mac)

	again := ep
	again.ID = "e2"
	assert.Equal(t, GenerateMAC(again).String(), mac.String(), "the ID of an endpoint is new at every start")
	for name, change := range map[string]func(*Endpoint){
		"address": func(ep *Endpoint) { ep.IPv4 = netip.MustParsePrefix("10.2.0.3/24") },
		"network": func(ep *Endpoint) { ep.NetworkID = "m" },
		"none":    func(ep *Endpoint) { ep.IPv4 = netip.Prefix{} },
	} {
		other := ep
		change(&other)
		assert.Assert(t, GenerateMAC(other).String() != mac.String(), name)
	}
}

func TestNamesOfLinks(t *testing.T) {
	id := "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	host, container := EndpointLinks(id, 0)
	assert.Equal(t, BridgeName(id, 0), "bth0123456789ab")
	assert.Equal(t, host, "bv0123456789ab")
	assert.Equal(t, container, "bc0123456789ab")
	seen := map[string]bool{}
	for _, id := range []string{id, "swarmidof25charsabcdefghi", "x", ""} {
		for attempt := range 3 {
			name := BridgeName(id, attempt)
			assert.Assert(t, !seen[name] && len(name) == 15, "%q", name)
			seen[name] = true
			_, err := parseLinkName("bridge", name, maxLinkName)
			assert.NilError(t, err)
		}
	}
}

func TestNearest(t *testing.T) {
	known := []string{"mtu", "mode", "masquerade", "com.docker.network.driver.mtu"}
	for key, want := range map[string]string{
		"mtu2": "mtu com.docker.network.driver.mtu", "mdoe": "mode", "masquerad": "masquerade", "x": "", "": "",
		strings.Repeat("m", 100): "",
	} {
		assert.Equal(t, strings.Join(nearest(key, known), " "), want, "%q", key)
	}
}

// What ParseEndpoint accepts can be built, and survives being stored.
func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{
		`{"NetworkID":"n","EndpointID":"e","Interface":{"Address":"10.2.0.2/24","AddressIPv6":"fd00:1::2/64","MacAddress":"02:42:ac:11:00:02"},"Options":{"com.docker.network.endpoint.macaddress":"AkKsEQAC","com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}]}}`,
		`{"EndpointID":"e","Interface":null,"Options":{"ifname":"lan0","mac":"02:42:ac:11:00:02"}}`,
		`{"EndpointID":"e","Interface":{"Address":"10.2.0.2/24"},"Options":{"routes":"10.9.0.0/16 via 10.2.0.254,fd00:9::/64","rate.in":"10mbit","rate.out":"1gbit"}}`,
		`{"EndpointID":"e","Options":{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"127.0.0.1","HostPort":8080,"HostPortEnd":8090},null,7]}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var req network.CreateEndpointRequest
		if json.Unmarshal(body, &req) != nil {
			return
		}
		n := testNetwork()
		ep, _, err := ParseEndpoint(n, req.EndpointID, req.Interface, req.Options)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err) || errdefs.IsConflict(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
			return
		}
		for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
			if p.IsValid() {
				subnet, ok := n.SubnetOf(p.Addr())
				assert.Assert(t, ok && subnet.Gateway != p.Addr() && subnet.Pool.Bits() == p.Bits())
			}
		}
		assert.Assert(t, ep.MAC == nil || len(ep.MAC) == 6 && ep.MAC[0]&1 == 0)
		for _, r := range ep.Routes {
			assert.Assert(t, r.Destination.Bits() > 0 && r.NextHop != ep.IPv4.Addr() || !r.NextHop.IsValid())
		}
		assertStored(t, ep)
	})
}
