package options

import (
	"net/netip"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/ipam"
)

func TestPoolOptionsOfNetworks(t *testing.T) {
	pool := ipam.DefaultOptions()
	pool.Quarantine, pool.Probe = time.Hour, ipam.ProbeFull
	want := pool

	// What the network does not say is the pool's.
	n, _, err := lanNetwork(false, "parent=eth1", "10.2.0.0/24")
	assert.NilError(t, err)
	assert.Assert(t, n.IPAM == nil)
	want.Parent = "eth1"
	got, err := n.PoolOptions(pool)
	assert.NilError(t, err)
	assert.DeepEqual(t, got, want)

	n, _, err = lanNetwork(false, "parent=eth1 ipam.quarantine=90 ipam.exclude=10.2.0.2-10.2.0.9 ipam.sticky=off ipam.conflict=warn", "10.2.0.0/24")
	assert.NilError(t, err)
	assertStored(t, n)
	want.Quarantine, want.Sticky, want.Conflict = 90*time.Second, false, ipam.ConflictWarn
	want.Exclude = []ipam.Range{{First: netip.MustParseAddr("10.2.0.2"), Last: netip.MustParseAddr("10.2.0.9")}}
	got, err = n.PoolOptions(pool)
	assert.NilError(t, err)
	assert.DeepEqual(t, got, want, compareNetip())

	n, _, err = lanNetwork(false, "uplink=eth2 ipam.dhcp=true ipam.probe=off", "10.2.0.0/24")
	assert.NilError(t, err)
	got, err = n.PoolOptions(pool)
	assert.NilError(t, err)
	assert.Assert(t, got.DHCP && got.Parent == "eth2" && got.Probe == ipam.ProbeOff)
}

func TestWrongPoolOptionsOfNetworksAreNamed(t *testing.T) {
	for _, c := range []struct{ words, want string }{
		{"ipam.quarantine=soon", `option ipam.quarantine="soon": want a time from 0 to 24h`},
		{"ipam.exclude=10.2.0.0-x", `option ipam.exclude="10.2.0.0-x": `},
		{"ipam.sticky=yes", `option ipam.sticky="yes": want off or on`},
		{"ipam.probe=slow", "want fast, full or off"},
		{"ipam.dhcp=yes", "option ipam.dhcp="},
		{"ipam.parent=eth1", `unknown option "ipam.parent"`},
		{"ipam.quarantin=1", "did you mean ipam.quarantine?"},
		{"ipam.dhcp=true", "it needs the link to the LAN, as parent=eth1"},
		{"parent=eth1 ipam.dhcp=true ipam.exclude=10.2.0.9", "the DHCP server chooses the addresses"},
	} {
		n, _, err := lanNetwork(false, c.words, "10.2.0.0/24")
		if err == nil {
			_, err = n.PoolOptions(ipam.DefaultOptions())
		}
		assert.ErrorContains(t, err, c.want, c.words)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
	}
}
