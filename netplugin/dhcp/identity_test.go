package dhcp

import (
	"encoding/json"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
	"pgregory.net/rapid"
)

// Identities are on disk and in the databases of servers: they never change.
func TestIdentitiesStayTheSame(t *testing.T) {
	s := Space{Host: "host", Parent: parent, Subnet: subnet()}
	assert.Equal(t, s.Slot(1).MAC.String(), "7e:e3:14:4a:70:79")
	assert.Equal(t, s.Slot(1).Slot, "slot-1")
	assert.DeepEqual(t, s.Slot(1), s.Slot(1))
	assert.Equal(t, s.Key("web").Slot, "web")
	assert.DeepEqual(t, s.Key("web").ClientID, append([]byte{1}, s.Key("web").MAC...))
}

func TestIdentitiesDiffer(t *testing.T) {
	s := Space{Host: "host", Parent: parent, Subnet: subnet()}
	other := []Space{
		s, {Host: "host2", Parent: parent, Subnet: subnet()}, {Host: "host", Parent: "eth2", Subnet: subnet()},
		{Host: "host", Parent: parent, Subnet: netip.MustParsePrefix("10.8.0.0/24")}, {Host: "hosteth1", Subnet: subnet()},
	}
	seen := map[string]string{}
	for _, space := range other {
		for _, id := range []Identity{space.Slot(1), space.Slot(11), space.Key("slot-1"), space.Key("web")} {
			mac := id.MAC.String()
			assert.Equal(t, seen[mac], "", "%s of %v", id.Slot, space)
			seen[mac] = id.Slot
			assert.Equal(t, id.MAC[0]&3, byte(2))
		}
	}
}

func TestIdentityOfAMAC(t *testing.T) {
	s := Space{Host: "host", Parent: parent, Subnet: subnet()}
	mac := net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}
	id, err := s.MAC(mac)
	assert.NilError(t, err)
	assert.DeepEqual(t, id, Identity{Slot: "52:54:00:01:02:03", MAC: mac, ClientID: []byte{1, 0x52, 0x54, 0, 1, 2, 3}})
	for _, bad := range []net.HardwareAddr{nil, make(net.HardwareAddr, 6), make(net.HardwareAddr, 8), broadcastMAC(), {1, 0, 0x5e, 0, 0, 1}} {
		_, err := s.MAC(bad)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", bad)
	}
}

func TestFreeSlot(t *testing.T) {
	used := map[int]bool{1: true, 2: true, 4: true}
	assert.Equal(t, FreeSlot(func(n int) bool { return used[n] }), 3)
	assert.Equal(t, FreeSlot(func(int) bool { return false }), 1)
}

func TestHostLabel(t *testing.T) {
	for name, want := range map[string]string{
		"": "", "web": "web", "my_web.1": "my-web-1", "_": "", "-a-": "a", "größe": "gr--e",
		strings.Repeat("a", 62) + ".b": strings.Repeat("a", 62), strings.Repeat("x", 300): strings.Repeat("x", 63),
	} {
		assert.Equal(t, hostLabel(name), want)
	}
	rapid.Check(t, func(t *rapid.T) {
		got := hostLabel(rapid.String().Draw(t, "name"))
		assert.Assert(t, len(got) <= 63 && strings.Trim(got, "-") == got)
	})
}

// A lease is the same after it was stored.
func TestALeaseCanBeStored(t *testing.T) {
	r, ok := parse(answer(slot(1), [4]byte{1}, usualOptions()...))
	assert.Assert(t, ok)
	l, err := leaseFrom(r, parent, slot(1), subnet(), time.Now())
	assert.NilError(t, err)
	b, err := json.Marshal(l)
	assert.NilError(t, err)
	var got Lease
	assert.NilError(t, json.Unmarshal(b, &got))
	assert.DeepEqual(t, got, l, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }))
}
