package options

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// The modes of macvlan links (LAN.Type), as the kernel and Docker name them.
const (
	// MacvlanBridge: the containers on one parent reach each other.
	MacvlanBridge = "bridge"
	// MacvlanPrivate: they do not.
	MacvlanPrivate = "private"
	// MacvlanVEPA: they do by way of a switch that sends frames back.
	MacvlanVEPA = "vepa"
	// MacvlanPassthru: one container has the parent to itself.
	MacvlanPassthru = "passthru"
)

// The modes of ipvlan links (LAN.Type).
const (
	// IPvlanL2: the containers are on the parent's segment, with its MAC address.
	IPvlanL2 = "l2"
	// IPvlanL3: the host routes for them; neither ARP nor broadcasts.
	IPvlanL3 = "l3"
	// IPvlanL3S is IPvlanL3 with the host's netfilter in the way.
	IPvlanL3S = "l3s"
)

// The flags of ipvlan links (LAN.Flag), with the meaning of the macvlan modes.
const (
	IPvlanBridge  = "bridge"
	IPvlanPrivate = "private"
	IPvlanVEPA    = "vepa"
)

// A LAN says how the containers of a macvlan or ipvlan network are attached to a
// segment. The zero LAN is that of a bridge network.
type LAN struct {
	// Parent is the link of the host that the containers' links are on; "" is a
	// private one that leads nowhere. NAME.ID that does not exist is made, see VLAN.
	Parent string `json:",omitempty"`
	// Type is one of the modes above, never "".
	Type string `json:",omitempty"`
	// Flag is for ipvlan, never "" there.
	Flag string `json:",omitempty"`
	// HostAccess lets the host and the containers reach each other.
	HostAccess bool `json:",omitempty"`
	// HostAddrs are addresses of the host for that, which it gets; in subnets
	// without one it uses that of the parent. At most one for each subnet, sorted.
	HostAddrs []netip.Addr `json:",omitempty"`
	// BroadcastQueue is how many broadcasts may wait on the parent (macvlan); 0
	// leaves the kernel's 1000.
	BroadcastQueue int `json:",omitempty"`
	// GatewayBridge leaves the containers' way out, and their published ports, to
	// Docker's docker_gwbridge.
	GatewayBridge bool `json:",omitempty"`
}

// maxBroadcastQueue bounds what one network may ask of the kernel's memory.
const maxBroadcastQueue = 1_000_000

// IsLAN reports whether the mode attaches containers to a segment of the host's.
func (n Network) IsLAN() bool { return n.Mode == ModeMacvlan || n.Mode == ModeIPvlan }

// OnLAN reports whether the containers are on a segment of the host's or, without a
// parent, on one of their own, and not behind the host: their mode is LAN, or their
// bridge has an uplink.
func (n Network) OnLAN() bool { return n.IsLAN() || n.Uplink != "" }

// Segment is the link of the host that leads to the LAN that the containers are on:
// the parent, or the uplink of a bridge; "" is none.
func (n Network) Segment() string {
	if n.IsLAN() {
		return n.LAN.Parent
	}
	return n.Uplink
}

// SegmentVLAN splits the name of the Segment as LAN.VLAN does.
func (n Network) SegmentVLAN() (base string, id int, ok bool) { return LAN{Parent: n.Segment()}.VLAN() }

// VLAN splits the parent's name into link and VLAN ID, as "eth1.50"; ok is false
// when the name has not that form.
func (l LAN) VLAN() (base string, id int, ok bool) {
	const most = 4094
	at := strings.LastIndexByte(l.Parent, '.')
	if at <= 0 {
		return "", 0, false
	}
	digits := l.Parent[at+1:]
	id, err := strconv.Atoi(digits)
	if err != nil || id < 1 || id > most || strconv.Itoa(id) != digits {
		return "", 0, false
	}
	return l.Parent[:at], id, true
}

// routes3 reports whether the host routes for the containers, which have no
// segment to find a gateway on.
func (l LAN) routes3() bool { return l.Type == IPvlanL3 || l.Type == IPvlanL3S }

// needsNoGateway reports whether a gateway would have no use.
func (n Network) needsNoGateway() bool {
	return n.IsLAN() && (n.Internal || n.LAN.Parent == "" || n.LAN.routes3())
}

// GatewayOf is the default gateway of a container with this address of the network;
// the zero Addr means that it has none there.
func (n Network) GatewayOf(addr netip.Addr) netip.Addr {
	if n.Internal || !addr.IsValid() || n.LAN.GatewayBridge || n.needsNoGateway() {
		return netip.Addr{}
	}
	subnet, ok := n.SubnetOf(addr)
	if !ok {
		return netip.Addr{}
	}
	return subnet.DefaultGateway()
}

// WantsGatewayBridge reports whether Docker should connect the containers to its
// docker_gwbridge. Docker does so for networks without a gateway, unless it is told
// not to.
func (n Network) WantsGatewayBridge() bool { return n.LAN.GatewayBridge && !n.Internal }

// Publishes reports whether the network can publish ports on the host.
func (n Network) Publishes() bool { return !n.IsLAN() && !n.Internal && n.Uplink == "" }

// SharesMAC reports whether the containers have the MAC address of the parent: then
// they need none of their own.
func (n Network) SharesMAC() bool {
	return n.Mode == ModeIPvlan || n.Mode == ModeMacvlan && n.LAN.Type == MacvlanPassthru
}

// wayOut are the routes by which the containers of an ipvlan network in an l3 mode
// leave: everything is on the link. Two halves, since engines up to 27 cannot set a
// default route without a gateway, and later ones add docker_gwbridge to it.
func (n Network) wayOut() []Route {
	if !n.LAN.routes3() || n.Internal || n.LAN.Parent == "" || n.LAN.GatewayBridge {
		return nil
	}
	var routes []Route
	for _, half := range []string{"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"} {
		routes = append(routes, Route{Destination: netip.MustParsePrefix(half)})
	}
	return routes
}

func (n *Network) setMode(g given) error {
	switch mode := Mode(g.value); mode {
	case ModeBridge, ModeMacvlan, ModeIPvlan:
		n.Mode = mode
		return nil
	default:
		return fault.Invalid("option mode=%s: want bridge, macvlan or ipvlan", shown(g.value))
	}
}

func (n *Network) setParent(g given) (err error) {
	if g.value == "" {
		return nil
	}
	if n.LAN.Parent, err = parseLinkName(g.key, g.value, maxLinkName); err != nil {
		return err
	}
	// A name that looks like that of a VLAN but is none would be looked for in vain.
	at := strings.LastIndexByte(g.value, '.')
	if _, _, ok := n.LAN.VLAN(); !ok && at > 0 && strings.Trim(g.value[at+1:], "0123456789") == "" {
		return fault.Invalid("option %s=%s: want a VLAN ID from 1 to 4094 after the dot, as eth1.50", g.key, shown(g.value))
	}
	return nil
}

func oneOf(g given, words ...string) (string, error) {
	if g.value == "" {
		return words[0], nil
	}
	if !slices.Contains(words, g.value) {
		return "", fault.Invalid("option %s=%s: want %s", g.key, shown(g.value), orList(words))
	}
	return g.value, nil
}

func orList(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

func (n *Network) setMacvlan(g given) (err error) {
	n.LAN.Type, err = oneOf(g, MacvlanBridge, MacvlanPrivate, MacvlanVEPA, MacvlanPassthru)
	return err
}

func (n *Network) setIPvlan(g given) (err error) {
	n.LAN.Type, err = oneOf(g, IPvlanL2, IPvlanL3, IPvlanL3S)
	return err
}

func (n *Network) setIPvlanFlag(g given) (err error) {
	n.LAN.Flag, err = oneOf(g, IPvlanBridge, IPvlanPrivate, IPvlanVEPA)
	return err
}

func (n *Network) setBroadcastQueue(g given) (err error) {
	n.LAN.BroadcastQueue, err = parseInt(g.key, g.value, 1, maxBroadcastQueue)
	return err
}

// setHostAccess reads true, false, or addresses for the host.
func (n *Network) setHostAccess(g given) error {
	if b, err := strconv.ParseBool(g.value); err == nil || g.value == "" {
		n.LAN.HostAccess = b || g.value == ""
		return nil
	}
	for word := range strings.SplitSeq(g.value, ",") {
		addr, err := parseHostAddr(strings.TrimSpace(word))
		if err != nil || addr.IsUnspecified() {
			return fault.Invalid("option %s=%s: want true, false or an address for the host in each subnet, as 192.0.2.9,2001:db8::9", g.key, shown(g.value))
		}
		if !slices.Contains(n.LAN.HostAddrs, addr) {
			n.LAN.HostAddrs = append(n.LAN.HostAddrs, addr)
		}
	}
	slices.SortFunc(n.LAN.HostAddrs, netip.Addr.Compare)
	n.LAN.HostAccess = true
	return nil
}

// bridgeOnly are the options that need a bridge, with the reason.
func bridgeOnly() map[string]string {
	const (
		noBridge   = "there is no bridge"
		asIs       = "traffic leaves as the containers send it"
		noPublish  = "the containers are reached by their own addresses, no port is published"
		noHostLink = "the host has no end of the containers' links that it could limit"
	)
	return map[string]string{
		"bridge": noBridge, "inhibit4": noBridge, "gateway4": noBridge, "gateway6": noBridge,
		"icc":        "whether containers reach each other is said by macvlan_mode or ipvlan_flag",
		"masquerade": asIs, "source4": asIs, "source6": asIs,
		"binding4": noPublish, "binding6": noPublish, "trusted": noPublish, "proxy": noPublish, "publish": noPublish,
		"rate.in": noHostLink, "rate.out": noHostLink,
	}
}

// decideMode finds the mode that the options speak of, and refuses those that the
// mode has no use for.
func (n *Network) decideMode(values map[string]given) error {
	mode, given := values["mode"]
	if !given {
		switch {
		case has(values, "ipvlan_mode"), has(values, "ipvlan_flag"):
			n.Mode = ModeIPvlan
		case has(values, "macvlan_mode"), has(values, "parent"):
			n.Mode = ModeMacvlan
		}
	}
	for _, o := range []struct {
		short string
		modes []Mode
	}{
		{"parent", []Mode{ModeMacvlan, ModeIPvlan}},
		{"host-access", []Mode{ModeMacvlan, ModeIPvlan}},
		{"macvlan_mode", []Mode{ModeMacvlan}},
		{"bcqueuelen", []Mode{ModeMacvlan}},
		{"ipvlan_mode", []Mode{ModeIPvlan}},
		{"ipvlan_flag", []Mode{ModeIPvlan}},
		{"uplink", []Mode{ModeBridge}},
		{"spoof-check", []Mode{ModeBridge}},
	} {
		g, ok := values[o.short]
		if !ok || slices.Contains(o.modes, n.Mode) {
			continue
		}
		words := make([]string, len(o.modes))
		for i, m := range o.modes {
			words[i] = string(m)
		}
		how := "create it with -o mode=" + strings.Join(words, " or ")
		if mode.value != "" {
			how = "the network has mode " + mode.value
		}
		return fault.Invalid("option %s=%s: it is for networks of mode %s, %s", g.key, shown(g.value), strings.Join(words, " and "), how)
	}
	if !n.IsLAN() {
		if n.LAN.GatewayBridge {
			return fault.Invalid("option %s=gwbridge: it is for networks of mode macvlan and ipvlan, a bridge network publishes ports itself", optionName(values, "publish"))
		}
		return n.checkUplink(values)
	}
	return n.checkLAN(values)
}

func has(values map[string]given, short string) bool {
	_, ok := values[short]
	return ok
}

// checkLAN checks and completes the options of a macvlan or ipvlan network.
func (n *Network) checkLAN(values map[string]given) error {
	for short, why := range bridgeOnly() {
		g, ok := values[short]
		switch {
		case !ok, short == "publish" && n.LAN.GatewayBridge:
		case (short == "gateway4" || short == "gateway6") && (g.value == "" || g.value == string(GatewayNAT)):
		default:
			return fault.Invalid("option %s=%s: not for a network of mode %s: %s", g.key, shown(g.value), n.Mode, why)
		}
	}
	// Nothing of the host's is in the way of the traffic.
	n.Masquerade = false
	if n.LAN.Type == "" {
		if n.LAN.Type = MacvlanBridge; n.Mode == ModeIPvlan {
			n.LAN.Type = IPvlanL2
		}
	}
	if n.Mode == ModeIPvlan && n.LAN.Flag == "" {
		n.LAN.Flag = IPvlanBridge
	}
	if n.LAN.HostAccess {
		return n.checkHostAccess(values)
	}
	return nil
}

func (n *Network) checkHostAccess(values map[string]given) error {
	refuse := func(short, value, why string) error {
		return fault.Invalid("options %s=%s and %s=%s: %s, leave one of them out",
			optionName(values, "host-access"), shown(values["host-access"].value), short, value, why)
	}
	switch {
	case n.LAN.Parent == "":
		return fault.Invalid("option host-access=%s: want a parent too, without one the network is apart from the host", shown(values["host-access"].value))
	case n.LAN.Flag == IPvlanPrivate, n.LAN.Flag == IPvlanVEPA:
		return refuse("ipvlan_flag", n.LAN.Flag, "the kernel keeps such links apart on the host")
	case n.LAN.Type == MacvlanPrivate, n.LAN.Type == MacvlanPassthru:
		return refuse("macvlan_mode", n.LAN.Type, "the kernel keeps such links apart from all others on the host")
	case n.LAN.Type == MacvlanVEPA:
		return refuse("macvlan_mode", n.LAN.Type, "with a switch that sends frames back the containers reach the host already, and no other helps")
	case n.LAN.Type == IPvlanL2 && len(n.LAN.HostAddrs) == 0:
		return fault.Invalid("option host-access=%s: with ipvlan_mode=l2 the host needs an address of its own beside the parent's, want one for each subnet, as host-access=192.0.2.9",
			shown(values["host-access"].value))
	}
	return nil
}

// HostAddrIn is the address that the host was given in a subnet for the containers
// to reach; the zero Addr is none.
func (l LAN) HostAddrIn(s Subnet) netip.Addr {
	for _, addr := range l.HostAddrs {
		if s.Pool.Contains(addr) {
			return addr
		}
	}
	return netip.Addr{}
}

// checkHostAddrs checks the host's own addresses against the subnets.
func (n *Network) checkHostAddrs() error {
	seen := map[netip.Prefix]netip.Addr{}
	for _, addr := range n.LAN.HostAddrs {
		subnet, ok := n.SubnetOf(addr)
		switch {
		case !ok || !isHostIn(subnet.Pool, addr):
			return fault.Invalid("option host-access=%s: want the address of a host in a subnet of the network: it has %s", addr, subnetList(*n))
		case seen[subnet.Pool].IsValid():
			return fault.Invalid("option host-access: addresses %s and %s are both in subnet %s: want one for each", seen[subnet.Pool], addr, subnet.Pool)
		case addr == subnet.Gateway, addr == subnet.ContainerGateway:
			return fault.Invalid("option host-access=%s: it is the gateway of subnet %s: want an address that nobody has", addr, subnet.Pool)
		}
		seen[subnet.Pool] = addr
	}
	return nil
}

// checkLAN refuses what the link of a LAN network cannot be given.
func (ep Endpoint) checkLAN(n Network) error {
	switch {
	case n.Mode == ModeIPvlan && ep.MAC != nil:
		return fault.Invalid("MAC address %s: the containers of an ipvlan network have that of the parent, leave --mac-address out (and the setting BERTH_IPAM_KEY=mac off) or use mode macvlan", ep.MAC)
	case n.IsLAN() && (ep.RateIn != 0 || ep.RateOut != 0):
		return fault.Invalid("options rate.in and rate.out: not for a network of mode %s: %s", n.Mode, bridgeOnly()["rate.in"])
	}
	return nil
}
