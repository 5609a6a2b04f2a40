package options

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
)

// Keys that dockerd sets beside the user's options.
const (
	keyGeneric    = "com.docker.network.generic"
	keyInternal   = "com.docker.network.internal"
	keyEnableIPv4 = "com.docker.network.enable_ipv4"
	keyEnableIPv6 = "com.docker.network.enable_ipv6"
)

// dockerPrefix begins the names that engines may add at any time.
const dockerPrefix = "com.docker.network."

// Range of a bridge's MTU in bytes: the least IPv4 datagram every host takes
// (RFC 791), the least link for IPv6 (RFC 8200, section 5), the kernel's most.
const (
	minMTU4 = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

// networkOwn are Berth's own names, for messages.
const networkOwn = "bridge, icc, ifprefix, masquerade, mode and mtu"

// notYet is what a network option must not ask for: the values that describe
// what Berth does anyway pass, all others are refused.
type notYet struct {
	// same reports whether the value describes what Berth does.
	same func(value string) bool
	// want names such values.
	want string
}

func networkNotYet() map[string]notYet {
	isTrue := notYet{func(v string) bool { b, err := parseBool("", v); return err == nil && b }, "true"}
	isFalse := notYet{func(v string) bool { b, err := parseBool("", v); return err == nil && !b }, "false"}
	nat := notYet{func(v string) bool { return v == "" || v == "nat" }, "nat"}
	anyHost := notYet{func(v string) bool { return v == "" || v == "0.0.0.0" || v == "::" }, "0.0.0.0"}
	none := notYet{func(v string) bool { return v == "" }, "no value"}
	return map[string]notYet{
		"icc":                                               isTrue,
		"com.docker.network.bridge.enable_icc":              isTrue,
		"com.docker.network.bridge.inhibit_ipv4":            isFalse,
		"com.docker.network.bridge.default_bridge":          isFalse,
		"com.docker.network.bridge.gateway_mode_ipv4":       nat,
		"com.docker.network.bridge.gateway_mode_ipv6":       nat,
		"com.docker.network.bridge.host_binding_ipv4":       anyHost,
		"com.docker.network.bridge.trusted_host_interfaces": none,
		"com.docker.network.host_ipv4":                      none,
		"com.docker.network.host_ipv6":                      none,
	}
}

// networkOther are names that belong to other modes of network.
func networkOther() []string {
	return []string{"parent", "macvlan_mode", "ipvlan_mode", "ipvlan_flag"}
}

// networkDockerd are names on which dockerd acts itself for every driver.
func networkDockerd() []string {
	return []string{
		"com.docker.network.advertise_addr_nmsgs",
		"com.docker.network.advertise_addr_ms",
	}
}

// networkNames maps every option that ParseNetwork reads to Berth's short name
// for it.
func networkNames() map[string]string {
	return map[string]string{
		"mode":                           "mode",
		"bridge":                         "bridge",
		"mtu":                            "mtu",
		"masquerade":                     "masquerade",
		"ifprefix":                       "ifprefix",
		"com.docker.network.bridge.name": "bridge",
		"com.docker.network.driver.mtu":  "mtu",
		"com.docker.network.bridge.enable_ip_masquerade": "masquerade",
		"com.docker.network.container_iface_prefix":      "ifprefix",
	}
}

// ParseNetwork reads the options and address pools of CreateNetwork. Warnings
// are one line each, for the log. The error is invalid and names the option, its
// value and what is allowed.
func ParseNetwork(id string, opts map[string]any, v4, v6 []*network.IPAMData) (Network, []string, error) {
	if err := checkID("NetworkID", id); err != nil {
		return Network{}, nil, err
	}
	n, warnings, err := ParseNetworkOptions(opts)
	if err != nil {
		return Network{}, nil, err
	}
	n.ID = id
	if n.Subnets, err = parseSubnets(v4, v6); err != nil {
		return Network{}, nil, err
	}
	for _, subnet := range n.Subnets {
		if subnet.Pool.Addr().Is6() && n.MTU != 0 && n.MTU < minMTU6 {
			return Network{}, nil, fault.Invalid("option mtu=%d: want a number from %d to %d on a network with IPv6", n.MTU, minMTU6, maxMTU)
		}
	}
	return n, warnings, nil
}

// ParseNetworkOptions reads the options alone, as GwAllocCheck sends them before
// there are address pools. The result has no ID and no subnets.
func ParseNetworkOptions(opts map[string]any) (Network, []string, error) {
	n := Network{Mode: ModeBridge, Masquerade: true, ContainerPrefix: "eth"}
	var warnings []string
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		var err error
		switch key {
		case keyGeneric:
		case keyInternal:
			n.Internal, err = parseFlag(key, opts[key])
		case keyEnableIPv4, keyEnableIPv6:
			// Whether a family is on shows in its pools.
			_, err = parseFlag(key, opts[key])
		default:
			warnings = append(warnings, fmt.Sprintf("option %s is not known to Berth and has no effect", shown(key)))
		}
		if err != nil {
			return Network{}, nil, err
		}
	}
	generic, err := parseGeneric(opts[keyGeneric])
	if err != nil {
		return Network{}, nil, err
	}
	values, more, err := sortNetworkOptions(generic)
	if err != nil {
		return Network{}, nil, err
	}
	if err := n.set(values); err != nil {
		return Network{}, nil, err
	}
	return n, append(warnings, more...), nil
}

// parseGeneric reads the map of the user's options. Newer engines always send
// it, older ones leave it out when there are none.
func parseGeneric(value any) (map[string]string, error) {
	switch m := value.(type) {
	case nil:
		return nil, nil
	case map[string]string:
		return m, nil
	case map[string]any:
		out := make(map[string]string, len(m))
		for _, key := range slices.Sorted(maps.Keys(m)) {
			s, err := text(key, m[key])
			if err != nil {
				return nil, err
			}
			out[key] = s
		}
		return out, nil
	default:
		return nil, fault.Invalid("option %s: want an object, got %T", keyGeneric, value)
	}
}

// given is one option as the user wrote it.
type given struct {
	key, value string
}

// sortNetworkOptions refuses what cannot be had and returns the rest by short
// name.
func sortNetworkOptions(opts map[string]string) (map[string]given, []string, error) {
	names, later := networkNames(), networkNotYet()
	values := make(map[string]given)
	var warnings []string
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		value := opts[key]
		short, ok := names[key]
		switch {
		case ok:
			if first, twice := values[short]; twice && first.value != value {
				return nil, nil, fault.Invalid("options %s=%s and %s=%s are the same one: give one of them",
					first.key, shown(first.value), key, shown(value))
			}
			values[short] = given{key, value}
		case later[key].same != nil:
			if !later[key].same(value) {
				return nil, nil, fault.Invalid("option %s=%s: not supported yet, want %s", key, shown(value), later[key].want)
			}
		case slices.Contains(networkOther(), key):
			return nil, nil, fault.Invalid("option %s=%s: not supported yet, Berth makes bridge networks only", key, shown(value))
		case slices.Contains(networkDockerd(), key):
		case strings.HasPrefix(key, dockerPrefix):
			warnings = append(warnings, fmt.Sprintf("option %s=%s is not known to Berth and has no effect", shown(key), shown(value)))
		default:
			known := slices.Concat(slices.Collect(maps.Keys(names)), slices.Collect(maps.Keys(later)), networkOther())
			return nil, nil, unknown(key, known, networkOwn)
		}
	}
	return values, warnings, nil
}

// set reads the values of the options that were given.
func (n *Network) set(values map[string]given) (err error) {
	for _, short := range slices.Sorted(maps.Keys(values)) {
		g := values[short]
		switch short {
		case "mode":
			err = checkMode(g)
		case "bridge":
			n.Bridge, err = parseLinkName(g.key, g.value, maxLinkName)
		case "mtu":
			n.MTU, err = parseInt(g.key, g.value, minMTU4, maxMTU)
		case "masquerade":
			n.Masquerade, err = parseBool(g.key, g.value)
		case "ifprefix":
			// dockerd appends a number of up to three digits.
			n.ContainerPrefix, err = parseLinkName(g.key, g.value, maxLinkName-3)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func checkMode(g given) error {
	switch g.value {
	case string(ModeBridge):
		return nil
	case "macvlan", "ipvlan":
		return fault.Invalid("option mode=%s: not supported yet, want bridge", g.value)
	default:
		return fault.Invalid("option mode=%s: want bridge", shown(g.value))
	}
}

// parseSubnets reads the pools of both families.
func parseSubnets(v4, v6 []*network.IPAMData) ([]Subnet, error) {
	var subnets []Subnet
	for _, family := range []struct {
		name string
		data []*network.IPAMData
		is6  bool
	}{{"IPv4Data", v4, false}, {"IPv6Data", v6, true}} {
		for _, data := range family.data {
			if data == nil {
				return nil, fault.Invalid("%s has an empty entry", family.name)
			}
			subnet, ok, err := parseSubnet(data, family.is6)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", family.name, err)
			}
			if !ok {
				continue
			}
			for _, other := range subnets {
				if other.Pool.Overlaps(subnet.Pool) {
					return nil, fault.Invalid("subnet %s overlaps subnet %s of the same network", subnet.Pool, other.Pool)
				}
			}
			subnets = append(subnets, subnet)
		}
	}
	return subnets, nil
}

// parseSubnet reads one pool; ok is false for the whole family, which is what the
// null IPAM driver sends.
func parseSubnet(data *network.IPAMData, is6 bool) (_ Subnet, ok bool, _ error) {
	pool, err := netip.ParsePrefix(data.Pool)
	if err != nil || pool.Addr().Is6() != is6 || pool.Addr().Is4In6() {
		return Subnet{}, false, fault.Invalid("subnet %s: want %s", shown(data.Pool), familyExample(is6))
	}
	pool = pool.Masked()
	if pool.Bits() == 0 {
		return Subnet{}, false, nil
	}
	if err := ipam.CheckSubnet(pool); err != nil {
		return Subnet{}, false, err
	}
	for _, key := range slices.Sorted(maps.Keys(data.AuxAddresses)) {
		// Docker's bridge driver gives containers this gateway instead of
		// the bridge's address.
		if key == "DefaultGatewayIPv4" || key == "DefaultGatewayIPv6" {
			return Subnet{}, false, fault.Invalid("aux address %s=%s: not supported yet, use --gateway", key, shown(fmt.Sprint(data.AuxAddresses[key])))
		}
	}
	if data.Gateway == "" {
		return Subnet{Pool: pool}, true, nil
	}
	gateway, err := parseAddress(data.Gateway)
	if err != nil || !pool.Contains(gateway) || !ipam.IsHost(pool, gateway) {
		return Subnet{}, false, fault.Invalid("gateway %s: want the address of a host in subnet %s", shown(data.Gateway), pool)
	}
	return Subnet{Pool: pool, Gateway: gateway}, true, nil
}

func familyExample(is6 bool) string {
	if is6 {
		return "an IPv6 prefix, as fd00:1::/64"
	}
	return "an IPv4 prefix, as 10.1.0.0/24"
}

// parseAddress reads an address with or without a prefix length: dockerd sends
// both, depending on who made it.
func parseAddress(s string) (netip.Addr, error) {
	if prefix, err := netip.ParsePrefix(s); err == nil {
		return prefix.Addr(), nil
	}
	addr, err := netip.ParseAddr(s)
	if err == nil && addr.Zone() != "" {
		err = fmt.Errorf("address %s has a zone", s)
	}
	return addr, err
}
