package lan_test

import (
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func handle(t testing.TB, ns *testkit.Netns) *link.Handle {
	t.Helper()
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	return links
}

func mode(t testing.TB, ns *testkit.Netns) *lan.Mode { return lan.New(handle(t, ns)) }

func TestContractOfMacvlan(t *testing.T) {
	s := modetest.LANSuite(options.ModeMacvlan)
	s.New = func(t testing.TB, ns *testkit.Netns) modetest.Mode { return mode(t, ns) }
	s.Variants = modetest.LANVariants(options.ModeMacvlan)
	modetest.Run(t, s)
}
