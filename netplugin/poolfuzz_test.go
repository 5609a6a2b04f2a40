package netplugin

import (
	"net/netip"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/ipam"
)

// Any three bodies to the methods of pools and addresses, one after the other, beside a network
// with a container on a pool with options: no panic, no address is the container's and
// another's, none lies outside its pool, and the next daemon knows the same.
func FuzzPools(f *testing.F) {
	for _, seed := range []string{
		`{"AddressSpace":"berth-local","Pool":"10.3.0.0/29","SubPool":"10.3.0.0/30","Options":{"exclude":"10.3.0.2","quarantine":"0","sticky":"off"}}`,
		`{"AddressSpace":"berth-local","Pool":"10.1.0.0/29","Options":{"parent":"eth1","probe":"full","conflict":"warn"}}`,
		`{"AddressSpace":"berth-local","Pool":"fd00::/64","V6":true,"Options":{"exclude":"fd00::/65"}}`,
		`{"AddressSpace":"berth-local","Pool":"10.3.0.0/24","Options":{"dhcp":"true","parent":"eth1"}}`,
		`{"PoolID":"POOL","Address":"10.1.0.2"}`,
		`{"PoolID":"POOL","Options":{"com.docker.network.endpoint.name":"web"}}`,
		`{"PoolID":"POOL","Address":"10.1.0.5/29","Options":{"com.docker.network.endpoint.name":"web"}}`,
		`{"PoolID":"POOL","Address":"10.1.0.1","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"PoolID":"POOL","Address":"::ffff:10.1.0.3"}`,
		`{"PoolID":"POOL","Address":"fe80::1%eth0"}`,
	} {
		for method := range byte(4) {
			f.Add(method, []byte(seed), byte(2), []byte(`{"PoolID":"POOL"}`), byte(3), []byte(`{"PoolID":"POOL","Address":"10.1.0.2"}`))
		}
	}
	f.Fuzz(func(t *testing.T, m1 byte, b1 []byte, m2 byte, b2 []byte, m3 byte, b3 []byte) {
		e := newEnv(t)
		n, err := e.createNetwork("net", "10.1.0.0/29", map[string]any{"ipam.exclude": "10.1.0.6"})
		assert.NilError(t, err)
		c := mustRun(t, e, n, "c", "")
		const first, methods = 8, 4 // those of IPAM in call
		for _, one := range []struct {
			method byte
			body   []byte
		}{{m1, b1}, {m2, b2}, {m3, b3}} {
			call(t, e, n, first+one.method%methods, one.body)
		}
		assert.DeepEqual(t, e.problems(), []string(nil))
		view(e.d.store.leases, func(a *ipam.Allocator) (none struct{}) {
			for _, pool := range a.Pools() {
				seen := make(map[netip.Addr]bool)
				for _, lease := range a.Leases(pool.ID) {
					assert.Assert(t, pool.Prefix.Contains(lease.Addr) && !seen[lease.Addr], "%s of %s", lease.Addr, pool.Prefix)
					seen[lease.Addr] = true
				}
			}
			lease, ok := a.Lease(n.poolID, c.ip())
			assert.Assert(t, ok && lease.Endpoint == c.endpoint, "%+v", lease)
			return none
		})
		_, whole := e.d.store.leases.lease(n.poolID, netip.MustParsePrefix(n.gateway).Addr())
		before := recorded(e.d.store.leases)
		e.restart()
		assert.DeepEqual(t, e.problems(), []string(nil))
		// A gateway that was released is its network's again, as long as that is there.
		assert.Assert(t, !whole || recorded(e.d.store.leases) == before, "the next daemon knows something else")
	})
}
