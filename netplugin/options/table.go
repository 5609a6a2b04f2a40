package options

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// A networkOption is one that ParseNetwork reads.
type networkOption struct {
	// docker is the name in Docker's bridge driver, "" when it has none.
	docker string
	// set reads the value. An option that is not given keeps the default.
	set func(n *Network, g given) error
}

// keyBinding is Docker's only name for a default binding. In spite of it, Docker
// takes an IPv6 address too.
const keyBinding = "com.docker.network.bridge.host_binding_ipv4"

// networkOptions are the options of a network by Berth's short name.
func networkOptions() map[string]networkOption {
	known := map[string]networkOption{
		"mode":         {"", (*Network).setMode},
		"bridge":       {"com.docker.network.bridge.name", (*Network).setBridge},
		"mtu":          {"com.docker.network.driver.mtu", (*Network).setMTU},
		"ifprefix":     {"com.docker.network.container_iface_prefix", (*Network).setPrefix},
		"gateway4":     {"com.docker.network.bridge.gateway_mode_ipv4", func(n *Network, g given) error { return n.IPv4.setMode(g) }},
		"gateway6":     {"com.docker.network.bridge.gateway_mode_ipv6", func(n *Network, g given) error { return n.IPv6.setMode(g) }},
		"masquerade":   {"com.docker.network.bridge.enable_ip_masquerade", flag(func(n *Network, b bool) { n.Masquerade = b })},
		"icc":          {"com.docker.network.bridge.enable_icc", flag(func(n *Network, b bool) { n.NoICC = !b })},
		"inhibit4":     {"com.docker.network.bridge.inhibit_ipv4", flag(func(n *Network, b bool) { n.InhibitIPv4 = b })},
		"proxy":        {"", flag(func(n *Network, b bool) { n.NoProxy = !b })},
		"source4":      {"com.docker.network.host_ipv4", func(n *Network, g given) error { return setSource(&n.IPv4, g, false) }},
		"source6":      {"com.docker.network.host_ipv6", func(n *Network, g given) error { return setSource(&n.IPv6, g, true) }},
		"binding4":     {keyBinding, (*Network).setBinding4},
		"binding6":     {"", (*Network).setBinding6},
		"trusted":      {"com.docker.network.bridge.trusted_host_interfaces", (*Network).setTrusted},
		"publish":      {"", (*Network).setPublish},
		"uplink":       {"", (*Network).setUplink},
		"spoof-check":  {"", flag(func(n *Network, b bool) { n.SpoofCheck = b })},
		"parent":       {"", (*Network).setParent},
		"macvlan_mode": {"", (*Network).setMacvlan},
		"ipvlan_mode":  {"", (*Network).setIPvlan},
		"ipvlan_flag":  {"", (*Network).setIPvlanFlag},
		"bcqueuelen":   {"", (*Network).setBroadcastQueue},
		"host-access":  {"", (*Network).setHostAccess},
		"routes":       {"", func(n *Network, g given) (err error) { n.Routes, err = parseRoutes(g); return err }},
		"rate.in":      {"", func(n *Network, g given) (err error) { n.RateIn, err = parseRate(g); return err }},
		"rate.out":     {"", func(n *Network, g given) (err error) { n.RateOut, err = parseRate(g); return err }},
	}
	for name := range poolOptions() {
		// The parent is the network's own.
		if name != "parent" {
			known[ipamPrefix+name] = networkOption{"", setPoolOption(name)}
		}
	}
	return known
}

// networkNames maps every name of an option to Berth's short one.
func networkNames() map[string]string {
	names := make(map[string]string)
	for short, option := range networkOptions() {
		names[short] = short
		if option.docker != "" {
			names[option.docker] = short
		}
	}
	return names
}

// listedOptions are Berth's own names of the options of a network. Those of its pools
// are one.
func listedOptions() []string {
	names := []string{ipamPrefix + "*"}
	for name := range networkOptions() {
		if !strings.HasPrefix(name, ipamPrefix) {
			names = append(names, name)
		}
	}
	return names
}

// ownNames are Berth's own names in a sentence.
func ownNames(names []string) string {
	slices.Sort(names)
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " and " + names[last]
}

// set reads the values of the options that were given.
func (n *Network) set(values map[string]given) error {
	known := networkOptions()
	for _, short := range slices.Sorted(maps.Keys(values)) {
		if err := known[short].set(n, values[short]); err != nil {
			return err
		}
	}
	if err := n.decideMode(values); err != nil {
		return err
	}
	return n.check(values)
}

func flag(set func(*Network, bool)) func(*Network, given) error {
	return func(n *Network, g given) error {
		b, err := parseBool(g.key, g.value)
		if err == nil {
			set(n, b)
		}
		return err
	}
}

func (n *Network) setBridge(g given) (err error) {
	n.Bridge, err = parseLinkName(g.key, g.value, maxLinkName)
	return err
}

func (n *Network) setMTU(g given) (err error) {
	if g.value == "0" {
		return nil
	}
	n.MTU, err = parseInt(g.key, g.value, minMTU4, maxMTU)
	return err
}

func (n *Network) setPrefix(g given) (err error) {
	// dockerd appends a number of up to three digits.
	n.ContainerPrefix, err = parseLinkName(g.key, g.value, maxLinkName-3)
	return err
}

func (f *Family) setMode(g given) error {
	switch mode := GatewayMode(g.value); mode {
	case "":
	case GatewayNAT, GatewayUnprotected, GatewayRouted, GatewayIsolated:
		f.Mode = mode
	default:
		if _, err := netip.ParseAddr(g.value); err == nil {
			return fault.Invalid("option %s=%s: want nat, nat-unprotected, routed or isolated; the gateway's address is given with --gateway", g.key, shown(g.value))
		}
		return fault.Invalid("option %s=%s: want nat, nat-unprotected, routed or isolated", g.key, shown(g.value))
	}
	return nil
}

func setSource(f *Family, g given, is6 bool) (err error) {
	if g.value == "" {
		return nil
	}
	f.Source, err = parseOwn(g, is6)
	if err == nil && f.Source.IsUnspecified() {
		err = fault.Invalid("option %s=%s: want one address of the host; without the option it is that of the outgoing link", g.key, shown(g.value))
	}
	return err
}

// setBinding4 keeps 0.0.0.0, which differs from none where binding6 is given.
func (n *Network) setBinding4(g given) (err error) {
	if g.value == "" {
		return nil
	}
	if addr, err := parseHostAddr(g.value); err == nil && addr.Is6() && g.key == keyBinding {
		return n.setBinding6(g)
	}
	n.IPv4.Binding, err = parseOwn(g, false)
	return err
}

func (n *Network) setBinding6(g given) (err error) {
	if g.value == "" {
		return nil
	}
	addr, err := parseOwn(g, true)
	if err == nil && n.IPv6.Binding.IsValid() && n.IPv6.Binding != addr {
		return fault.Invalid("options %s=%s and %s=%s are the same one: give one of them", keyBinding, n.IPv6.Binding, g.key, addr)
	}
	n.IPv6.Binding = addr
	return err
}

// parseOwn reads an address of the host.
func parseOwn(g given, is6 bool) (netip.Addr, error) {
	addr, err := parseHostAddr(g.value)
	if err != nil || addr.Is6() != is6 {
		want := "an IPv4 address"
		if is6 {
			want = "an IPv6 address"
		}
		return netip.Addr{}, fault.Invalid("option %s=%s: want %s of the host, without prefix length or zone", g.key, shown(g.value), want)
	}
	return addr, nil
}

// setTrusted reads names of links; Docker separates them with colons.
func (n *Network) setTrusted(g given) error {
	names := strings.FieldsFunc(g.value, func(r rune) bool { return r == ':' || r == ',' })
	if len(names) > maxTrusted {
		return fault.Invalid("option %s: want at most %d links, got %d", g.key, maxTrusted, len(names))
	}
	for _, name := range names {
		name, err := parseLinkName(g.key, strings.TrimSpace(name), maxLinkName)
		if err != nil {
			return err
		}
		if !slices.Contains(n.Trusted, name) {
			n.Trusted = append(n.Trusted, name)
		}
	}
	return nil
}
