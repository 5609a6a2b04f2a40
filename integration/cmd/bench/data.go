package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/berth-plugin/berth/integration/lab"
)

// dataSettings are those of the part "data".
type dataSettings struct {
	counts []int
	// proxy leaves Docker its userland proxy.
	proxy bool
	// stream is how long a stream of the throughput is.
	stream time.Duration
	// passes is how often the rounds with many ports begin anew.
	passes int
}

// fewPorts are started so fast that each round can have containers of its own.
const fewPorts = 100

// passesWith is how often the rounds begin anew with n ports.
func (s dataSettings) passesWith(n int) int {
	if n <= fewPorts {
		return math.MaxInt
	}
	return s.passes
}

// split deals out rounds to at most so many passes.
func split(rounds, passes int) []int {
	shares := make([]int, min(rounds, passes))
	for i := range rounds {
		shares[i%len(shares)]++
	}
	return shares
}

// dataRounds is how often traffic is sent if nothing else is wanted, over all passes.
const dataRounds = 6

// How much is sent in one measurement: enough for half a second or so.
const (
	roundTrips  = 5000
	connections = 4000
	connectors  = 4
	// warmConnections are made first and not counted.
	warmConnections = 300
)

// A source is where clients are, and what they connect to.
type source struct {
	label string
	host  *lab.Host
	addr  string
}

// measureData sends traffic to published ports. The sides are never there at the
// same time: the first packet of each connection would go through the rules of both.
func measureData(ctx context.Context, s settings) (r *report, err error) {
	opts := siteOptions{plugins: []string{"berth-net"}, lan: true}
	if !s.data.proxy {
		opts.daemon = []string{"--userland-proxy=false"}
	}
	t, err := newSite(ctx, "data", s, opts)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	outside := t.lan.Addr4(t.host).String()
	m := dataMeasurement{site: t, settings: s.data, table: t.pairs(""), sources: []source{
		{"from a neighbour", t.lan.Neighbour, outside},
		{"from the host", t.host, outside},
		{"from the host by 127.0.0.1", t.host, "127.0.0.1"},
	}}
	r = &report{Engine: t.version, Tables: []*grid{m.table}}
	for _, n := range s.data.counts {
		rounds := split(s.roundsOr(dataRounds), s.data.passesWith(n))
		for pass, rounds := range rounds {
			for _, i := range turns(pass) {
				if i == 1 && n > s.ports.dockerMost {
					continue
				}
				if err := m.pass(ctx, i, n, rounds); err != nil {
					return r, fmt.Errorf("%s of %s: %w", portsLabel(n), t.sides()[i].label, err)
				}
			}
		}
	}
	r.Tables = append(r.Tables, m.growth())
	return r, nil
}

type dataMeasurement struct {
	*site
	settings dataSettings
	table    *grid
	sources  []source
}

// loads are the kinds of traffic.
func (m dataMeasurement) loads() []struct {
	label string
	unit  unit
	args  []string
} {
	return []struct {
		label string
		unit  unit
		args  []string
	}{
		{"throughput", inBits, []string{throughputLoad, "-for", m.settings.stream.String()}},
		{"round trip", inSeconds, []string{roundTripLoad, "-n", strconv.Itoa(roundTrips)}},
		{"new connections", inRate, []string{connectionsLoad, "-n", strconv.Itoa(connections), "-workers", strconv.Itoa(connectors)}},
	}
}

// workName is a line of the table.
func workName(load, source string, n int) string {
	return fmt.Sprintf("%s, %s, %s", load, source, portsLabel(n))
}

// pass publishes n ports on one side and does the rounds.
func (m dataMeasurement) pass(ctx context.Context, column, n, rounds int) (err error) {
	d := m.sides()[column]
	name := "bench-data-" + d.key
	if _, err := m.api.NetworkCreate(ctx, name, d.network); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, m.drop(ctx, name))
		if err == nil {
			err = m.api.NetworkRemove(ctx, name)
		}
	}()
	// Rules that are looked at one by one are passed by half of them on average.
	port := strconv.Itoa(firstPort + n/2)
	host := &container.HostConfig{
		NetworkMode:  container.NetworkMode(name),
		PortBindings: publication{firstPort, n, 0}.bindings(),
		Binds:        []string{self(m.host) + ":/bench:ro"},
	}
	start, err := took(func() error {
		_, err := m.hold(ctx, name, []string{"/bench", loadCommand, serveLoad, port}, host)
		return err
	})
	if err != nil {
		return err
	}
	// The server may need a moment until it listens, and the path until it is warm.
	for _, from := range m.sources {
		if err := until(ctx, func() error {
			_, err := m.measure(ctx, from, port, []string{connectionsLoad, "-n", strconv.Itoa(warmConnections)})
			return err
		}); err != nil {
			return fmt.Errorf("%s: %w", from.label, err)
		}
	}
	for range rounds {
		for _, from := range m.sources {
			for _, l := range m.loads() {
				value, err := m.measure(ctx, from, port, l.args)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", l.label, from.label, err)
				}
				m.table.add(workName(l.label, from.label, n), l.unit, column, value)
			}
		}
	}
	progress("data: %s of %s, which started in %.1f s", portsLabel(n), d.label, start)
	return nil
}

// measure runs one client.
func (m dataMeasurement) measure(ctx context.Context, from source, port string, args []string) (float64, error) {
	argv := append([]string{self(from.host), loadCommand}, args...)
	res, err := from.host.Exec(ctx, append(argv, net.JoinHostPort(from.addr, port))...)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(res.Stdout), 64)
}

// growth compares each number of ports with the smallest, on the same side.
func (m dataMeasurement) growth() *grid {
	g := &grid{Title: "The same, over that with the fewest ports:", Columns: m.table.Columns}
	counts := m.settings.counts
	few := slices.Min(counts)
	for _, from := range m.sources {
		for _, l := range m.loads() {
			base := m.table.find(workName(l.label, from.label, few))
			for _, n := range counts {
				some := m.table.find(workName(l.label, from.label, n))
				if n == few || base == nil || some == nil {
					continue
				}
				to := g.line(fmt.Sprintf("%s, %s, %d ports over %d", l.label, from.label, n, few), asRatio)
				for i := range g.Columns {
					if r := ratio(middle(some.Values[i]), middle(base.Values[i])); r > 0 {
						to.Values[i] = []float64{r}
					}
				}
			}
		}
	}
	return g
}
