package netplugin

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

// Containers that come and go at once: no address is held by two, and none is left.
func TestAddressesOfOneSubnetAtOnce(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	const workers, rounds, each = 64, 12, 3
	var (
		mu      sync.Mutex
		holders = make(map[netip.Addr]string)
		wg      sync.WaitGroup
	)
	for w := range workers {
		wg.Go(func() {
			for round := range rounds {
				var mine []netip.Addr
				for i := range each {
					name := fmt.Sprintf("c%d.%d.%d", w, round, i)
					if w%2 == 0 {
						name = "" // an engine before 29
					}
					addr, err := e.ask(n, name, "")
					if !assert.Check(t, err) {
						continue
					}
					mu.Lock()
					other, twice := holders[addr]
					holders[addr] = fmt.Sprint("worker ", w)
					mu.Unlock()
					assert.Check(t, !twice, "%s was given to worker %d while %s has it", addr, w, other)
					mine = append(mine, addr)
				}
				for _, addr := range mine {
					mu.Lock()
					delete(holders, addr)
					mu.Unlock()
					assert.Check(t, e.giveBack(n, addr))
				}
			}
		})
	}
	wg.Wait()
	for range 2 { // and so it is on disk
		for addr, l := range e.leases() {
			if addr != "10.1.0.1" {
				assert.Equal(t, l.State, control.LeaseQuarantined, addr)
			}
		}
		e.restart()
	}
	e.later(time.Hour)
	pools, err := e.d.Admin().Pools(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, pools[0].Used, uint64(1))
	assert.Equal(t, pools[0].Free, pools[0].Size-1)
	assert.NilError(t, e.removeNetwork(n))
	e.empty()
}

// Networks that come and go at once, the same subnets again and again: no two that
// are there overlap, and nothing is left.
func TestNetworksAtOnce(t *testing.T) {
	e := newEnv(t)
	var (
		mu    sync.Mutex
		there = make(map[netip.Prefix]bool)
		wg    sync.WaitGroup
	)
	for w := range 32 {
		wg.Go(func() {
			for round := range 4 {
				subnet := ""
				if w%2 == 0 {
					subnet = fmt.Sprintf("10.77.%d.0/24", w%8)
				}
				n, err := e.createNetwork(fmt.Sprintf("n%d.%d", w, round), subnet, nil)
				if subnet != "" && errdefs.IsConflict(err) {
					continue // another worker has it
				}
				if !assert.Check(t, err) {
					continue
				}
				prefix := netip.MustParsePrefix(n.pool)
				mu.Lock()
				for other := range there {
					assert.Check(t, !other.Overlaps(prefix), "%s and %s", other, prefix)
				}
				there[prefix] = true
				mu.Unlock()
				_, err = e.ask(n, "", "")
				assert.Check(t, err)
				mu.Lock()
				delete(there, prefix)
				mu.Unlock()
				assert.Check(t, e.removeNetwork(n))
			}
		})
	}
	wg.Wait()
	e.empty()
}
