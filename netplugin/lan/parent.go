package lan

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// usableParent says whether a network can be made on its parent, and returns it. The
// caller holds m.mu.
func (m *Mode) usableParent(n options.Network) (link.Link, error) {
	l, ok, err := m.links.Get(n.LAN.Parent)
	if err != nil {
		return link.Link{}, err
	}
	if !ok {
		return link.Link{}, m.missing(n.LAN.Parent)
	}
	return l, m.check(n, l)
}

// check says whether a network can be made on a link. The caller holds m.mu.
func (m *Mode) check(n options.Network, l link.Link) error {
	switch {
	case l.Owner.Ours && l.Owner.Parent != l.Name:
		return fault.Conflict("parent %q is a link of Berth's own (%s): want a link of the host", l.Name, l.Owner)
	case l.Master != 0:
		return fault.Conflict("parent %q is a port of another link (%s): use that as the parent", l.Name, m.nameOf(l.Master))
	case n.MTU > l.MTU:
		return fault.Invalid("option mtu=%d: it is more than that of parent %q, %d", n.MTU, l.Name, l.MTU)
	}
	return m.shares(n)
}

// shares says whether a network can use its parent beside those that do already.
func (m *Mode) shares(n options.Network) error {
	for _, other := range m.networks {
		if other.ID == n.ID || other.LAN.Parent != n.LAN.Parent {
			continue
		}
		if why := clash(n, other); why != "" {
			return fault.Conflict("parent %q is used by network %s: %s", n.LAN.Parent, short(other.ID), why)
		}
	}
	return nil
}

// clash says why two networks cannot have one parent, "" if they can.
func clash(n, other options.Network) string {
	switch {
	case n.Mode != other.Mode:
		return fmt.Sprintf("the kernel does not put %s links beside %s links, want another parent or mode=%s", n.Mode, other.Mode, other.Mode)
	case n.LAN.Type == options.MacvlanPassthru:
		return "a network with macvlan_mode=passthru must be the only one on its parent"
	case other.LAN.Type == options.MacvlanPassthru:
		return "it has macvlan_mode=passthru and must be the only one on its parent"
	case n.Mode == options.ModeIPvlan && (n.LAN.Type != other.LAN.Type || n.LAN.Flag != other.LAN.Flag):
		return fmt.Sprintf("all ipvlan networks on a parent have one mode, want ipvlan_mode=%s and ipvlan_flag=%s", other.LAN.Type, other.LAN.Flag)
	}
	return ""
}

// missing says that a parent does not exist, and which links could be one.
func (m *Mode) missing(name string) error {
	has, err := m.links.Segments("bridge")
	if err != nil {
		return err
	}
	return fault.NotFound("parent %q does not exist: the host has %s", name, has)
}

func (m *Mode) nameOf(index int) string {
	links, err := m.links.List()
	if err != nil {
		return fmt.Sprintf("#%d", index)
	}
	for _, l := range links {
		if l.Index == index {
			return l.Name
		}
	}
	return fmt.Sprintf("#%d", index)
}

// uses reports whether a network has this parent. The caller holds m.mu.
func (m *Mode) uses(parent string) bool {
	for _, n := range m.networks {
		if n.LAN.Parent == parent {
			return true
		}
	}
	return false
}

// leaveParent removes the parent if it is a VLAN that Berth has made and no network
// uses any more. The caller holds m.mu.
func (m *Mode) leaveParent(parent string) error {
	if m.uses(parent) {
		return nil
	}
	owner := link.OfParent(parent)
	l, ok, err := m.links.Get(parent)
	if err != nil || !ok || l.Owner != owner {
		return err
	}
	return m.links.Delete(parent, owner)
}

const (
	// parentWait is for a driver that is still loading when containers start.
	parentWait = 5 * time.Second
	parentPoll = 100 * time.Millisecond
)

// await waits until the parent is there and up: the kernel brings no link up on one
// that is down.
func (m *Mode) await(ctx context.Context, parent string) error {
	for end := time.Now().Add(parentWait); ; {
		l, ok, err := m.links.Get(parent)
		if err != nil || ok && l.Up {
			return err
		}
		if time.Now().After(end) {
			if !ok {
				return m.missing(parent)
			}
			return fault.Unavailable("parent %q is down: run `ip link set %s up` on the host", parent, parent)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(parentPoll):
		}
	}
}

// Adopt completes the spec of a new network by what is on the host: an MTU of 0
// becomes that of the parent, or of the link that a VLAN is to be made on. A parent
// that does not exist or cannot be used is an error that names it, as is access to
// the host where it has no address for that. Nothing is changed.
func (m *Mode) Adopt(ctx context.Context, n options.Network) (options.Network, error) {
	if err := ctx.Err(); err != nil {
		return n, err
	}
	if n.LAN.Parent == "" {
		if n.MTU != 0 {
			return n, nil
		}
		mtu, err := m.links.DefaultMTU()
		n.MTU = mtu
		return n, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l, err := m.usableParent(n)
	if errdefs.IsNotFound(err) {
		if base, _, ok := n.LAN.VLAN(); ok {
			l, err = m.base(base, n)
		}
	}
	if errdefs.IsNotFound(err) {
		return n, fault.Invalid("option parent=%s: %s", n.LAN.Parent, err)
	}
	if err == nil {
		err = m.kernelCan(n, l)
	}
	if err != nil {
		return n, err
	}
	if n.MTU == 0 {
		n.MTU = l.MTU
	}
	if n.LAN.HostAccess {
		return n, m.checkAccess(n)
	}
	return n, nil
}

// kernelCan refuses early what the kernel would refuse each container: a parent that is
// no Ethernet link, or has somebody else's links of the other kind on it. Those that
// are in containers already are not seen.
func (m *Mode) kernelCan(n options.Network, parent link.Link) error {
	const ethernet = 6
	if len(parent.MAC) != ethernet && n.LAN.Type != options.IPvlanL3 && n.LAN.Type != options.IPvlanL3S {
		return fault.Invalid("option parent=%s: want an Ethernet link, %q has no MAC address", n.LAN.Parent, parent.Name)
	}
	if parent.Name != n.LAN.Parent {
		return nil // The VLAN on it is new.
	}
	others := map[options.Mode][]string{options.ModeMacvlan: {"ipvlan", "ipvtap"}, options.ModeIPvlan: {"macvlan", "macvtap"}}[n.Mode]
	links, err := m.links.List()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Peer == parent.Index && slices.Contains(others, l.Kind) {
			return fault.Conflict("parent %q has the %s link %q on it: the kernel does not put %s links beside, want another parent", parent.Name, l.Kind, l.Name, n.Mode)
		}
	}
	return nil
}

// base is the link that a VLAN for the network will be on.
func (m *Mode) base(name string, n options.Network) (link.Link, error) {
	l, ok, err := m.links.Get(name)
	switch {
	case err != nil:
		return link.Link{}, err
	case !ok:
		return link.Link{}, m.missing(name)
	case l.Owner.Ours:
		return link.Link{}, fault.Conflict("link %q of VLAN %q is a link of Berth's own (%s): want a link of the host", name, n.LAN.Parent, l.Owner)
	case n.MTU > l.MTU:
		return link.Link{}, fault.Invalid("option mtu=%d: it is more than that of link %q of VLAN %q, %d", n.MTU, name, n.LAN.Parent, l.MTU)
	}
	return l, m.shares(n)
}

// short is an ID as `docker ps` shows it.
func short(id string) string {
	const n = 12
	return id[:min(n, len(id))]
}
