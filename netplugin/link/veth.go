package link

import (
	"fmt"
	"net"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Veth is the pair of links of one endpoint as it should be.
type Veth struct {
	// Host is the end that is a port of the bridge Master. Container is the end
	// that dockerd moves away; it is made here, down and without addresses.
	Host, Container string
	EndpointID      string
	Master          string
	MAC             net.HardwareAddr
	// MTU in bytes of both ends; 0 leaves the kernel's default.
	MTU int
}

// EnsureVeth makes the pair or repairs it. A pair whose container end has moved
// into a container is repaired on the host's side only. A link with one of the
// names that is not this endpoint's is left alone and named in a fault.Conflict.
func (h *Handle) EnsureVeth(v Veth) (created bool, err error) {
	master, ok, err := h.Get(v.Master)
	if err != nil {
		return false, err
	}
	if !ok {
		return false, fault.NotFound("bridge %q of endpoint %s does not exist", v.Master, v.EndpointID)
	}
	host, ok, err := h.claim(v.Host, OfEndpoint(v.EndpointID))
	if err != nil {
		return false, err
	}
	if ok {
		return false, h.repairVeth(v, host, master)
	}
	if err := h.create(v.Host, nil, v.MTU, master.Index, vethInfo(v.Container, v.MAC, v.MTU)); err != nil {
		return false, createError("endpoint link", v.Host+" or "+v.Container, err)
	}
	host, ok, err = h.Get(v.Host)
	if err == nil && !ok {
		err = fmt.Errorf("link %q is gone again", v.Host)
	}
	if err != nil {
		return true, err
	}
	// A port needs no addresses of its own; without this the kernel gives it a
	// link-local one and announces that.
	if err := h.disableIPv6(v.Host); err != nil {
		return true, err
	}
	if err := h.change(host.Index, change{alias: OfEndpoint(v.EndpointID).String(), up: true}); err != nil {
		return true, fmt.Errorf("set up link %q: %w", v.Host, err)
	}
	return true, nil
}

func (h *Handle) repairVeth(v Veth, host, master Link) error {
	c := change{up: true}
	if host.Master != master.Index {
		c.master = master.Index
	}
	if host.MTU != v.MTU {
		c.mtu = v.MTU
	}
	if !host.Up || c.master != 0 || c.mtu != 0 {
		if err := h.change(host.Index, c); err != nil {
			return fmt.Errorf("repair link %q: %w", v.Host, err)
		}
	}
	if host.Peer == 0 {
		return nil
	}
	peer, ok, err := h.byIndex(host.Peer)
	if err != nil {
		return err
	}
	if !ok || peer.Kind != "veth" || peer.Peer != host.Index {
		return nil // It moved away while we looked.
	}
	c = change{}
	if peer.MTU != v.MTU {
		c.mtu = v.MTU
	}
	if peer.MAC.String() != v.MAC.String() {
		c.mac = v.MAC
	}
	if c.mtu == 0 && c.mac == nil {
		return nil
	}
	if err := h.change(peer.Index, c); err != nil {
		return fmt.Errorf("repair link %q: %w", peer.Name, err)
	}
	return nil
}
