package doctor

import (
	"context"
	"fmt"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
)

// A Parent is a link of the host by which networks are on a LAN: macvlan and ipvlan
// networks are on it, and bridges have it as their uplink.
type Parent struct {
	Name string
	// OwnMACs says that containers on it have MAC addresses of their own (macvlan,
	// bridges).
	OwnMACs bool
	// OfBridge says that it is the uplink of a bridge.
	OfBridge bool
}

// role is what the option is called that names the link.
func (p Parent) role() string {
	if p.OfBridge {
		return "uplink"
	}
	return "parent"
}

// virtualSwitches are the drivers of links of virtual machines, and what is behind
// them. What that lets through is not seen from here.
func virtualSwitches() map[string]string {
	return map[string]string{
		"virtio_net":   "a virtual machine's (KVM, and most clouds)",
		"vmxnet3":      "a VMware virtual machine's",
		"hv_netvsc":    "a Hyper-V or Azure virtual machine's",
		"ena":          "an Amazon EC2 instance's",
		"gve":          "a Google Cloud instance's",
		"xen_netfront": "a Xen virtual machine's",
		"vif":          "a Xen virtual machine's",
	}
}

// parents looks at what the networks on a LAN stand on.
func parents(_ context.Context, in Input) ([]control.Finding, error) {
	if len(in.Parents) == 0 {
		return one(ok("no network is on a LAN"))
	}
	var out []control.Finding
	for _, p := range in.Parents {
		l, has, err := in.Links.Get(p.Name)
		if err != nil {
			return out, err
		}
		if !has {
			effect := "Its containers have lost their link and must be started again when it is back."
			if p.OfBridge {
				effect = "Containers on the bridge reach each other only. It joins the bridge again when it is back."
			}
			out = append(out, fail(effect, "ip link show", "%s %q is missing", p.role(), p.Name))
			continue
		}
		f, err := parentFinding(in.Links, p, l)
		if err != nil {
			return out, err
		}
		out = append(out, f)
	}
	return out, nil
}

func parentFinding(links *link.Handle, p Parent, l link.Link) (control.Finding, error) {
	switch {
	case !l.Up && p.OfBridge:
		return fail("Containers on the bridge reach each other only.", fmt.Sprintf("ip link set %s up", p.Name), "%s %q is down", p.role(), p.Name), nil
	case !l.Up:
		return fail("No container on it can be started.", fmt.Sprintf("ip link set %s up", p.Name), "%s %q is down", p.role(), p.Name), nil
	case !l.Carrier:
		return warn("Its containers reach each other at most. Look at the cable, the switch, or the other end.", "", "%s %q has no carrier", p.role(), p.Name), nil
	}
	// What is below a VLAN decides.
	name := p.Name
	if l.Kind == "vlan" && l.Peer != 0 {
		all, err := links.List()
		if err != nil {
			return control.Finding{}, err
		}
		for _, below := range all {
			if below.Index == l.Peer {
				name = below.Name
			}
		}
	}
	if p.OwnMACs && links.Wireless(name) {
		return fail("An access point takes frames of one MAC address from each station. Use mode=ipvlan.", "", "%s %q is a radio, which cannot carry frames of other MAC addresses", p.role(), p.Name), nil
	}
	driver, err := links.Driver(name)
	if err != nil {
		return control.Finding{}, err
	}
	return driverFinding(p, driver), nil
}

// driverFinding judges by the driver of the link.
func driverFinding(p Parent, driver string) control.Finding {
	where, virtual := virtualSwitches()[driver]
	if !virtual || !p.OwnMACs {
		return ok("%s %q is up", p.role(), p.Name)
	}
	return warn("The switch of the hypervisor may drop frames of MAC addresses that it has not given out, which cannot be seen from here: containers then reach each other but nobody else. "+
		"Allow MAC address changes, forged transmits and promiscuous mode (VMware), MAC address spoofing (Hyper-V) or unfiltered MAC addresses (libvirt) for this machine; where that cannot be had, as in most clouds, use mode=ipvlan.",
		"", "%s %q is %s link (%s), and its containers have MAC addresses of their own", p.role(), p.Name, where, driver)
}
