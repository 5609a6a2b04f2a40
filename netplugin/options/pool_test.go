package options

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/ipam"
)

func TestParsePool(t *testing.T) {
	one := func(s string) ipam.Range {
		return ipam.Range{First: netip.MustParseAddr(s), Last: netip.MustParseAddr(s)}
	}
	for _, tc := range []struct {
		opts map[string]string
		want func(o *ipam.PoolOptions)
	}{
		{nil, func(*ipam.PoolOptions) {}},
		{map[string]string{"exclude": "10.1.0.9, 10.1.0.7,fd00::1"}, func(o *ipam.PoolOptions) {
			o.Exclude = []ipam.Range{one("10.1.0.7"), one("10.1.0.9"), one("fd00::1")}
		}},
		{map[string]string{"quarantine": "90"}, func(o *ipam.PoolOptions) { o.Quarantine = 90 * time.Second }},
		{map[string]string{"quarantine": "5m"}, func(o *ipam.PoolOptions) { o.Quarantine = 5 * time.Minute }},
		{map[string]string{"quarantine": "0"}, func(o *ipam.PoolOptions) { o.Quarantine = 0 }},
		{map[string]string{"quarantine": "24h"}, func(o *ipam.PoolOptions) { o.Quarantine = 24 * time.Hour }},
		{map[string]string{"sticky": "off"}, func(o *ipam.PoolOptions) { o.Sticky = false }},
		{map[string]string{"sticky": "on"}, func(*ipam.PoolOptions) {}},
		{map[string]string{"probe": "full", "conflict": "warn"}, func(o *ipam.PoolOptions) { o.Probe, o.Conflict = ipam.ProbeFull, ipam.ConflictWarn }},
		{map[string]string{"parent": "eth1.50", "dhcp": "true"}, func(o *ipam.PoolOptions) { o.Parent, o.DHCP = "eth1.50", true }},
		{map[string]string{"parent": "eth1", "dhcp": ""}, func(o *ipam.PoolOptions) { o.Parent, o.DHCP = "eth1", true }},
		{map[string]string{"dhcp": "false"}, func(*ipam.PoolOptions) {}},
	} {
		want := ipam.DefaultOptions()
		tc.want(&want)
		got, warnings, err := ParsePool(tc.opts)
		assert.NilError(t, err)
		assert.Assert(t, reflect.DeepEqual(got, want), "%v: got %+v, want %+v", tc.opts, got, want)
		assert.Equal(t, len(warnings), 0)
	}
}

func TestProbeGoesWithTheParent(t *testing.T) {
	for _, tc := range []struct {
		opts map[string]string
		want ipam.ProbeMode
	}{
		{nil, ipam.ProbeOff},
		{map[string]string{"parent": "eth1"}, ipam.ProbeFast},
		{map[string]string{"parent": "eth1", "probe": "off"}, ipam.ProbeOff},
		{map[string]string{"probe": "full"}, ipam.ProbeFull},
	} {
		o, _, err := ParsePool(tc.opts)
		assert.NilError(t, err)
		assert.Equal(t, o.ProbeMode(), tc.want)
	}
}

func TestWrongPoolOptionsAreNamed(t *testing.T) {
	for _, tc := range []struct{ key, value, want string }{
		{"exclude", "10.1.0.300", `IPAM option exclude="10.1.0.300": "10.1.0.300": want an address, a range A-B or a prefix`},
		{"exclude", "", `IPAM option exclude="": "": want an address, a range A-B or a prefix`},
		{"exclude", "10.1.0.9-10.1.0.2", "it ends before it begins, want 10.1.0.2-10.1.0.9"},
		{"quarantine", "soon", `IPAM option quarantine="soon": want a time from 0 to 24h, as 90s or 5m`},
		{"quarantine", "-1s", "want a time from 0 to 24h"},
		{"quarantine", "25h", "want a time from 0 to 24h"},
		{"quarantine", "99999999999999999999", "want a time from 0 to 24h"},
		{"sticky", "yes", `IPAM option sticky="yes": want off or on`},
		{"probe", "slow", `IPAM option probe="slow": want fast, full or off`},
		{"conflict", "ignore", `IPAM option conflict="ignore": want refuse or warn`},
		{"parent", "eth/1", `IPAM option parent="eth/1": want 1 to 15 of`},
		{"dhcp", "maybe", `IPAM option dhcp="maybe": want true or false`},
		{"dhcp", "true", "IPAM option dhcp=true: it needs the link to the LAN, as parent=eth1"},
		{"exlude", "10.1.0.1", `unknown IPAM option "exlude": did you mean exclude?`},
		{"range", "x", `unknown IPAM option "range": Berth has conflict, dhcp, exclude, parent, probe, quarantine and sticky`},
	} {
		_, _, err := ParsePool(map[string]string{tc.key: tc.value})
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	for _, key := range []string{"exclude", "quarantine", "sticky"} {
		value := map[string]string{"exclude": "10.1.0.9", "quarantine": "0", "sticky": "off"}[key]
		_, _, err := ParsePool(map[string]string{"dhcp": "true", "parent": "eth1", key: value})
		assert.Error(t, err, fmt.Sprintf("IPAM options dhcp=true and %s=%q: the DHCP server chooses the addresses, leave one of them out", key, value))
		assert.Assert(t, errdefs.IsInvalidArgument(err))
		_, _, err = ParsePool(map[string]string{"dhcp": "false", "parent": "eth1", key: value})
		assert.NilError(t, err)
	}
	_, warnings, err := ParsePool(map[string]string{"com.docker.network.x": "1"})
	assert.NilError(t, err)
	assert.DeepEqual(t, warnings, []string{`IPAM option "com.docker.network.x" is not known to Berth and has no effect`})
}

// What ParsePool accepts makes a pool or is refused by name.
func FuzzParsePool(f *testing.F) {
	for _, s := range []string{
		`{"exclude":"10.1.0.1-10.1.0.20,10.1.0.128/28,fd00::/64","quarantine":"90"}`,
		`{"sticky":"off","probe":"fast","conflict":"warn","parent":"eth1.50","dhcp":"true"}`,
		`{"exclude":"0.0.0.0/0","com.docker.network.x":"","quarantine":"1h30m"}`,
		`{"exclude":"10.1.0.0-10.1.0.255"}`, `{"x":"y"}`, `{"exclude":"::ffff:10.1.0.1"}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		var opts map[string]string
		if json.Unmarshal([]byte(body), &opts) != nil {
			return
		}
		o, _, err := ParsePool(opts)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
			return
		}
		assert.Assert(t, o.Quarantine >= 0 && o.Quarantine <= maxQuarantine && o.Conflict != "" && o.ProbeMode() != "")
		assert.Assert(t, len(o.Parent) <= maxLinkName && (!o.DHCP || o.Parent != ""))
		stored, err := json.Marshal(o)
		assert.NilError(t, err)
		var again ipam.PoolOptions
		assert.NilError(t, json.Unmarshal(stored, &again))
		assert.Assert(t, reflect.DeepEqual(again, o), "%s", stored)
	})
}
