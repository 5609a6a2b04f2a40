package netplugin

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"

	dockeripam "github.com/docker/go-plugins-helpers/ipam"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// Names of the address spaces. dockerd wants two, and sends pools of swarm
// networks to the second.
const (
	localSpace  = "berth-local"
	globalSpace = "berth-global"
)

// Options of RequestAddress.
const (
	optRequestType  = "RequestAddressType"
	requestGateway  = "com.docker.network.gateway"
	optEndpointName = "com.docker.network.endpoint.name"
	optEndpointMAC  = "com.docker.network.endpoint.macaddress"
)

func random() io.Reader { return rand.Reader }

// RequestPool answers IpamDriver.RequestPool.
func (d *Driver) RequestPool(ctx context.Context, req *dockeripam.RequestPoolRequest) (*dockeripam.RequestPoolResponse, error) {
	if req.AddressSpace != localSpace {
		return nil, fault.Invalid("address space %q: want %s; networks of a swarm are not supported yet", req.AddressSpace, localSpace)
	}
	opts, warnings, err := options.ParsePool(req.Options)
	if err != nil {
		return nil, err
	}
	pool, err := d.poolRequest(req)
	if err != nil {
		return nil, err
	}
	if err := d.checkParent(opts.Parent); err != nil {
		return nil, err
	}
	pool.Options = opts
	got, reclaimed, err := d.store.requestPool(ctx, pool)
	if err != nil {
		return nil, err
	}
	d.warn(warnings, nil)
	for _, id := range reclaimed {
		d.log.WithField("pool", id).Warn("subnet was requested but never used; given to a new network")
	}
	return &dockeripam.RequestPoolResponse{PoolID: got.ID, Pool: got.Prefix.String()}, nil
}

// checkParent refuses a link to a LAN that is not there. That of a VLAN may be made
// later, on one that is.
func (d *Driver) checkParent(name string) error {
	if name == "" {
		return nil
	}
	_, ok, err := d.links.Get(name)
	if base, _, isVLAN := (options.LAN{Parent: name}).VLAN(); !ok && err == nil && isVLAN {
		_, ok, err = d.links.Get(base)
	}
	if err != nil || ok {
		return err
	}
	return fault.Invalid("IPAM option parent=%s: this host has no such link", name)
}

func (d *Driver) poolRequest(req *dockeripam.RequestPoolRequest) (ipam.PoolRequest, error) {
	pool := ipam.PoolRequest{IPv6: req.V6}
	var err error
	if pool.Prefix, err = parseOptionalPrefix("subnet", req.Pool); err != nil {
		return ipam.PoolRequest{}, err
	}
	if pool.Range, err = parseOptionalPrefix("range", req.SubPool); err != nil {
		return ipam.PoolRequest{}, err
	}
	if pool.Prefix.IsValid() {
		return pool, nil
	}
	pool.Busy, pool.Avoid, err = d.busy()
	return pool, err
}

func parseOptionalPrefix(what, s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		const most = 64
		return netip.Prefix{}, fault.Invalid("%s %q: want an address and a prefix length, as 10.1.0.0/24", what, s[:min(most, len(s))])
	}
	return p, nil
}

// busy returns what automatic pools must not overlap: networks that the host is
// in and the name servers it asks, which is what dockerd checks too, over and
// over until it is content. Other routes are avoided as long as there is room,
// because a VPN may route all of 10.0.0.0/8.
func (d *Driver) busy() (busy, avoid []netip.Prefix, _ error) {
	routes, err := d.links.Routes()
	if err != nil {
		return nil, nil, err
	}
	for _, r := range routes {
		// Routes to half of everything are a VPN's way to be the default one.
		const half = 1
		switch {
		case r.Dst.Bits() <= half:
		case r.OnLink:
			busy = append(busy, r.Dst)
		default:
			avoid = append(avoid, r.Dst)
		}
	}
	servers, err := readResolvers(d.resolvers)
	if err != nil {
		return nil, nil, err
	}
	for _, addr := range servers {
		busy = append(busy, netip.PrefixFrom(addr, addr.BitLen()))
	}
	return busy, avoid, nil
}

// readResolvers returns the name servers of a resolv.conf(5). "" and a file that
// does not exist have none.
func readResolvers(path string) ([]netip.Addr, error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, during("read name servers", err)
	}
	return parseResolvers(string(text)), nil
}

// parseResolvers reads the nameserver lines and passes over all others, as the C
// library does.
func parseResolvers(text string) []netip.Addr {
	var servers []netip.Addr
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			servers = append(servers, addr.WithZone("").Unmap())
		}
	}
	return servers
}

// ReleasePool answers IpamDriver.ReleasePool. All addresses of the pool are free
// afterwards; dockerd does not always release them one by one.
func (d *Driver) ReleasePool(_ context.Context, req *dockeripam.ReleasePoolRequest) error {
	d.unwatchPool(req.PoolID)
	ended, err := d.store.leases.releasePool(req.PoolID)
	d.giveBackNow(ended)
	return err
}

// RequestAddress answers IpamDriver.RequestAddress. The address comes back with
// the prefix length of the network.
func (d *Driver) RequestAddress(ctx context.Context, req *dockeripam.RequestAddressRequest) (*dockeripam.RequestAddressResponse, error) {
	want := ipam.AddressRequest{
		Pool:    req.PoolID,
		Gateway: req.Options[optRequestType] == requestGateway,
		Key:     d.keyOf(req.Options),
	}
	if req.Address != "" {
		addr, err := parseAddress(req.Address)
		if err != nil {
			return nil, err
		}
		want.Addr = addr
	}
	name := req.Options[optEndpointName]
	got, err := d.requestAddress(ctx, want, name)
	if d.makeRoom(ctx, want, err) {
		got, err = d.requestAddress(ctx, want, name)
	}
	if err != nil {
		return nil, err
	}
	return &dockeripam.RequestAddressResponse{Address: got.String()}, nil
}

// keyOf is what an address is kept for: the container's name, where dockerd sends
// it, or its MAC address, where that is set.
func (d *Driver) keyOf(opts map[string]string) string {
	if !d.keyByMAC {
		return opts[optEndpointName]
	}
	mac, err := net.ParseMAC(opts[optEndpointMAC])
	if err != nil {
		return ""
	}
	return mac.String()
}

// ReleaseAddress answers IpamDriver.ReleaseAddress.
func (d *Driver) ReleaseAddress(_ context.Context, req *dockeripam.ReleaseAddressRequest) error {
	addr, err := parseAddress(req.Address)
	if err != nil {
		return err
	}
	pool, _ := d.store.leases.pool(req.PoolID)
	lease, kept, err := d.store.leases.releaseAddress(req.PoolID, addr)
	if kept {
		d.log.WithField("address", addr).Debug("address was released while an endpoint has it; it is free when the endpoint is removed")
		return err
	}
	d.giveBack([]endedLease{{pool, lease}})
	return err
}

// parseAddress reads an address; engines add no prefix length, but it would say
// nothing new.
func parseAddress(s string) (netip.Addr, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Addr(), nil
	}
	addr, err := netip.ParseAddr(s)
	if err != nil || addr.Zone() != "" {
		const most = 64
		return netip.Addr{}, fault.Invalid("address %q: want an IP address, as 10.1.0.2", s[:min(most, len(s))])
	}
	return addr, nil
}
