package netplugin

import (
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// A network says what its pools are like: Compose cannot say it to the IPAM driver.
func TestNetworksSayWhatTheirPoolsAreLike(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("web", "10.1.0.0/24", map[string]any{"ipam.exclude": "10.1.0.2-10.1.0.9", "ipam.quarantine": "5m"})
	assert.NilError(t, err)
	e.restart()
	pool, _ := e.d.store.leases.pool(n.poolID)
	assert.Equal(t, pool.Options.Quarantine, 5*time.Minute)
	c := mustRun(t, e, n, "a", "")
	assert.Equal(t, c.addr, "10.1.0.10/24")
	// dockerd repeats a request that was not answered.
	assert.NilError(t, e.net.CreateNetwork(t.Context(), n.request(map[string]any{"ipam.exclude": "10.1.0.2-10.1.0.9", "ipam.quarantine": "5m"})))
	err = e.net.CreateNetwork(t.Context(), n.request(map[string]any{"ipam.quarantine": "5m"}))
	assert.ErrorContains(t, err, "exists with other options")
	assert.NilError(t, e.stop(c))

	_, err = e.createNetwork("dhcp", "10.2.0.0/24", map[string]any{"ipam.dhcp": "true"})
	assert.Error(t, err, "IPAM option dhcp=true: it needs the link to the LAN, as parent=eth1")
	_, err = e.createNetwork("full", "10.3.0.0/29", map[string]any{"ipam.exclude": "10.3.0.0/29"})
	assert.Error(t, err, "IPAM option exclude: it leaves no address of subnet 10.3.0.0/29")
	// Another IPAM driver's addresses are not Berth's to exclude.
	other := &dockerNet{id: id("other"), pool: "10.4.0.0/24", gateway: "10.4.0.1/24"}
	req := other.request(map[string]any{"ipam.sticky": "off"})
	req.IPv4Data[0].AddressSpace = "LocalDefault"
	assert.ErrorContains(t, e.net.CreateNetwork(t.Context(), req), "options ipam.*: the addresses of subnet 10.4.0.0/24 come from another IPAM driver")
	assert.NilError(t, e.removeNetwork(n))
}
