package doctor

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

func TestParentsOfLANs(t *testing.T) {
	ns, in := patient(t)
	ns.Run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	look := func() control.Finding {
		in.Parents = []Parent{{Name: "lan0", OwnMACs: true}}
		return worst(Run(t.Context(), in), "parents")
	}
	f := look()
	assert.Equal(t, f.Status, control.StatusFail, "%+v", f)
	assert.Assert(t, strings.Contains(f.Summary, "is down") && f.Cure == "ip link set lan0 up", "%+v", f)
	ns.Run("ip", "link", "set", "lan0", "up")
	f = look()
	assert.Equal(t, f.Status, control.StatusWarn, "%+v", f)
	assert.Assert(t, strings.Contains(f.Summary, "has no carrier"), "%+v", f)
	ns.Run("ip", "link", "set", "lan1", "up")
	f = look()
	assert.Equal(t, f.Status, control.StatusOK, "%+v", f)
	driver, err := in.Links.Driver("lan0")
	assert.NilError(t, err)
	assert.Equal(t, driver, "veth")
	ns.Run("ip", "link", "del", "lan0")
	f = look()
	assert.Equal(t, f.Status, control.StatusFail, "%+v", f)
	assert.Assert(t, strings.Contains(f.Summary, `parent "lan0" is missing`), "%+v", f)
	in.Parents = []Parent{{Name: "lan0", OwnMACs: true, OfBridge: true}}
	f = worst(Run(t.Context(), in), "parents")
	assert.Equal(t, f.Status, control.StatusFail, "%+v", f)
	assert.Assert(t, strings.Contains(f.Summary, `uplink "lan0" is missing`) && strings.Contains(f.Detail, "joins the bridge again"), "%+v", f)
}

func TestVirtualSwitches(t *testing.T) {
	for driver := range virtualSwitches() {
		f := driverFinding(Parent{Name: "eth0", OwnMACs: true}, driver)
		assert.Equal(t, f.Status, control.StatusWarn)
		assert.Assert(t, strings.Contains(f.Summary, driver) && strings.Contains(f.Detail, "mode=ipvlan"), "%+v", f)
		assert.Equal(t, driverFinding(Parent{Name: "eth0"}, driver).Status, control.StatusOK)
	}
	assert.Equal(t, driverFinding(Parent{Name: "eth0", OwnMACs: true}, "igb").Status, control.StatusOK)
}
