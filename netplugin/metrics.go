package netplugin

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/shared/control"
)

// What the driver measures, beside the calls that shared/pluginapi counts.
var (
	networksDesc = prometheus.NewDesc("berth_networks",
		"Networks by state: ready, broken (could not be made as it should be), creating, removing.", []string{"state"}, nil)
	endpointsDesc = prometheus.NewDesc("berth_endpoints",
		"Endpoints of all networks.", nil, nil)
	goneDesc = prometheus.NewDesc("berth_endpoints_gone",
		"Endpoints that were found without a container and are watched before they are removed.", nil, nil)
	portsDesc = prometheus.NewDesc("berth_published_ports",
		"Published ports by protocol.", []string{"proto"}, nil)
	unservedDesc = prometheus.NewDesc("berth_endpoints_ports_missing",
		"Endpoints of which some ports are not published, since another process has them.", nil, nil)
	collectedDesc = prometheus.NewDesc("berth_endpoints_collected_total",
		"Endpoints that were removed because their container was gone, since berthd started.", nil, nil)
	poolsDesc = prometheus.NewDesc("berth_pools",
		"Address pools by family.", []string{"family"}, nil)
	conflictsDesc = prometheus.NewDesc("berth_address_conflicts_total",
		"Addresses that somebody else on the LAN was found to have, since berthd started.", nil, nil)
	dhcpLeasesDesc = prometheus.NewDesc("berth_dhcp_leases",
		"Addresses from DHCP servers by state: bound, renewing, rebinding, expired.", []string{"state"}, nil)
	dhcpMessagesDesc = prometheus.NewDesc("berth_dhcp_messages_total",
		"Messages of and to DHCP servers by kind, and those that got no answer (silence), since berthd started.", []string{"kind"}, nil)
	dhcpLostDesc = prometheus.NewDesc("berth_dhcp_leases_lost_total",
		"Addresses of containers that DHCP servers took back or that ran out, since berthd started.", nil, nil)
	leasesDesc = prometheus.NewDesc("berth_leases",
		"Addresses in use by family of their pool.", []string{"family"}, nil)
)

// Metrics returns what the driver measures. It may be collected at any time.
func (d *Driver) Metrics() prometheus.Collector { return collector{d} }

type collector struct{ d *Driver }

// Describe sends all descriptions.
func (c collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		networksDesc, endpointsDesc, goneDesc, portsDesc, unservedDesc, collectedDesc, poolsDesc, leasesDesc, conflictsDesc,
		dhcpLeasesDesc, dhcpMessagesDesc, dhcpLostDesc,
	} {
		descs <- desc
	}
}

// Collect sends all values.
func (c collector) Collect(metrics chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value int, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value), labels...)
	}
	count := c.d.count()
	for s, n := range count.networks {
		gauge(networksDesc, n, s)
	}
	gauge(endpointsDesc, count.endpoints)
	gauge(goneDesc, count.gone)
	for proto, n := range count.ports {
		gauge(portsDesc, n, proto)
	}
	gauge(unservedDesc, count.unserved)
	metrics <- prometheus.MustNewConstMetric(collectedDesc, prometheus.CounterValue, float64(c.d.collected.Load()))

	metrics <- prometheus.MustNewConstMetric(conflictsDesc, prometheus.CounterValue, float64(c.d.conflicts.Load()))

	c.collectDHCP(metrics)
	pools, leases := c.d.store.leases.countAddresses()
	for family := range pools {
		gauge(poolsDesc, pools[family], family)
		gauge(leasesDesc, leases[family], family)
	}
}

func (c collector) collectDHCP(metrics chan<- prometheus.Metric) {
	states := map[control.DHCPState]int{control.DHCPBound: 0, control.DHCPRenewing: 0, control.DHCPRebinding: 0, control.DHCPExpired: 0}
	var counts dhcp.Counts
	if c.d.dhcp != nil {
		counts = c.d.dhcp.Counts()
		for _, status := range c.d.dhcp.Status() {
			states[wireState(status.State)]++
		}
	}
	for state, n := range states {
		metrics <- prometheus.MustNewConstMetric(dhcpLeasesDesc, prometheus.GaugeValue, float64(n), string(state))
	}
	for kind, n := range map[string]uint64{
		"offer": counts.Offers, "ack": counts.Acks, "nak": counts.Naks, "silence": counts.Silences,
		"release": counts.Released, "decline": counts.Declined,
	} {
		metrics <- prometheus.MustNewConstMetric(dhcpMessagesDesc, prometheus.CounterValue, float64(n), kind)
	}
	metrics <- prometheus.MustNewConstMetric(dhcpLostDesc, prometheus.CounterValue, float64(counts.Lost))
}

// counts are the sizes of things. Every label has a value, so that a graph begins
// with the first scrape and not with the first trouble.
type counts struct {
	networks                  map[string]int
	ports                     map[string]int
	endpoints, gone, unserved int
}

func (d *Driver) count() counts {
	c := counts{
		networks: map[string]int{string(phaseCreating): 0, string(phaseReady): 0, string(phaseRemoving): 0, "broken": 0},
		ports:    map[string]int{"tcp": 0, "udp": 0, "sctp": 0},
	}
	d.mu.Lock()
	broken := make(map[string]bool, len(d.broken))
	for id := range d.broken {
		broken[id] = true
	}
	c.gone, c.unserved = len(d.dead), len(d.unserved)
	d.mu.Unlock()

	d.store.mu.Lock()
	defer d.store.mu.Unlock()
	for id, n := range d.store.networks {
		if n.rec.Phase == phaseReady && broken[id] {
			c.networks["broken"]++
		} else {
			c.networks[string(n.rec.Phase)]++
		}
		c.endpoints += len(n.endpoints)
		for _, ep := range n.endpoints {
			for _, p := range ep.Spec.Ports {
				c.ports[p.Proto.String()] += int(p.Count)
			}
		}
	}
	return c
}

// countAddresses counts pools and leases by family, "ipv4" and "ipv6".
func (s *leaseStore) countAddresses() (pools, leases map[string]int) {
	pools = map[string]int{"ipv4": 0, "ipv6": 0}
	leases = map[string]int{"ipv4": 0, "ipv6": 0}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pool := range s.alloc.Pools() {
		family := "ipv6"
		if pool.Prefix.Addr().Is4() {
			family = "ipv4"
		}
		pools[family]++
		if stats, ok := s.alloc.Stats(pool.ID); ok {
			leases[family] += int(stats.Used)
		}
	}
	return pools, leases
}
