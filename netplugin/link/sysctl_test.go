package link_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

func comparePrefix() cmp.Option {
	return cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
}

func TestIPv6OfTheBridgeFollowsTheNetwork(t *testing.T) {
	h := open(t, testkit.NewNetns(t))
	for _, ipv6 := range []bool{false, true, false} {
		b := bridge()
		b.IPv6 = ipv6
		ensureBridge(t, h, b)
		want := map[string]string{"disable_ipv6": "1"}
		if ipv6 {
			want = map[string]string{"disable_ipv6": "0", "accept_ra": "0", "accept_dad": "0"}
		}
		redirects, err := h.Sysctl("ipv4/conf/bth1/send_redirects")
		assert.NilError(t, err)
		assert.Equal(t, redirects, "0")
		for key, value := range want {
			got, err := h.Sysctl("ipv6/conf/bth1/" + key)
			assert.NilError(t, err)
			assert.Equal(t, got, value, "%s with IPv6 %v", key, ipv6)
		}
	}
}

func TestRouteLocalnet(t *testing.T) {
	h := open(t, testkit.NewNetns(t))
	ensureBridge(t, h, bridge())
	for _, on := range []bool{true, true, false, false} {
		assert.NilError(t, h.RouteLocalnet("bth1", on))
		got, err := h.Sysctl("ipv4/conf/bth1/route_localnet")
		assert.NilError(t, err)
		assert.Equal(t, got == "1", on)
	}
	assert.NilError(t, h.RouteLocalnet("gone", false))
	assert.Assert(t, errors.Is(h.RouteLocalnet("gone", true), fs.ErrNotExist))
}

func TestSysctlIsWrittenInTheHandlesNamespace(t *testing.T) {
	before, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	assert.NilError(t, err)
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	assert.NilError(t, h.SetSysctl("ipv4/ip_forward", "1"))
	assert.Equal(t, ns.Run("cat", "/proc/sys/net/ipv4/ip_forward"), "1")
	after, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	assert.NilError(t, err)
	assert.Equal(t, string(after), string(before))
}

// sysctlRoot is a view of /proc/sys/net in which ip_forward is what path names.
func sysctlRoot(t *testing.T, path string) string {
	t.Helper()
	root := t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(root, "ipv4"), 0o755))
	assert.NilError(t, os.Symlink(path, filepath.Join(root, "ipv4/ip_forward")))
	return root
}

func TestSysctlThatCannotBeWritten(t *testing.T) {
	ns := testkit.NewNetns(t)
	withRoot := func(root string) *link.Handle {
		h, err := link.Open(link.Options{NetNS: ns.File(), SysctlRoot: root})
		assert.NilError(t, err)
		t.Cleanup(h.Close)
		return h
	}
	// A count of connections: 0 here, and nobody may write it.
	h := withRoot(sysctlRoot(t, "/proc/sys/net/netfilter/nf_conntrack_count"))
	for _, err := range []error{h.SetSysctl("ipv4/ip_forward", "1"), h.CheckSysctl("ipv4/ip_forward", "1")} {
		assert.ErrorContains(t, err, "sysctl -w net.ipv4.ip_forward=1")
	}
	err := h.SetSysctl("ipv4/no_such_setting", "1")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)

	// What is right already is not written.
	file := filepath.Join(t.TempDir(), "value")
	assert.NilError(t, os.WriteFile(file, []byte("1\n"), 0o644))
	h = withRoot(sysctlRoot(t, file))
	assert.NilError(t, h.SetSysctl("ipv4/ip_forward", "1"))
	assert.NilError(t, h.CheckSysctl("ipv4/ip_forward", "1"))
	content, err := os.ReadFile(file)
	assert.NilError(t, err)
	assert.Equal(t, string(content), "1\n")
}

func TestEventsOfLinks(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan link.Event, 1000)
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		assert.Check(t, errors.Is(h.Watch(ctx, func(e link.Event) { events <- e }), context.Canceled))
	}()
	next := func(match func(link.Event) bool) {
		t.Helper()
		timeout := time.After(5 * time.Second)
		for {
			select {
			case e := <-events:
				if match(e) {
					return
				}
			case <-timeout:
				t.Fatal("the event did not come")
			}
		}
	}
	next(func(e link.Event) bool { return e.Lost })
	ensureBridge(t, h, bridge())
	next(func(e link.Event) bool { return e.Link.Owner == link.OfNetwork(networkID) && e.Link.Up && !e.Removed })
	ns.Run("ip", "addr", "add", "10.1.0.1/24", "dev", "bth1")
	ns.Run("ip", "addr", "flush", "dev", "bth1")
	next(func(e link.Event) bool { return e.Link.Owner == link.OfNetwork(networkID) && e.AddressLost })
	ns.Run("ip", "link", "set", "bth1", "down")
	next(func(e link.Event) bool { return e.Link.Owner == link.OfNetwork(networkID) && !e.Link.Up })
	ns.Run("ip", "link", "del", "bth1")
	next(func(e link.Event) bool { return e.Link.Name == "bth1" && e.Removed })
	cancel()
	wg.Wait()
}

// Dumps are interrupted all the time while links change; callers must not see it.
func TestListsAreWholeWhileLinksChange(t *testing.T) {
	ns := testkit.NewNetns(t)
	h, churn := open(t, ns), open(t, ns)
	ensureBridge(t, h, bridge())
	for i := range 60 {
		ns.Run("ip", "link", "add", fmt.Sprintf("other%d", i), "type", "bridge")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for ctx.Err() == nil {
			_, err := churn.EnsureVeth(veth())
			assert.Check(t, err)
			assert.Check(t, churn.Delete("bv1", link.OfEndpoint(endpointID)))
		}
	}()
	for range 300 {
		links, err := h.List()
		assert.Check(t, err)
		found := false
		for _, l := range links {
			found = found || l.Name == "bth1"
		}
		assert.Check(t, found)
	}
	cancel()
	wg.Wait()
}
