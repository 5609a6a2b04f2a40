package link

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// Port is how a bridge treats one of its ports; the zero Port is the kernel's
// default, and that of links that are no port.
type Port struct {
	// Hairpin lets frames leave by the port that they came in by. With br_netfilter
	// a container reaches its own published port only so.
	Hairpin bool
	// Isolated ports exchange no frames with one another (Linux 4.18).
	Isolated bool
}

// maxPorts is the kernel's most of ports on one bridge (BR_MAX_PORTS, less the
// bridge itself).
const maxPorts = 1023

func fullError(bridge string) error {
	return fault.Exhausted("bridge %q has %d ports, the kernel's most: the network can have no more containers; make another network", bridge, maxPorts)
}

// info is the part of a link message that sets a port.
func (p Port) info() *nl.RtAttr {
	flag := func(on bool) []byte {
		if on {
			return nl.Uint8Attr(1)
		}
		return nl.Uint8Attr(0)
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	data.AddRtAttr(nl.IFLA_BRPORT_MODE, flag(p.Hairpin))
	data.AddRtAttr(nl.IFLA_BRPORT_ISOLATED, flag(p.Isolated))
	return info
}

// SetPort sets how the bridge treats the host's end of an endpoint. One that is not
// there is success: its container has died.
func (h *Handle) SetPort(name string, owner Owner, port Port) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok || l.Owner != owner || l.Master == 0 || l.Port == port {
		return err
	}
	if err := h.change(l.Index, change{port: &port}); err != nil {
		return fmt.Errorf("set up link %q as a port of its bridge: %w", name, err)
	}
	return nil
}

// checkIsolated makes sure that the kernel has not overlooked the flag, as those
// that do not know it do.
func (h *Handle) checkIsolated(v Veth) error {
	l, ok, err := h.Get(v.Host)
	if err == nil && ok && l.Port.Isolated != v.Port.Isolated {
		err = errors.New("option icc=false: the kernel cannot isolate ports of a bridge, Linux 4.18 or later is needed")
	}
	return err
}

// nested returns the attributes below a path of attribute types, none where the
// path ends early.
func nested(attrs []syscall.NetlinkRouteAttr, path ...uint16) ([]syscall.NetlinkRouteAttr, error) {
	for _, want := range path {
		i := slices.IndexFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type&^unix.NLA_F_NESTED == want })
		if i < 0 {
			return nil, nil
		}
		var err error
		if attrs, err = nl.ParseRouteAttr(attrs[i].Value); err != nil {
			return nil, err
		}
	}
	return attrs, nil
}

// fromMessage reads a link with the attributes that the netlink library leaves
// out.
func fromMessage(m []byte) (Link, error) {
	found, err := netlink.LinkDeserialize(nil, m)
	if err != nil {
		return Link{}, err
	}
	l := fromNetlink(found)
	if l.Master == 0 {
		return l, nil
	}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return Link{}, err
	}
	data, err := nested(attrs, unix.IFLA_LINKINFO, nl.IFLA_INFO_SLAVE_DATA)
	if err != nil {
		return Link{}, err
	}
	for _, a := range data {
		on := len(a.Value) > 0 && a.Value[0] != 0
		switch a.Attr.Type {
		case nl.IFLA_BRPORT_MODE:
			l.Port.Hairpin = on
		case nl.IFLA_BRPORT_ISOLATED:
			l.Port.Isolated = on
		}
	}
	return l, nil
}
