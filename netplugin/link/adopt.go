package link

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// IsDocker tells the bridges of dockerd by name.
func IsDocker(name string) bool {
	if name == "docker0" || name == "docker_gwbridge" {
		return true
	}
	id, ok := strings.CutPrefix(name, "br-")
	return ok && len(id) == 12 && strings.Trim(id, "0123456789abcdef") == ""
}

// AdoptBridge makes a bridge that somebody else has made usable: it is brought up
// and given addresses that it lacks. added are those that it was given. Nothing
// else of it is changed.
func (h *Handle) AdoptBridge(name string, addrs []netip.Prefix) (added []netip.Prefix, err error) {
	l, ok, err := h.Get(name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.NotFound("bridge %q is gone; it was there before the network, so Berth does not make it: make it again, or remove the network", name)
	}
	if l.Kind != "bridge" {
		return nil, fault.Conflict("link %q is a %s now, not the bridge that the network was made on", name, l.Kind)
	}
	if l.Owner.Ours {
		return nil, fault.Conflict("link %q belongs to %s now, it is not the bridge that the network was made on", name, l.Owner)
	}
	if !l.Up {
		if err := h.change(l.Index, change{up: true}); err != nil {
			return nil, fmt.Errorf("bring up bridge %q: %w", name, err)
		}
	}
	ref := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: l.Name, Index: l.Index}}
	for _, p := range addrs {
		ok, err := h.addAddr(ref, p)
		if p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
			err = fmt.Errorf("%w (IPv6 is off on this bridge: run `sysctl -w net.ipv6.conf.%s.disable_ipv6=0` on the host)", err, name)
		}
		if err != nil {
			return added, err
		}
		if ok {
			added = append(added, p)
		}
	}
	return added, nil
}

// LeaveBridge takes from an adopted bridge the addresses that it was given and the
// ports that are Berth's. A bridge that is gone, or that another has taken the
// place of, is success.
func (h *Handle) LeaveBridge(name string, addrs []netip.Prefix) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok || l.Kind != "bridge" || l.Owner.Ours {
		return err
	}
	ports, err := h.Ports(l)
	if err != nil {
		return err
	}
	var errs []error
	for _, port := range ports {
		if port.Owner.Ours {
			errs = append(errs, h.deletePort(port))
		}
	}
	return errors.Join(append(errs, h.RemoveAddrs(name, addrs))...)
}

// RemoveAddrs takes addresses from an adopted bridge; those that it does not have
// are success.
func (h *Handle) RemoveAddrs(name string, addrs []netip.Prefix) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok {
		return err
	}
	ref := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: l.Name, Index: l.Index}}
	var errs []error
	for _, p := range addrs {
		err := do(func() error { return h.nl.AddrDel(ref, &netlink.Addr{IPNet: ipNet(p)}) })
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove address %s from bridge %q: %w", p, name, err))
		}
	}
	return errors.Join(errs...)
}
