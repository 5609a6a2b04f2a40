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

// Names of aux addresses that Docker's bridge driver gives containers as default
// gateway instead of the bridge's address.
const (
	auxGateway4 = "DefaultGatewayIPv4"
	auxGateway6 = "DefaultGatewayIPv6"
)

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
	subnet := Subnet{Pool: pool}
	if data.Gateway != "" {
		if subnet.Gateway, err = parseAddress(data.Gateway); err != nil || !isHostIn(pool, subnet.Gateway) {
			return Subnet{}, false, fault.Invalid("gateway %s: want the address of a host in subnet %s", shown(data.Gateway), pool)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(data.AuxAddresses)) {
		if key != auxGateway4 && key != auxGateway6 {
			continue
		}
		value := fmt.Sprint(data.AuxAddresses[key])
		addr, err := parseAddress(value)
		if err != nil || is6 != (key == auxGateway6) || !isHostIn(pool, addr) {
			return Subnet{}, false, fault.Invalid("aux address %s=%s: want the address of a host in an %s subnet of the network, this one is %s",
				key, shown(value), strings.TrimPrefix(key, "DefaultGateway"), pool)
		}
		if addr != subnet.Gateway {
			subnet.ContainerGateway = addr
		}
	}
	return subnet, true, nil
}

func isHostIn(pool netip.Prefix, addr netip.Addr) bool {
	return pool.Contains(addr) && ipam.IsHost(pool, addr)
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

// checkSubnets checks the options against the subnets. A gateway that has no use is
// dropped: engines before 28 ask for one in any case.
func (n *Network) checkSubnets() (warnings []string, _ error) {
	for i, subnet := range n.Subnets {
		is6, skip := subnet.Pool.Addr().Is6(), n.SkipGateway4()
		if is6 {
			skip = n.SkipGateway6()
		}
		if is6 && n.MTU != 0 && n.MTU < minMTU6 {
			return nil, fault.Invalid("option mtu=%d: want a number from %d to %d on a network with IPv6", n.MTU, minMTU6, maxMTU)
		}
		switch {
		case n.IsLAN():
			skip = n.needsNoGateway()
		case n.Uplink != "":
			// A router of the LAN; the bridge must not take its address.
			if skip = false; !subnet.ContainerGateway.IsValid() {
				subnet.ContainerGateway = subnet.Gateway
			}
			subnet.Gateway = netip.Addr{}
			n.Subnets[i] = subnet
		}
		if subnet.ContainerGateway.IsValid() && n.Internal {
			return nil, fault.Invalid("aux address DefaultGatewayIPv4 or DefaultGatewayIPv6 %s: containers of an internal network have no default gateway, leave it out",
				subnet.ContainerGateway)
		}
		if skip && subnet.Gateway.IsValid() {
			why := "the bridge has no address in subnet " + subnet.Pool.String()
			if n.IsLAN() {
				why = "containers of this network have no gateway in subnet " + subnet.Pool.String()
			}
			warnings = append(warnings, fmt.Sprintf("gateway %s is not used: %s", subnet.Gateway, why))
			n.Subnets[i].Gateway = netip.Addr{}
		}
	}
	if err := n.checkHostAddrs(); err != nil {
		return nil, err
	}
	return warnings, n.checkRoutes("routes", n.Routes)
}
