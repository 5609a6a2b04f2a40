package link

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	macvlanKind = "macvlan"
	ipvlanKind  = "ipvlan"
)

// A Child is a macvlan or ipvlan link as it should be.
type Child struct {
	Name  string
	Owner Owner
	// Parent is the name of the link it is on.
	Parent string
	// Kind is "macvlan" or "ipvlan"; Mode and Flag are the kernel's words. Only ipvlan
	// has a Flag, "bridge" is none.
	Kind, Mode, Flag string
	// MAC is for macvlan; nil leaves it to the kernel, which invents one, or takes
	// the parent's in mode passthru.
	MAC net.HardwareAddr
	// MTU in bytes, at most that of the parent; 0 is that of the parent.
	MTU int
	// BroadcastQueue is how many broadcasts may wait on the parent (macvlan, Linux
	// 5.11); 0 is the kernel's default. The kernel takes the most of all links on
	// the parent.
	BroadcastQueue int
}

// EnsureChild makes the link, down, or repairs it where it is in this namespace. A
// link that is elsewhere is not looked for (see ElsewhereOf). A link of that name
// that is not the owner's is left alone and named in a fault.Conflict, as is what
// keeps the parent from having this link; a missing parent is fault.NotFound.
func (h *Handle) EnsureChild(c Child) (created bool, err error) {
	parent, ok, err := h.Get(c.Parent)
	if err != nil {
		return false, err
	}
	if !ok {
		return false, fault.NotFound("parent %q does not exist", c.Parent)
	}
	l, ok, err := h.claim(c.Name, c.Owner)
	if err != nil {
		return false, err
	}
	if ok && (l.Kind != c.Kind || l.Peer != parent.Index) {
		// It was made for another parent, which may have had the same name.
		if err := h.deleteIndex(l); err != nil {
			return false, err
		}
		ok = false
	}
	if ok {
		return false, h.repairChild(c, l, parent)
	}
	info, err := c.info()
	if err != nil {
		return false, err
	}
	if err := h.createOn(parent.Index, c.Name, c.MAC, c.MTU, 0, info); err != nil {
		return false, childError(c, parent, err)
	}
	l, ok, err = h.Get(c.Name)
	if err == nil && !ok {
		err = fmt.Errorf("link %q is gone again", c.Name)
	}
	if err != nil {
		return true, err
	}
	if err := h.change(l.Index, change{alias: c.Owner.String()}); err != nil {
		return true, fmt.Errorf("set up link %q: %w", c.Name, err)
	}
	return true, nil
}

func (h *Handle) repairChild(c Child, l, parent Link) error {
	ch, want := change{}, c.MTU
	if want == 0 {
		want = parent.MTU
	}
	if l.MTU != want {
		ch.mtu = want
	}
	if c.MAC != nil && l.MAC.String() != c.MAC.String() {
		ch.mac = c.MAC
	}
	if ch.mtu == 0 && ch.mac == nil {
		return nil
	}
	if err := h.change(l.Index, ch); err != nil {
		return fmt.Errorf("repair link %q: %w", c.Name, err)
	}
	return nil
}

// info is the part of a link message that says what link it is.
func (c Child) info() (*nl.RtAttr, error) {
	info := kindInfo(c.Kind)
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	switch c.Kind {
	case macvlanKind:
		mode, ok := map[string]uint32{
			"private": nl.MACVLAN_MODE_PRIVATE, "vepa": nl.MACVLAN_MODE_VEPA, "bridge": nl.MACVLAN_MODE_BRIDGE, "passthru": nl.MACVLAN_MODE_PASSTHRU,
		}[c.Mode]
		if !ok {
			return nil, fmt.Errorf("macvlan mode %q is not known", c.Mode)
		}
		data.AddRtAttr(nl.IFLA_MACVLAN_MODE, nl.Uint32Attr(mode))
		if c.BroadcastQueue != 0 {
			data.AddRtAttr(nl.IFLA_MACVLAN_BC_QUEUE_LEN, nl.Uint32Attr(uint32(c.BroadcastQueue)))
		}
	case ipvlanKind:
		mode, ok := map[string]uint16{"l2": 0, "l3": 1, "l3s": 2}[c.Mode]
		flag, known := map[string]uint16{"": 0, "bridge": 0, "private": 1, "vepa": 2}[c.Flag]
		if !ok || !known {
			return nil, fmt.Errorf("ipvlan mode %q with flag %q is not known", c.Mode, c.Flag)
		}
		data.AddRtAttr(nl.IFLA_IPVLAN_MODE, nl.Uint16Attr(mode))
		data.AddRtAttr(nl.IFLA_IPVLAN_FLAG, nl.Uint16Attr(flag))
	default:
		return nil, fmt.Errorf("a %q is not made on a parent", c.Kind)
	}
	return info, nil
}

// childError says in words why the kernel did not make a link on a parent.
func childError(c Child, parent Link, err error) error {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel cannot make %s links: load or install its module %s: %w", c.Kind, c.Kind, err)
	case errors.Is(err, unix.EBUSY):
		return fault.Conflict("parent %q cannot have %s links: it is a port of another link or has links of another kind on it (%s)", parent.Name, c.Kind, err)
	case c.MTU > parent.MTU:
		return fault.Invalid("MTU %d is more than that of parent %q, %d", c.MTU, parent.Name, parent.MTU)
	case errors.Is(err, unix.EINVAL) && c.Mode == "passthru":
		return fault.Conflict("parent %q has macvlan links already, a link in mode passthru must be the only one", parent.Name)
	case errors.Is(err, unix.EINVAL):
		return fault.Conflict("parent %q cannot have %s links: it is no Ethernet link, or has one in mode passthru, which must be the only one (%s)", parent.Name, c.Kind, err)
	default:
		return createError(c.Kind, c.Name, err)
	}
}
