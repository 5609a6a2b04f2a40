package link

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// Segments names the links of the host that could lead to a LAN, in words for an
// error: network cards, bonds, VLANs, veths, and those of more kinds.
func (h *Handle) Segments(more ...string) (string, error) {
	const most = 8
	links, err := h.List()
	if err != nil {
		return "", err
	}
	kinds := slices.Concat(more, []string{"device", "veth", "bond", "team", "vlan"})
	var names []string
	for _, l := range links {
		if !l.Owner.Ours && l.Master == 0 && l.Name != "lo" && !IsDocker(l.Name) && slices.Contains(kinds, l.Kind) {
			names = append(names, l.Name)
		}
	}
	if len(names) == 0 {
		return "none that could be one", nil
	}
	slices.Sort(names)
	has := strings.Join(names[:min(most, len(names))], ", ")
	if len(names) > most {
		has += ", ..."
	}
	return has, nil
}

// CheckUplink says whether a link of the host can be a port of this bridge, which may
// not exist yet, and returns it. One that is missing is fault.NotFound. One that the
// host uses itself, or that is a port of another bridge, is a fault.Conflict that says
// what to do: the host would lose its addresses and routes there.
func (h *Handle) CheckUplink(name, bridge string) (Link, error) {
	l, ok, err := h.Get(name)
	if err != nil {
		return Link{}, err
	}
	if !ok {
		has, err := h.Segments()
		return Link{}, errors.Join(fault.NotFound("uplink %q does not exist: the host has %s", name, has), err)
	}
	switch {
	case l.Owner.Ours && l.Owner != OfParent(name):
		return l, fault.Conflict("uplink %q is a link of Berth's own (%s): want a link of the host", name, l.Owner)
	case l.Kind == "bridge":
		return l, fault.Conflict("uplink %q is a bridge: give its name as option bridge=%s instead", name, name)
	case len(l.MAC) != 6 || l.MAC.String() == "00:00:00:00:00:00":
		return l, fault.Conflict("uplink %q is no Ethernet link", name)
	case l.Master != 0:
		master, _, err := h.byIndex(l.Master)
		if err != nil || master.Name == bridge {
			return l, err
		}
		return l, portOf(name, master)
	}
	const instead = "make a bridge of the host's own with its network manager, give it what %q has, and use option bridge=NAME instead"
	addrs, err := h.Addrs(name)
	if err != nil {
		return l, err
	}
	if len(addrs) > 0 && addrs[0].Addr().Is6() && !slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		// Mostly one that a router of the LAN has made it take.
		return l, fault.Conflict("uplink %q has the address %s, which the host would lose: if it does not need it, run `sysctl -w net.ipv6.conf.%s.disable_ipv6=1` on the host, else "+instead,
			name, addrs[0], strings.ReplaceAll(name, ".", "/"), name)
	}
	if len(addrs) > 0 {
		return l, fault.Conflict("uplink %q has the address %s, which the host would lose: "+instead, name, addrs[0], name)
	}
	routes, err := h.Routes()
	if err != nil {
		return l, err
	}
	linkLocal := netip.MustParsePrefix("fe80::/10")
	for _, r := range routes {
		if r.Link == l.Index && !linkLocal.Contains(r.Dst.Addr()) && !r.Dst.Addr().IsMulticast() {
			return l, fault.Conflict("uplink %q has a route to %s, which the host would lose: "+instead, name, r.Dst, name)
		}
	}
	return l, nil
}

// portOf says why a port of another link cannot be an uplink.
func portOf(name string, master Link) error {
	switch {
	case master.Owner.Ours:
		return fault.Conflict("uplink %q is a port of the bridge of another network (%s): choose another link", name, master.Owner)
	case IsDocker(master.Name):
		return fault.Conflict("uplink %q is a port of bridge %q, which is Docker's: choose another link", name, master.Name)
	case master.Kind == "bridge":
		return fault.Conflict("uplink %q is a port of bridge %q: give its name as option bridge=%s instead", name, master.Name, master.Name)
	default:
		return fault.Conflict("uplink %q is a port of %s %q: give that as the uplink", name, master.Kind, master.Name)
	}
}

// EnsureUplink makes a link a port of the bridge of a network, and brings it up;
// errors are those of CheckUplink. added says that it was no port of it.
//
// The host then answers no ARP on the bridge, on which it has no address: by default
// it would answer for those of all its links, and draw their traffic to it.
func (h *Handle) EnsureUplink(name, bridge string) (added bool, err error) {
	b, ok, err := h.Get(bridge)
	if err != nil {
		return false, err
	}
	if !ok {
		return false, fault.NotFound("bridge %q of uplink %q does not exist", bridge, name)
	}
	l, err := h.CheckUplink(name, bridge)
	if err != nil {
		return false, err
	}
	if err := h.SetSysctl("ipv4/conf/"+bridge+"/arp_ignore", "1"); err != nil {
		return false, err
	}
	if l.Master != b.Index {
		err := h.change(l.Index, change{master: b.Index})
		if errors.Is(err, unix.EBUSY) {
			return false, fault.Conflict("uplink %q cannot be a port of a bridge: macvlan or ipvlan links are on it", name)
		}
		if err != nil {
			return false, fmt.Errorf("plug uplink %q into bridge %q: %w", name, bridge, err)
		}
		added = true
	}
	if l.Up {
		return added, nil
	}
	err = h.change(l.Index, change{up: true})
	if errors.Is(err, unix.ENETDOWN) {
		err = fault.Unavailable("the link that it is on is down: run `ip link set LINK up` on the host")
	}
	if err != nil {
		return added, fmt.Errorf("bring up uplink %q: %w", name, err)
	}
	return added, nil
}

// ReleaseUplink takes a link out of the bridge, and takes it down unless it was up
// before. A link that is gone, or no port of it any more, is success.
func (h *Handle) ReleaseUplink(name, bridge string, wasUp bool) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok || l.Master == 0 {
		return err
	}
	b, ok, err := h.byIndex(l.Master)
	if err != nil || !ok || b.Name != bridge {
		return err
	}
	req := h.request(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Index)
	if !wasUp {
		msg.Change = unix.IFF_UP
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(0)))
	err = h.execute(req)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("take uplink %q out of bridge %q: %w", name, bridge, err)
	}
	return nil
}
