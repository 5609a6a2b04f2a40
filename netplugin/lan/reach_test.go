package lan_test

import (
	"testing"

	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func suite(kind options.Mode) modetest.Suite {
	s := modetest.LANSuite(kind)
	s.New = func(t testing.TB, ns *testkit.Netns) modetest.Mode { return mode(t, ns) }
	return s
}

func TestWhoReachesWhomOnMacvlan(t *testing.T) {
	network := func(change func(*options.LAN)) options.Network {
		n := modetest.LANNetwork(options.ModeMacvlan, 1)
		change(&n.LAN)
		return n
	}
	access := network(func(l *options.LAN) { l.HostAccess = true })
	own := network(func(l *options.LAN) { l.HostAccess = true })
	for _, s := range own.Subnets {
		own.LAN.HostAddrs = append(own.LAN.HostAddrs, modetest.HostAddr(s).Next())
	}
	filter := func(all, parent string) []string {
		return []string{"net.ipv4.conf.all.rp_filter=" + all, "net.ipv4.conf." + modetest.Parent + ".rp_filter=" + parent}
	}
	for name, r := range map[string]modetest.Reach{
		"bridge":  {Network: network(func(*options.LAN) {}), Siblings: true, Neighbour: true},
		"private": {Network: network(func(l *options.LAN) { l.Type = options.MacvlanPrivate }), Neighbour: true},
		// The LAN is no switch that sends frames back.
		"vepa":                        {Network: network(func(l *options.LAN) { l.Type = options.MacvlanVEPA }), Neighbour: true},
		"host access":                 {Network: access, Siblings: true, Neighbour: true, Host: true},
		"host access, strict":         {Network: access, Siblings: true, Neighbour: true, Host: true, Sysctls: filter("1", "1")},
		"host access, loose":          {Network: access, Siblings: true, Neighbour: true, Host: true, Sysctls: filter("2", "2")},
		"host access, no forwarding":  {Network: access, Siblings: true, Neighbour: true, Host: true, Sysctls: []string{"net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"}},
		"host access, own addresses":  {Network: own, Siblings: true, Neighbour: true, Host: true},
		"host access, careful of ARP": {Network: own, Siblings: true, Neighbour: true, Host: true, Sysctls: []string{"net.ipv4.conf.all.arp_ignore=1", "net.ipv4.conf.all.arp_announce=2"}},
	} {
		t.Run(name, func(t *testing.T) { modetest.RunReach(t, suite(options.ModeMacvlan), r) })
	}
}
