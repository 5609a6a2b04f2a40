package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/testkit"
)

const bridgeName = "bth1"

// patient is a host with one network of Berth.
func patient(t *testing.T) (*testkit.Netns, Input) {
	t.Helper()
	ns := testkit.NewNetns(t)
	ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	h, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	m, err := firewall.New(firewall.Options{Links: h})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, m.Close()) })
	ns.Run("ip", "link", "add", bridgeName, "type", "bridge")
	n := firewall.Network{Bridge: bridgeName, Subnets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}, Masquerade: true}
	assert.NilError(t, m.Sync(t.Context(), []firewall.Network{n}, nil))
	return ns, Input{Links: h, Firewall: m, StateDir: t.TempDir(), Bridges: []string{bridgeName}, IPv6: true}
}

// worst is the worst finding of a check.
func worst(found []control.Finding, id string) control.Finding {
	rank := map[control.Status]int{control.StatusOK: 1, control.StatusWarn: 2, control.StatusFail: 3}
	var out control.Finding
	for _, f := range found {
		if f.ID == id && rank[f.Status] > rank[out.Status] {
			out = f
		}
	}
	return out
}

func TestHealthyHost(t *testing.T) {
	_, in := patient(t)
	found := Run(t.Context(), in)
	for _, c := range checks() {
		f := worst(found, c.id)
		assert.Equal(t, f.Status, control.StatusOK, "%s: %+v", c.id, f)
		assert.Equal(t, f.Cure, "", "%s: nothing is to be cured", c.id)
		assert.Assert(t, !strings.HasSuffix(f.Summary, "."), f.Summary)
	}
}

func TestNothingIsChanged(t *testing.T) {
	ns, in := patient(t)
	state := func() string { return ns.Run("nft", "list", "ruleset") + ns.Run("ip", "link") }
	before := state()
	Run(t.Context(), in)
	assert.Equal(t, state(), before)
}

func TestFindings(t *testing.T) {
	for _, c := range []struct {
		name, id string
		status   control.Status
		hurt     func(*testing.T, *testkit.Netns, *Input)
		// summary and cure are parts of the finding's.
		summary, cure string
	}{
		{"table is gone", "firewall-rules", control.StatusWarn, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("nft", "delete", "table", "ip", "berth")
		}, "table ip berth is missing", "nft monitor"},
		{"rule is gone", "iptables", control.StatusWarn, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
		}, "policy is DROP", "iptables-nft -S FORWARD"},
		{"the administrator drops everything", "iptables", control.StatusFail, func(t *testing.T, ns *testkit.Netns, in *Input) {
			ns.Run("iptables-nft", "-N", "DOCKER-USER")
			ns.Run("iptables-nft", "-A", "DOCKER-USER", "-j", "DROP")
			ns.Run("iptables-nft", "-I", "FORWARD", "-j", "DOCKER-USER")
			sync(t, in)
		}, "-A DOCKER-USER -j DROP", "iptables-nft -D DOCKER-USER -j DROP"},
		{"the program is missing", "iptables", control.StatusFail, func(t *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("ip6tables-legacy", "-P", "FORWARD", "DROP")
			ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
			t.Setenv("PATH", t.TempDir())
		}, "cannot be read: ip", "apt-get install iptables"},
		{"Docker in both variants", "iptables", control.StatusWarn, func(t *testing.T, ns *testkit.Netns, in *Input) {
			ns.Run("iptables-nft", "-N", "DOCKER")
			ns.Run("iptables-nft", "-A", "FORWARD", "-j", "DOCKER")
			ns.Run("iptables-legacy", "-N", "DOCKER")
			sync(t, in)
		}, "iptables-nft and in iptables-legacy", "iptables-legacy -F"},
		{"firewalld has its table for itself", "other-firewalls", control.StatusFail, func(t *testing.T, ns *testkit.Netns, _ *Input) {
			owned(t, ns, "firewalld")
		}, "inet firewalld forward", "firewall-cmd --permanent --zone=trusted --add-interface=" + bridgeName},
		{"somebody has a table for himself", "other-firewalls", control.StatusFail, func(t *testing.T, ns *testkit.Netns, _ *Input) {
			owned(t, ns, "guard")
		}, "inet guard forward", "nft list table inet guard"},
		{"a chain that comes too early", "other-firewalls", control.StatusFail, func(t *testing.T, ns *testkit.Netns, in *Input) {
			ns.Run("nft", "table inet guard { chain forward { type filter hook forward priority -100; policy drop; }; }")
			sync(t, in)
		}, "inet guard forward", "nft list table inet guard"},
		{"forwarding is off", "forwarding", control.StatusFail, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0")
		}, "net/ipv4/ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"},
		{"IPv6 is off", "ipv6", control.StatusWarn, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
		}, "turned off", "sysctl -w net.ipv6.conf.all.disable_ipv6=0"},
		{"two ways out", "reverse-path", control.StatusWarn, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			for i, name := range []string{"up1", "up2"} {
				ns.Run("ip", "link", "add", name, "type", "veth", "peer", "name", name+"p")
				ns.Run("ip", "addr", "add", fmt.Sprintf("192.0.%d.1/24", 2+i), "dev", name)
				ns.Run("ip", "link", "set", name, "up")
				ns.Run("ip", "link", "set", name+"p", "up")
				ns.Run("ip", "route", "add", "default", "via", fmt.Sprintf("192.0.%d.2", 2+i), "metric", fmt.Sprint(100+i))
			}
			ns.Run("sysctl", "-qw", "net.ipv4.conf.up2.rp_filter=1")
		}, `"up2" is strict`, "sysctl -w net.ipv4.conf.up2.rp_filter=2"},
		{"leftovers", "leftovers", control.StatusWarn, func(_ *testing.T, _ *testkit.Netns, in *Input) {
			in.Leftovers = []string{"bthx", "bthy"}
		}, "bthx, bthy", "ip link delete bthy"},
		{"no state", "state-space", control.StatusWarn, func(t *testing.T, _ *testkit.Netns, in *Input) {
			in.StateDir = filepath.Join(t.TempDir(), "none")
		}, "no such file", ""},
		{"the lock is not the host's", "xtables-lock", control.StatusOK, func(_ *testing.T, ns *testkit.Netns, _ *Input) {
			ns.Run("iptables-legacy", "-P", "FORWARD", "DROP")
		}, "iptables-legacy", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, in := patient(t)
			c.hurt(t, ns, &in)
			f := worst(Run(t.Context(), in), c.id)
			assert.Equal(t, f.Status, c.status, "%+v", f)
			assert.Assert(t, strings.Contains(f.Summary, c.summary), "%+v", f)
			assert.Assert(t, strings.Contains(f.Cure, c.cure), "%+v", f)
		})
	}
}

// sync lets Berth take up what has come.
func sync(t *testing.T, in *Input) {
	t.Helper()
	_, err := in.Firewall.Ensure(t.Context(), firewall.Network{Bridge: bridgeName, Subnets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}, Masquerade: true})
	assert.NilError(t, err)
}

// owned makes a table that drops and belongs to a process.
func owned(t *testing.T, ns *testkit.Netns, name string) {
	t.Helper()
	script := fmt.Sprintf("add table inet %s { flags owner; }\nadd chain inet %[1]s forward { type filter hook forward priority 10; policy drop; }\n", name)
	ctx, cancel := context.WithCancel(context.Background())
	owner := exec.CommandContext(ctx, "nft", "-i")
	t.Cleanup(func() { cancel(); _ = owner.Wait() })
	ns.Do(func() {
		in, err := owner.StdinPipe()
		assert.NilError(t, err)
		assert.NilError(t, owner.Start())
		_, err = in.Write([]byte(script))
		assert.NilError(t, err)
	})
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := ns.Try("nft", "list", "chain", "inet", name, "forward"); err == nil {
			return
		}
		assert.Assert(t, time.Now().Before(deadline), "the table was not made")
	}
}

func TestFirewalldThatBerthHasOpened(t *testing.T) {
	ns, in := patient(t)
	ns.Run("nft", "table inet firewalld { chain filter_FORWARD { type filter hook forward priority 10; policy accept; reject with icmpx admin-prohibited; }; }")
	f := worst(Run(t.Context(), in), "other-firewalls")
	assert.Equal(t, f.Status, control.StatusWarn, "%+v", f)
	sync(t, &in)
	f = worst(Run(t.Context(), in), "other-firewalls")
	assert.Equal(t, f.Status, control.StatusOK, "%+v", f)
	assert.Assert(t, strings.Contains(f.Detail, "--zone=trusted --add-interface="+bridgeName), "%+v", f)
}

// One check that fails, panics or hangs does not hide the others.
func TestChecksAreIndependent(t *testing.T) {
	_, in := patient(t)
	for _, c := range []check{
		{"broken", func(context.Context, Input) ([]control.Finding, error) { return nil, errors.New("cannot look") }},
		{"broken", func(context.Context, Input) ([]control.Finding, error) { panic("cannot look") }},
	} {
		found := c.do(t.Context(), in)
		assert.Equal(t, len(found), 1)
		assert.Equal(t, found[0].ID, "broken")
		assert.Equal(t, found[0].Status, control.StatusWarn)
		assert.Assert(t, strings.Contains(found[0].Summary, "cannot look"))
	}
	in.Firewall, in.StateDir = nil, ""
	found := Run(t.Context(), in)
	assert.Equal(t, worst(found, "kernel").Status, control.StatusOK)
	assert.Equal(t, worst(found, "iptables").Status, control.Status(""))
}

// What the kernel does not have must be told from what wants parameters.
func TestUnknownFeaturesAreFound(t *testing.T) {
	found, err := try(t.Context(), []feature{
		{what: "link", fatal: true, try: func() error { return tryLink("nonesuch") }},
		{what: "qdisc", try: func() error { return tryQdisc("nonesuch") }},
		{what: "filter", try: func() error { return tryFilter("nonesuch") }},
		{what: "action", try: func() error { return tryAction("nonesuch") }},
	})
	assert.NilError(t, err)
	assert.Equal(t, len(found), 4, "%+v", found)
	assert.Equal(t, found[0].Status, control.StatusFail)
	assert.Equal(t, found[1].Status, control.StatusWarn)
}

func TestCapabilities(t *testing.T) {
	for _, c := range []struct {
		mask uint64
		want []control.Status
	}{
		{1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW, []control.Status{control.StatusOK}},
		{1 << unix.CAP_NET_RAW, []control.Status{control.StatusFail}},
		{1 << unix.CAP_NET_ADMIN, []control.Status{control.StatusWarn}},
	} {
		found, err := capabilityFindings(fmt.Appendf(nil, "CapPrm:\t0\nCapEff:\t%016x\nCapBnd:\t0\n", c.mask))
		assert.NilError(t, err)
		var got []control.Status
		for _, f := range found {
			got = append(got, f.Status)
		}
		assert.DeepEqual(t, got, c.want)
	}
}

func TestReleases(t *testing.T) {
	for release, want := range map[string]control.Status{
		"5.6.0": control.StatusOK, "6.1.0-18-amd64": control.StatusOK, "5.10.1+": control.StatusOK,
		"5.5.19": control.StatusFail, "4.19.0": control.StatusFail,
	} {
		found, err := releaseFinding(release)
		assert.NilError(t, err)
		assert.Equal(t, found[0].Status, want, release)
	}
	_, err := releaseFinding("unknown")
	assert.ErrorContains(t, err, `kernel release "unknown"`)
}

func TestLimits(t *testing.T) {
	assert.Equal(t, filesFinding(799, 1000, 0).Status, control.StatusOK)
	assert.Equal(t, filesFinding(800, 1000, 0).Status, control.StatusWarn)
	assert.Equal(t, spaceFinding("/", 3, 0, 0).Status, control.StatusFail)
	assert.Equal(t, spaceFinding("/", 63, 0, 0).Status, control.StatusWarn)
	assert.Equal(t, spaceFinding("/", 64, 0, 0).Status, control.StatusOK)
	assert.Equal(t, spaceFinding("/", 64, 100, 3).Status, control.StatusFail)
}

func TestManyPorts(t *testing.T) {
	ns, in := patient(t)
	for i := range manyPorts + 1 {
		// The kernel's own batch would be shorter; a pair is two ports.
		if i%2 == 0 {
			ns.Run("ip", "link", "add", fmt.Sprintf("p%d", i), "master", bridgeName, "type", "veth", "peer", "name", fmt.Sprintf("p%d", i+1))
			ns.Run("ip", "link", "set", fmt.Sprintf("p%d", i+1), "master", bridgeName)
		}
	}
	found, err := backlogOf(in, 1000, true)
	assert.NilError(t, err)
	assert.Equal(t, found[0].Status, control.StatusWarn, "%+v", found)
	assert.Assert(t, strings.Contains(found[0].Cure, "net.core.netdev_max_backlog"))
	found, err = backlogOf(in, 100000, true)
	assert.NilError(t, err)
	assert.Equal(t, found[0].Status, control.StatusOK, "%+v", found)
}
