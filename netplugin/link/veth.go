package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

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
	// Port is how the bridge treats the host's end.
	Port Port
	// RateIn and RateOut limit what the container receives and sends, in bits per
	// second; 0 is no limit.
	RateIn, RateOut int64
	// Guarded lets the container send only IPv4, IPv6 and ARP, without a VLAN tag and
	// with no other sender than MAC and Addrs, or the link-local address that is made of
	// MAC.
	Guarded bool
	Addrs   []netip.Addr
}

// EnsureVeth makes the pair or repairs it. A pair whose container end has moved
// into a container is repaired on the host's side only. A link with one of the
// names that is not this endpoint's is left alone and named in a fault.Conflict. A
// bridge without room is fault.Exhausted.
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
		if err := h.repairVeth(v, host, master); err != nil {
			return false, err
		}
		return false, h.repairLimits(v, host)
	}
	err = h.create(v.Host, hostMAC(v.MAC), v.MTU, master.Index, vethInfo(v.Container, v.MAC, v.MTU))
	if errors.Is(err, unix.EXFULL) {
		return false, fullError(v.Master)
	}
	if err != nil {
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
	if err := h.limit(v, host); err != nil {
		return true, err
	}
	c := change{alias: OfEndpoint(v.EndpointID).String(), up: true}
	if v.Port != (Port{}) {
		c.port = &v.Port
	}
	if err := h.change(host.Index, c); err != nil {
		return true, fmt.Errorf("set up link %q: %w", v.Host, err)
	}
	if v.Port.Isolated {
		return true, h.checkIsolated(v)
	}
	return true, nil
}

// hostMAC is the address of the host's end. A bridge that has no address of its own,
// as an adopted one, takes the lowest of its ports: this is higher than that of any
// other link.
func hostMAC(container net.HardwareAddr) net.HardwareAddr {
	const highest, second = 0xfe, 0xfa
	if container == nil {
		return nil
	}
	mac := slices.Clone(container)
	if mac[0] = highest; container[0] == highest {
		mac[0] = second
	}
	return mac
}

func (h *Handle) repairVeth(v Veth, host, master Link) error {
	c := change{up: true}
	if host.Master != master.Index {
		c.master = master.Index
	}
	if host.MTU != v.MTU {
		c.mtu = v.MTU
	}
	if c.master != 0 {
		// Alone: the kernel sets a port before it plugs the link in.
		err := h.change(host.Index, change{master: c.master})
		if errors.Is(err, unix.EXFULL) {
			return fullError(v.Master)
		}
		if err != nil {
			return fmt.Errorf("plug link %q into bridge %q: %w", v.Host, v.Master, err)
		}
		host.Port, c.master = Port{}, 0
	}
	if host.Port != v.Port {
		c.port = &v.Port
	}
	if !host.Up || c.mtu != 0 || c.port != nil {
		if err := h.change(host.Index, c); err != nil {
			return fmt.Errorf("repair link %q: %w", v.Host, err)
		}
	}
	if v.Port.Isolated && c.port != nil {
		if err := h.checkIsolated(v); err != nil {
			return err
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
