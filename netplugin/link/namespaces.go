package link

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// A macvlan or ipvlan link has no other end on the host: once dockerd has moved it
// into a container, nothing of it is left there. But the kernel gives the namespace
// a number when a link is moved into it (peernet2id_alloc), and looks into
// namespaces by that number (IFLA_TARGET_NETNSID, Linux 4.15). The alias with the
// owner's name goes along with the link.

// Elsewhere lists the macvlan and ipvlan links of endpoints in all namespaces that
// this one has a number for, which are those that such a link was moved into. A link
// that is neither there nor here is gone with its container.
func (h *Handle) Elsewhere() ([]Link, error) {
	ids, err := h.namespaces()
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	own, err := h.ownNumber()
	if err != nil {
		return nil, err
	}
	var found []Link
	for _, id := range ids {
		if id == own {
			continue
		}
		links, err := h.linksIn(id)
		if err != nil {
			return nil, err
		}
		for _, l := range links {
			if l.Owner.Endpoint != "" && (l.Kind == macvlanKind || l.Kind == ipvlanKind) {
				found = append(found, l)
			}
		}
	}
	return found, nil
}

// ElsewhereOf is Elsewhere for one owner.
func (h *Handle) ElsewhereOf(owner Owner) (l Link, ok bool, err error) {
	links, err := h.Elsewhere()
	i := slices.IndexFunc(links, func(l Link) bool { return l.Owner == owner })
	if err != nil || i < 0 {
		return Link{}, false, err
	}
	return links[i], true, nil
}

// namespaces are the numbers of the namespaces known here (RTM_GETNSID).
func (h *Handle) namespaces() ([]int, error) {
	ids, err := dump(func() ([]int, error) {
		req := h.request(unix.RTM_GETNSID, unix.NLM_F_DUMP)
		req.AddData(nl.NewRtGenMsg())
		msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNSID)
		if err != nil {
			return nil, err
		}
		var ids []int
		for _, m := range msgs {
			if len(m) < unix.SizeofRtGenmsg {
				continue
			}
			// The header is padded to four bytes.
			attrs, err := nl.ParseRouteAttr(m[unix.NLMSG_ALIGNTO:])
			if err != nil {
				return nil, err
			}
			for _, a := range attrs {
				if a.Attr.Type == unix.NETNSA_NSID && len(a.Value) == 4 {
					ids = append(ids, int(int32(nl.NativeEndian().Uint32(a.Value))))
				}
			}
		}
		return ids, nil
	})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	return slices.DeleteFunc(ids, func(id int) bool { return id < 0 }), nil
}

// ownNumber is the number by which this namespace knows itself, which it gets when a
// link in another one is looked at that is on a link here; -1 for none.
func (h *Handle) ownNumber() (int, error) {
	ns := h.ns
	if ns == nil {
		file, err := os.Open("/proc/self/ns/net")
		if err != nil {
			return 0, err
		}
		defer file.Close()
		ns = file
	}
	id, err := retry(func() (int, error) { return h.nl.GetNetNsIdByFd(int(ns.Fd())) })
	if err != nil {
		return 0, fmt.Errorf("number of this namespace: %w", err)
	}
	return id, nil
}

// linksIn lists the links of another namespace; none when it is gone meanwhile.
func (h *Handle) linksIn(nsid int) ([]Link, error) {
	links, err := h.dumpLinks("", 0, nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(nsid))))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	for i := range links {
		links[i].Away, links[i].NSID, links[i].Peer = true, nsid, 0
	}
	return links, err
}

// DeleteAnywhere removes the macvlan or ipvlan link of an endpoint, here or in the
// namespace that it was moved to. A link that is nowhere is success. A link of
// somebody else by that name is left alone and named in a fault.Conflict, after the
// owner's own was removed where it is.
func (h *Handle) DeleteAnywhere(name string, owner Owner) error {
	l, ok, err := h.Get(name)
	if err != nil {
		return err
	}
	if ok && (l.Owner == owner || l.Owner.halfMade()) {
		return h.deleteIndex(l)
	}
	away, moved, err := h.ElsewhereOf(owner)
	if err == nil && moved {
		err = h.deleteIn(away)
	}
	if err == nil && ok {
		err = fault.Conflict("link %q is not removed: it belongs to %s, not to %s", name, l.Owner, owner)
	}
	return err
}

// deleteIn removes a link in another namespace.
func (h *Handle) deleteIn(l Link) error {
	req := h.request(unix.RTM_DELLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Index)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(l.NSID))))
	err := h.execute(req)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil // It has gone with its namespace.
	}
	if err != nil {
		return fmt.Errorf("remove link %q in namespace %d: %w", l.Name, l.NSID, err)
	}
	return nil
}
