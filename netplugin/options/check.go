package options

import "github.com/berth-plugin/berth/shared/fault"

// Most entries of the lists among the options.
const (
	maxTrusted = 64
	maxSources = 1000
	maxRoutes  = 100
)

// check refuses values that make no sense together. On an internal network options
// about what it does not have are fine, because a daemon's default options hold for
// all networks of a driver; but not one that would open it.
func (n *Network) check(values map[string]given) error {
	for _, family := range []struct {
		*Family
		gateway, source, binding string
	}{{&n.IPv4, "gateway4", "source4", "binding4"}, {&n.IPv6, "gateway6", "source6", "binding6"}} {
		name := func(short string) string { return optionName(values, short) }
		switch f := family.Family; {
		case f.Mode == GatewayIsolated && !n.Internal:
			return fault.Invalid("option %s=%s: want it on an internal network only, create it with --internal", name(family.gateway), f.Mode)
		case n.Internal:
		case f.Mode == GatewayRouted && f.Source.IsValid():
			return fault.Invalid("options %s=%s and %s=%s: traffic keeps the containers' addresses, leave one of them out",
				name(family.source), f.Source, name(family.gateway), f.Mode)
		case !n.Masquerade && f.Source.IsValid():
			return fault.Invalid("options %s=%s and %s=false: traffic keeps the containers' addresses, leave one of them out",
				name(family.source), f.Source, name("masquerade"))
		case f.Mode == GatewayRouted && f.Binding.IsValid() && !f.Binding.IsUnspecified():
			return fault.Invalid("options %s=%s and %s=%s: ports are published on the containers' addresses only, leave one of them out",
				name(family.binding), f.Binding, name(family.gateway), f.Mode)
		case f.Mode == GatewayUnprotected && (n.HostFirewall || len(n.Sources) > 0):
			return fault.Invalid("options %s=%s and %s=%s: all ports are open to everybody on the containers' addresses, leave one of them out",
				name("publish"), shown(values["publish"].value), name(family.gateway), f.Mode)
		}
	}
	if n.Internal && len(n.Trusted) > 0 {
		return fault.Invalid("option %s=%s: an internal network publishes nothing, leave it out", optionName(values, "trusted"), shown(values["trusted"].value))
	}
	return nil
}

// optionName is the name by which the user gave the option.
func optionName(values map[string]given, short string) string {
	g, ok := values[short]
	switch {
	case ok:
		return g.key
	case short == "binding6" && values["binding4"].key == keyBinding:
		return keyBinding
	default:
		return short
	}
}
