package link

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Bridge is the bridge of one network as it should be.
type Bridge struct {
	Name      string
	NetworkID string
	// MAC is set explicitly: a bridge without one takes that of its ports, so that
	// the gateway's MAC would change as containers come and go.
	MAC net.HardwareAddr
	// MTU in bytes; 0 leaves the kernel's default, which follows the ports.
	MTU int
	// IPv6 allows IPv6 on the bridge itself.
	IPv6 bool
}

// EnsureBridge makes the bridge or repairs it, and brings it up. created tells
// which. A link of that name that is not this network's is left alone and named
// in a fault.Conflict.
func (h *Handle) EnsureBridge(b Bridge) (created bool, err error) {
	owner := OfNetwork(b.NetworkID)
	l, ok, err := h.claim(b.Name, owner)
	if err != nil {
		return false, err
	}
	if ok && l.Kind != "bridge" {
		return false, fault.Conflict("link %q of network %s is a %s, not a bridge", b.Name, b.NetworkID, l.Kind)
	}
	if !ok {
		// The MTU is set below: only a change of the MTU, not its first value, keeps
		// the kernel from adjusting it to the ports.
		if err := h.create(b.Name, b.MAC, 0, 0, bridgeInfo()); err != nil {
			return false, createError("bridge", b.Name, err)
		}
		created = true
		if l, ok, err = h.Get(b.Name); err == nil && !ok {
			err = fmt.Errorf("bridge %q is gone again", b.Name)
		}
		if err == nil && l.Owner != owner && !l.Owner.halfMade() {
			err = fault.Conflict("bridge %q has been taken by %s", b.Name, l.Owner)
		}
		if err != nil {
			return true, err
		}
	}
	if err := h.bridgeSysctls(b.Name, b.IPv6); err != nil {
		return created, err
	}
	c := change{alias: owner.String(), up: true}
	if l.MTU != b.MTU {
		c.mtu = b.MTU
	}
	if l.MAC.String() != b.MAC.String() {
		c.mac = b.MAC
	}
	if !created && l.Up && c.mtu == 0 && c.mac == nil {
		return false, nil
	}
	if err := h.change(l.Index, c); err != nil {
		return created, fmt.Errorf("set up bridge %q: %w", b.Name, err)
	}
	return created, nil
}

// DeleteBridge removes the bridge of a network and the host ends of endpoints
// that are still on it; errors as Delete.
func (h *Handle) DeleteBridge(name, networkID string) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok {
		return err
	}
	owner := OfNetwork(networkID)
	if l.Owner == owner {
		ports, err := h.Ports(l)
		if err != nil {
			return err
		}
		for _, port := range ports {
			if !port.Owner.Ours {
				continue // Somebody plugged it in; the kernel unplugs it.
			}
			if err := h.deletePort(port); err != nil {
				return err
			}
		}
	}
	return h.Delete(name, owner)
}

// deletePort removes a port of Berth's with its limiter.
func (h *Handle) deletePort(port Link) error {
	if err := h.deleteIndex(port); err != nil {
		return err
	}
	if port.Owner.Endpoint == "" {
		return nil
	}
	return h.deleteLimiter(port.Name, port.Owner)
}

// claim looks for a link that belongs to owner. One that Berth left half made is
// cleared away first; one of anybody else is a fault.Conflict.
func (h *Handle) claim(name string, owner Owner) (Link, bool, error) {
	l, ok, err := h.Get(name)
	switch {
	case err != nil || !ok:
		return Link{}, false, err
	case l.Owner == owner:
		return l, true, nil
	case l.Owner.halfMade():
		return Link{}, false, h.deleteIndex(l)
	case l.Owner.Ours:
		return Link{}, false, fault.Conflict("link %q belongs to %s, not to %s", name, l.Owner, owner)
	default:
		return Link{}, false, fault.Conflict("link %q exists and is not Berth's: choose another name or remove it", name)
	}
}

func createError(what, name string, err error) error {
	if errors.Is(err, unix.EEXIST) {
		return fault.Conflict("%s %q: a link of that name exists", what, name)
	}
	return fmt.Errorf("make %s %q: %w", what, name, err)
}
