package commands

import (
	"context"
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// lan is what Berth tells of addresses, and what it was asked to do with them.
type lan struct {
	leases   []control.Lease
	pools    []control.Pool
	reserved []control.ReserveRequest
	released []control.ReleaseRequest
}

// newLAN is a world with one more network, which is on a LAN, and with a lease in
// each state.
func newLAN(t *testing.T, settings ...control.Setting) *world {
	t.Helper()
	w := newWorld(t)
	now := time.Now()
	// Half a minute keeps what is rounded from changing while a test runs.
	const slack = 30 * time.Second
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	front, office := long("a"), long("e")
	w.networks = append(w.networks, network.Summary{ID: office, Name: "office", Driver: "berth-net:latest", Scope: "local"})
	w.containers = append(w.containers, container.Summary{ID: long("3"), Names: []string{"/printer"}, NetworkSettings: on(office, long("8"))})
	w.berth = append(w.berth, control.Network{
		ID: office, State: control.NetworkReady, Mode: "macvlan", Parent: "eth1.50", LANType: "bridge", HostAccess: true, Created: now.Add(-26 * time.Hour),
		Subnets: []control.Subnet{{Pool: prefix("192.0.2.0/24"), Gateway: addr("192.0.2.1")}}, ICC: true, Endpoints: 1,
	})
	w.endpoints = append(w.endpoints, control.Endpoint{
		ID: long("8"), NetworkID: office, State: control.EndpointAlive, Created: now.Add(-time.Hour), MAC: "02:00:00:00:00:08", IPv4: prefix("192.0.2.129/24"),
	})
	w.lan = lan{
		leases: []control.Lease{
			{NetworkID: office, PoolID: "pool-1", Addr: addr("192.0.2.131"), State: control.LeaseConflict, MAC: "00:00:5e:00:53:01", Since: now.Add(-20*time.Minute - slack), Until: now.Add(40*time.Minute + slack)},
			{
				NetworkID: office, PoolID: "pool-1", Addr: addr("192.0.2.129"), State: control.LeaseActive, Key: "printer", MAC: "02:00:00:00:00:08", EndpointID: long("8"),
				Since: now.Add(-time.Hour - slack), Until: now.Add(3*time.Hour + slack), DHCP: &control.DHCPLease{
					Server: addr("192.0.2.1"), ClientID: "ff02", Hostname: "printer", State: control.DHCPRenewing, Renews: now.Add(time.Hour), Expires: now.Add(3*time.Hour + slack),
				},
			},
			{NetworkID: office, PoolID: "pool-1", Addr: addr("192.0.2.132"), State: control.LeaseReserved, Key: "02:00:00:00:00:09", Reserved: true, Since: now.Add(-73 * time.Hour)},
			{NetworkID: office, PoolID: "pool-1", Addr: addr("192.0.2.1"), State: control.LeaseGateway, Since: now.Add(-26 * time.Hour)},
			{NetworkID: office, PoolID: "pool-1", Addr: addr("192.0.2.9"), State: control.LeaseAux, Since: now.Add(-26 * time.Hour)},
			{NetworkID: front, PoolID: "pool-3", Addr: addr("fd00:1::2"), State: control.LeaseActive, Key: "web", EndpointID: long("5"), MAC: "02:00:00:00:00:05", Pinned: true, Since: now.Add(-2 * time.Hour)},
			{NetworkID: front, PoolID: "pool-2", Addr: addr("10.1.0.10"), State: control.LeaseReleased, Key: "old", Since: now.Add(-48 * time.Hour)},
			{NetworkID: front, PoolID: "pool-2", Addr: addr("10.1.0.4"), State: control.LeaseQuarantined, Key: "job", Since: now.Add(-9*time.Minute - slack), Until: now.Add(50*time.Minute + slack)},
			{NetworkID: front, PoolID: "pool-2", Addr: addr("10.1.0.2"), State: control.LeaseActive, Key: "web", Reserved: true, EndpointID: long("5"), MAC: "02:00:00:00:00:05", Since: now.Add(-2 * time.Hour)},
			{NetworkID: front, PoolID: "pool-2", Addr: addr("10.1.0.3"), State: control.LeasePending, Key: "next", Since: now.Add(-time.Minute - slack)},
			{PoolID: "pool-4", Addr: addr("10.9.0.1"), State: control.LeaseGateway, Since: now.Add(-time.Minute - slack)},
		},
		pools: []control.Pool{
			{
				ID: "pool-1", NetworkID: office, Prefix: prefix("192.0.2.0/24"), Range: prefix("192.0.2.128/28"), Parent: "eth1.50", Since: now.Add(-26 * time.Hour),
				Sticky: true, Quarantine: time.Minute, Probe: "fast", Conflict: "refuse", Exclude: []string{"192.0.2.140-192.0.2.143"}, DHCP: true,
				Size: 12, Used: 1, Reserved: 1, Conflicts: 1, Free: 9,
			},
			{
				ID: "pool-2", NetworkID: front, Prefix: prefix("10.1.0.0/24"), Since: now.Add(-50 * time.Hour), Sticky: true, Quarantine: time.Hour,
				Probe: "off", Conflict: "refuse", Size: 254, Used: 2, Quarantined: 1, Free: 251, Released: 1,
			},
			{ID: "pool-3", NetworkID: front, Prefix: prefix("fd00:1::/64"), Since: now.Add(-50 * time.Hour), Probe: "off", Conflict: "refuse", Size: math.MaxUint64, Used: 1, Free: math.MaxUint64},
			{ID: "pool-4", Prefix: prefix("10.9.0.0/16"), Since: now.Add(-time.Minute - slack), Probe: "off", Conflict: "refuse", Size: 65534, Used: 1, Free: 65533},
		},
	}
	if len(settings) > 0 {
		w.settings, w.plugins = append(w.settings, settings...), nil
		w.dir = t.TempDir()
		w.start()
	}
	return w
}

func (w *world) Leases(_ context.Context, id string) (found []control.Lease, _ error) {
	for _, l := range w.lan.leases {
		if id == "" || l.NetworkID == id {
			found = append(found, l)
		}
	}
	return found, nil
}

func (w *world) Pools(context.Context) ([]control.Pool, error) { return w.lan.pools, nil }

func (w *world) ReserveLease(_ context.Context, req control.ReserveRequest) (control.Lease, error) {
	w.lan.reserved = append(w.lan.reserved, req)
	for _, l := range w.lan.leases {
		if l.NetworkID == req.Network && l.Addr == req.Addr && l.Key != req.Key {
			return control.Lease{}, fault.Conflict("address %s is used by %s", req.Addr, l.Key)
		}
	}
	return control.Lease{NetworkID: req.Network, Addr: req.Addr, State: control.LeaseReserved, Key: req.Key, Reserved: true, Since: time.Now()}, nil
}

func (w *world) ReleaseLease(_ context.Context, req control.ReleaseRequest) (control.Lease, error) {
	w.lan.released = append(w.lan.released, req)
	for _, l := range w.lan.leases {
		switch {
		case l.NetworkID != req.Network || l.Addr != req.Addr:
		case !releasable(l):
			return control.Lease{}, fault.Conflict("address %s is in use", req.Addr)
		default:
			return l, nil
		}
	}
	return control.Lease{}, fault.NotFound("address %s is free", req.Addr)
}
