package bridge

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/netplugin/apply"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// adoptUplink is Adopt for a network with an uplink. It notes whether that is up, and
// an MTU of 0 becomes the uplink's.
func (m *Mode) adoptUplink(n options.Network) (options.Network, error) {
	if n.Bridge != "" {
		l, ok, err := m.links.Get(n.Bridge)
		if err != nil {
			return n, err
		}
		if ok && !l.Owner.Ours {
			return n, fault.Conflict("bridge %q exists and is not Berth's: plug %q into it yourself and leave option uplink out, or choose another name for the bridge",
				n.Bridge, n.Uplink)
		}
	}
	l, err := m.links.CheckUplink(n.Uplink, n.Bridge)
	up := l.Up
	if base, _, ok := n.SegmentVLAN(); ok && errdefs.IsNotFound(err) {
		if l, ok, err = m.links.Get(base); err == nil && !ok {
			has, hasErr := m.links.Segments()
			err = errors.Join(fault.NotFound("link %q of VLAN %q does not exist: the host has %s", base, n.Uplink, has), hasErr)
		}
		if err == nil && l.Owner.Ours {
			err = fault.Conflict("link %q of VLAN %q is a link of Berth's own (%s): want a link of the host", base, n.Uplink, l.Owner)
		}
	}
	switch {
	case errdefs.IsNotFound(err):
		return n, fault.Invalid("option uplink=%s: %s", n.Uplink, err)
	case err != nil:
		return n, err
	case n.MTU > l.MTU:
		return n, fault.Invalid("option mtu=%d: it is more than that of uplink %q, %d", n.MTU, l.Name, l.MTU)
	case n.MTU == 0:
		n.MTU = l.MTU
	}
	n.UplinkUp = up
	return n, nil
}

// plugUplink makes the uplink, if it is a VLAN that is not there, and plugs it into
// the bridge.
func (m *Mode) plugUplink(n options.Network) (inverse apply.Inverse, err error) {
	made := false
	if base, id, ok := n.SegmentVLAN(); ok {
		if made, err = m.links.EnsureVLAN(n.Uplink, base, id); err != nil {
			return nil, err
		}
	}
	added, err := m.links.EnsureUplink(n.Uplink, n.Bridge)
	if made || added {
		inverse = func(context.Context) error { return m.unplugUplink(n) }
	}
	return inverse, err
}

// unplugUplink leaves the uplink as it was before the network. A VLAN that Berth has
// made goes.
func (m *Mode) unplugUplink(n options.Network) error {
	if n.Uplink == "" {
		return nil
	}
	err := m.links.ReleaseUplink(n.Uplink, n.Bridge, n.UplinkUp)
	l, ok, getErr := m.links.Get(n.Uplink)
	if getErr == nil && ok && l.Owner == link.OfParent(n.Uplink) && l.Master == 0 {
		return errors.Join(err, m.links.Delete(n.Uplink, l.Owner))
	}
	return errors.Join(err, getErr)
}

// uplinks looks at the uplinks of networks, by name.
func (m *Mode) uplinks(networks []options.Network) (map[string]link.Link, error) {
	out := map[string]link.Link{}
	for _, n := range networks {
		if n.Uplink == "" {
			continue
		}
		l, ok, err := m.links.Get(n.Uplink)
		if err != nil {
			return nil, err
		}
		if ok {
			out[n.Uplink] = l
		}
	}
	return out, nil
}

// uplinkDrift says what is wrong with a network's uplink, "" for nothing.
func uplinkDrift(n options.Network, bridge link.Link, byName map[string]link.Link) string {
	l, ok := byName[n.Uplink]
	switch {
	case !ok:
		return fmt.Sprintf("lacks its uplink %q", n.Uplink)
	case l.Master != bridge.Index:
		return fmt.Sprintf("has lost its uplink %q", n.Uplink)
	case !l.Up:
		return fmt.Sprintf("has its uplink %q down", n.Uplink)
	default:
		return ""
	}
}
