package netplugin

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

// Any bodies of requests for addresses, one a line, and of releases after a "-": none
// is given out twice, none lies outside its subnet, and a daemon that starts anew knows
// the same.
func FuzzAddresses(f *testing.F) {
	for _, seed := range []string{
		"{}\n-{}",
		`{"Options":null}` + "\n" + `{"Options":{"com.docker.network.endpoint.name":"a"}}` + "\n" + `{"Options":{"com.docker.network.endpoint.name":"a"}}`,
		`{"Address":"10.1.0.3"}` + "\n" + `-{"Address":"10.1.0.3"}` + "\n" + `{"Address":"10.1.0.3","Options":{"com.docker.network.endpoint.macaddress":"02:00:00:00:00:01"}}`,
		`{"Options":{"RequestAddressType":"com.docker.network.gateway"}}` + "\n" + `-{"Address":"10.1.0.1"}` + "\n{}",
		`{"Address":"10.1.0.2/29"}` + "\n" + `{"Address":"::ffff:10.1.0.2"}` + "\n" + `{"Address":"fe80::1%eth0"}`,
		"{}\n{}\n{}\n{}\n{}\n{}\n" + `-{"Address":"10.1.0.4"}` + "\n{}",
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, bodies string, keyByMAC bool) {
		e := newEnv(t)
		e.with = func(cfg *Config) { cfg.KeyByMAC = keyByMAC }
		e.restart()
		n := mustNetwork(t, e, "net", "10.1.0.0/29")
		running := mustRun(t, e, n, "c", "")
		subnet := netip.MustParsePrefix(n.pool)
		// given has who an address was given to: a name or MAC address, or "".
		given := map[netip.Addr]string{netip.MustParsePrefix(running.addr).Addr(): ""}
		const most = 40
		for i, body := range strings.Split(bodies, "\n") {
			if i == most {
				break
			}
			if rest, ok := strings.CutPrefix(body, "-"); ok {
				req := new(ipam.ReleaseAddressRequest)
				if json.Unmarshal([]byte(rest), req) != nil {
					continue
				}
				req.PoolID = n.poolID
				addr, err := parseAddress(req.Address)
				if e.ipam.ReleaseAddress(t.Context(), req) == nil && err == nil && addr != netip.MustParsePrefix(running.addr).Addr() {
					delete(given, addr)
				}
				continue
			}
			req := new(ipam.RequestAddressRequest)
			if json.Unmarshal([]byte(body), req) != nil {
				continue
			}
			req.PoolID = n.poolID
			got, err := e.ipam.RequestAddress(t.Context(), req)
			if err != nil {
				continue
			}
			prefix := netip.MustParsePrefix(got.Address)
			assert.Assert(t, subnet.Contains(prefix.Addr()) && prefix.Bits() == subnet.Bits(), got.Address)
			key := e.d.keyOf(req.Options)
			had, twice := given[prefix.Addr()]
			assert.Assert(t, !twice || key != "" && had == key, "%s was given to %q and %q", prefix, had, key)
			given[prefix.Addr()] = key
		}
		before := e.leases()
		for addr := range given {
			state := before[addr.String()].State
			assert.Assert(t, state == control.LeasePending || state == control.LeaseActive || state == control.LeaseGateway, "%s is %s", addr, state)
		}
		e.restart()
		after := e.leases()
		// A network takes its gateway again when somebody has released it.
		delete(before, "10.1.0.1")
		delete(after, "10.1.0.1")
		assert.DeepEqual(t, after, before, cmpopts.EquateComparable(netip.Addr{}))
		assert.DeepEqual(t, e.problems(), []string(nil))
	})
}
