package options

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/berth-plugin/berth/shared/fault"
)

// Keys that dockerd sets beside the user's options.
const (
	keyGeneric    = "com.docker.network.generic"
	keyInternal   = "com.docker.network.internal"
	keyEnableIPv4 = "com.docker.network.enable_ipv4"
	keyEnableIPv6 = "com.docker.network.enable_ipv6"
)

// keyDefaultBridge makes docker0 of a network of Docker's bridge driver.
const keyDefaultBridge = "com.docker.network.bridge.default_bridge"

// dockerPrefix begins the names that engines may add at any time.
const dockerPrefix = "com.docker.network."

// Range of a bridge's MTU in bytes: the least IPv4 datagram every host takes
// (RFC 791), the least link for IPv6 (RFC 8200, section 5), the kernel's most.
const (
	minMTU4 = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

// networkDockerd are names on which dockerd acts itself for every driver.
func networkDockerd() []string {
	return []string{
		"com.docker.network.advertise_addr_nmsgs",
		"com.docker.network.advertise_addr_ms",
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
	more, err := n.checkSubnets()
	if err != nil {
		return Network{}, nil, err
	}
	return n, append(warnings, more...), nil
}

// ParseNetworkOptions reads the options alone, as GwAllocCheck sends them before
// there are address pools. The result has no ID and no subnets; see SkipGateway4.
func ParseNetworkOptions(opts map[string]any) (Network, []string, error) {
	n := Network{Mode: ModeBridge, Masquerade: true, ContainerPrefix: "eth", IPv4: Family{Mode: GatewayNAT}, IPv6: Family{Mode: GatewayNAT}}
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
	names := networkNames()
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
		case key == keyDefaultBridge:
			if b, err := parseBool(key, value); err != nil || b {
				return nil, nil, fault.Invalid("option %s=%s: want false, there is one default bridge and it is Docker's", key, shown(value))
			}
		case slices.Contains(networkDockerd(), key):
		case strings.HasPrefix(key, dockerPrefix):
			warnings = append(warnings, fmt.Sprintf("option %s=%s is not known to Berth and has no effect", shown(key), shown(value)))
		default:
			return nil, nil, unknown(key, slices.Collect(maps.Keys(names)), ownNames(listedOptions()))
		}
	}
	return values, warnings, nil
}
