package link

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Link is what Berth wants to know about a link.
type Link struct {
	Name  string
	Index int
	// Kind is the kernel's word: "bridge", "veth", ...; "device" for hardware.
	Kind string
	// Master is the index of the bridge or bond the link is a port of, 0 for none.
	Master int
	// Peer is the index of the other end of a veth pair, or of the link that a
	// macvlan, ipvlan or VLAN is on; 0 when that is in another namespace.
	Peer int
	MTU  int
	MAC  net.HardwareAddr
	Up   bool
	// Carrier says that the link can carry packets: of a veth pair, that both ends
	// are up.
	Carrier bool
	// Port is not known in events.
	Port  Port
	Owner Owner
	// Away says that the link is in another namespace, NSID is the kernel's number of
	// that, and Index and Master mean nothing here; see Elsewhere.
	Away bool
	NSID int
}

func fromNetlink(l netlink.Link) Link {
	attrs := l.Attrs()
	out := Link{
		Name:    attrs.Name,
		Index:   attrs.Index,
		Kind:    l.Type(),
		Master:  attrs.MasterIndex,
		MTU:     attrs.MTU,
		MAC:     attrs.HardwareAddr,
		Up:      attrs.RawFlags&unix.IFF_UP != 0,
		Carrier: attrs.RawFlags&unix.IFF_LOWER_UP != 0,
		Owner:   ownerOf(attrs.Alias, attrs.Group),
	}
	if attrs.NetNsID < 0 {
		out.Peer = attrs.ParentIndex
	}
	return out
}

// Get returns the link of this name; ok is false when there is none.
func (h *Handle) Get(name string) (l Link, ok bool, err error) {
	return h.get(0, name)
}

func (h *Handle) byIndex(index int) (l Link, ok bool, err error) { return h.get(index, "") }

func (h *Handle) get(index int, name string) (Link, bool, error) {
	req := h.request(unix.RTM_GETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	if index == 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	}
	found, err := retry(func() ([][]byte, error) { return req.Execute(unix.NETLINK_ROUTE, 0) })
	if errors.Is(err, unix.ENODEV) {
		return Link{}, false, nil
	}
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("the kernel has sent %d links", len(found))
	}
	var l Link
	if err == nil {
		l, err = fromMessage(found[0])
	}
	if err != nil {
		return Link{}, false, fmt.Errorf("read link %q (#%d): %w", name, index, err)
	}
	return l, true, nil
}

// Delete removes the link if it is this owner's; its other end, addresses and
// limits go with it. A link that is not there is success; a link of anybody else is
// left alone and named in a fault.Conflict.
func (h *Handle) Delete(name string, owner Owner) error {
	err := h.delete(name, owner)
	if owner.Endpoint != "" {
		err = errors.Join(err, h.deleteLimiter(name, owner))
	}
	return err
}

func (h *Handle) delete(name string, owner Owner) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok {
		return err
	}
	if l.Owner != owner && !l.Owner.halfMade() {
		return fault.Conflict("link %q is not removed: it belongs to %s, not to %s", name, l.Owner, owner)
	}
	return h.deleteIndex(l)
}

// deleteIndex removes exactly the link that was looked at, not one that got its
// name meanwhile.
func (h *Handle) deleteIndex(l Link) error {
	req := h.request(unix.RTM_DELLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Index)
	req.AddData(msg)
	err := h.execute(req)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove link %q: %w", l.Name, err)
	}
	return nil
}

// Owned lists all links of Berth in this namespace: bridges, host ends, links on
// parents, and what is half made. The limiter of an endpoint is part of its host's
// end, and listed only where that is gone, as a link whose other end (itself) is on
// the host.
func (h *Handle) Owned() ([]Link, error) {
	var owned []Link
	ends := map[Owner]bool{}
	kinds := []string{"bridge", "veth", limiterKind, "macvlan", "vlan", "ipvlan", "dummy"}
	var rest []Link
	for i, kind := range kinds {
		links := rest
		if rest == nil {
			var err error
			if links, err = h.dumpLinks(kind, 0); err != nil {
				return nil, err
			}
			// A kernel that does not know the kind sends all links: that is enough for
			// the other kinds too.
			if i > 0 && slices.ContainsFunc(links, func(l Link) bool { return l.Kind != kind }) {
				rest = links
			}
		}
		for _, l := range links {
			if l.Kind != kind || !l.Owner.Ours || kind == limiterKind && ends[l.Owner] {
				continue
			}
			if kind == limiterKind {
				l.Peer = l.Index
			} else if l.Owner.Endpoint != "" {
				ends[l.Owner] = true
			}
			owned = append(owned, l)
		}
	}
	return owned, nil
}

// Bridges lists all bridges, of whomever.
func (h *Handle) Bridges() ([]Link, error) { return h.list("bridge", 0) }

// Ports lists the ports of a bridge.
func (h *Handle) Ports(bridge Link) ([]Link, error) { return h.list("", bridge.Index) }

// List lists all links.
func (h *Handle) List() ([]Link, error) { return h.list("", 0) }

// list dumps links of one kind and one master, "" and 0 for any. The kernel
// filters; it ignores filters that it does not know, so they are applied again.
func (h *Handle) list(kind string, master int) ([]Link, error) {
	links, err := h.dumpLinks(kind, master)
	return slices.DeleteFunc(links, func(l Link) bool {
		return kind != "" && l.Kind != kind || master != 0 && l.Master != master
	}), err
}

// dumpLinks is list without a second look.
func (h *Handle) dumpLinks(kind string, master int, more ...*nl.RtAttr) ([]Link, error) {
	links, err := dump(func() ([]Link, error) {
		req := h.request(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		if kind != "" {
			req.AddData(kindInfo(kind))
		}
		if master != 0 {
			req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))))
		}
		for _, attr := range more {
			req.AddData(attr)
		}
		msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
		if err != nil {
			return nil, err
		}
		links := make([]Link, 0, len(msgs))
		for _, m := range msgs {
			l, err := fromMessage(m)
			if err != nil {
				return nil, err
			}
			links = append(links, l)
		}
		return links, nil
	})
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return links, nil
}

func (h *Handle) execute(req *nl.NetlinkRequest) error {
	_, err := retry(func() ([][]byte, error) { return req.Execute(unix.NETLINK_ROUTE, 0) })
	return err
}
