package options

import (
	"github.com/berth-plugin/berth/shared/fault"
)

// setUplink reads the link that leads to the LAN.
func (n *Network) setUplink(g given) error {
	if g.value == "" {
		return nil
	}
	// The names of VLANs are those of parents.
	as := Network{}
	if err := as.setParent(g); err != nil {
		return err
	}
	n.Uplink = as.LAN.Parent
	return nil
}

// uplinkHas are the options that need the host to be the gateway, with the reason
// why it is not.
func uplinkHas() map[string]string {
	const (
		noAddress = "the bridge has no address, the containers' gateway is a router of the LAN, given with --gateway"
		noPublish = "the containers are reached by their own addresses, no port is published"
	)
	return map[string]string{
		"inhibit4": noAddress, "gateway4": noAddress, "gateway6": noAddress,
		"masquerade": noAddress, "source4": noAddress, "source6": noAddress,
		"binding4": noPublish, "binding6": noPublish, "trusted": noPublish, "proxy": noPublish, "publish": noPublish,
	}
}

// checkUplink checks and completes the options of a bridge network with an uplink.
func (n *Network) checkUplink(values map[string]given) error {
	if n.Uplink == "" {
		return nil
	}
	uplink := values["uplink"]
	if n.Internal {
		return fault.Invalid("option %s=%s: an internal network has no way out, leave it or --internal out", uplink.key, shown(uplink.value))
	}
	for short, why := range uplinkHas() {
		g, ok := values[short]
		if !ok || (short == "gateway4" || short == "gateway6") && (g.value == "" || g.value == string(GatewayNAT)) {
			continue
		}
		return fault.Invalid("options %s=%s and %s=%s: %s, leave one of them out", uplink.key, shown(uplink.value), g.key, shown(g.value), why)
	}
	n.Masquerade = false
	return nil
}
