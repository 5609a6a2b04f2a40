package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// EnsureVLAN makes the VLAN sub-interface name of the link base, with IEEE 802.1Q
// tags of this ID, and brings it up; its owner is OfParent(name). A VLAN that somebody
// else has made is left as it is. A link of that name that is no VLAN or leads
// elsewhere is a fault.Conflict, a missing base fault.NotFound. It stays down while
// its base is down.
func (h *Handle) EnsureVLAN(name, base string, id int) (created bool, err error) {
	l, ok, err := h.Get(name)
	if err != nil || ok && !l.Owner.Ours {
		return false, err
	}
	under, found, err := h.Get(base)
	if err != nil {
		return false, err
	}
	if !found {
		return false, fault.NotFound("link %q of VLAN %q does not exist", base, name)
	}
	owner := OfParent(name)
	switch {
	case !ok:
	case l.Owner.halfMade(), l.Owner == owner && l.Peer != under.Index:
		if err := h.deleteIndex(l); err != nil {
			return false, err
		}
		ok = false
	case l.Owner != owner:
		return false, fault.Conflict("link %q belongs to %s, not to %s", name, l.Owner, owner)
	}
	if !ok {
		info := kindInfo("vlan")
		data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
		data.AddRtAttr(nl.IFLA_VLAN_ID, nl.Uint16Attr(uint16(id)))
		data.AddRtAttr(nl.IFLA_VLAN_PROTOCOL, binary.BigEndian.AppendUint16(nil, unix.ETH_P_8021Q))
		err := h.createOn(under.Index, name, nil, 0, 0, info)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return false, fmt.Errorf("the kernel cannot make VLANs: load or install its module 8021q: %w", err)
		case errors.Is(err, unix.EEXIST):
			return false, fault.Conflict("link %q has VLAN %d already, by another name than %q: use that as the parent", base, id, name)
		case err != nil:
			return false, createError("VLAN", name, err)
		}
		created = true
		if l, ok, err = h.Get(name); err == nil && !ok {
			err = fmt.Errorf("VLAN %q is gone again", name)
		}
		if err == nil {
			err = h.change(l.Index, change{alias: owner.String()})
		}
		if err != nil {
			return true, err
		}
	}
	if l.Up || !under.Up {
		return created, nil
	}
	if err := h.change(l.Index, change{up: true}); err != nil && !errors.Is(err, unix.ENETDOWN) {
		return created, fmt.Errorf("bring up VLAN %q: %w", name, err)
	}
	return created, nil
}

// A Private is the link that a network has in the place of a parent: what is on it
// reaches nothing else.
type Private struct {
	// Name is that of the link, Peer that of its other end if it has one.
	Name, Peer string
	NetworkID  string
	MAC        net.HardwareAddr
	// MTU in bytes; 0 leaves the kernel's default.
	MTU int
}

// EnsurePrivate makes the link or repairs it, and brings it up. It is a dummy, or
// where the kernel has none one end of a veth pair of which the other leads nowhere:
// macvlan and ipvlan carry frames between their links themselves, and need only a
// link with a carrier.
func (h *Handle) EnsurePrivate(p Private) (created bool, err error) {
	owner := OfNetwork(p.NetworkID)
	l, ok, err := h.claim(p.Name, owner)
	if err != nil {
		return false, err
	}
	if !ok {
		err := h.create(p.Name, p.MAC, p.MTU, 0, kindInfo("dummy"))
		if errors.Is(err, unix.EOPNOTSUPP) {
			if _, _, err := h.claim(p.Peer, owner); err != nil {
				return false, err
			}
			other := vethInfo(p.Peer, hostMAC(p.MAC), p.MTU)
			err = h.create(p.Name, p.MAC, p.MTU, 0, other)
		}
		if err != nil {
			return false, createError("private link", p.Name, err)
		}
		created = true
		if l, ok, err = h.Get(p.Name); err == nil && !ok {
			err = fmt.Errorf("private link %q is gone again", p.Name)
		}
		if err != nil {
			return true, err
		}
	}
	ends := []Link{l}
	if l.Kind == "veth" {
		other, ok, err := h.byIndex(l.Peer)
		if err != nil {
			return created, err
		}
		if ok {
			ends = append(ends, other)
		}
	}
	for _, end := range ends {
		if !created && end.Up && end.Owner == owner && (p.MTU == 0 || end.MTU == p.MTU) {
			continue
		}
		if err := h.disableIPv6(end.Name); err != nil {
			return created, err
		}
		if err := h.change(end.Index, change{alias: owner.String(), mtu: p.MTU, up: true}); err != nil {
			return created, fmt.Errorf("set up private link %q: %w", end.Name, err)
		}
	}
	return created, nil
}
