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
	"github.com/docker/go-connections/nat"
)

// portSettings are those of the part "ports".
type portSettings struct {
	counts []int
	// many is a number of ports for Berth alone.
	many int
	// dockerMost is the most ports that Docker is made to publish.
	dockerMost int
	// budget bounds what Docker's rounds with one number of ports take together.
	budget time.Duration
}

const (
	maxPorts = 40000
	// firstPort is the first host port that is published.
	firstPort = 20000
	// shift is what lies between host ports and container ports of a shifted range.
	shift = 10000
	// portRounds is how often containers are started if nothing else is wanted.
	portRounds = 5
)

// A publication is a range of ports, -p first-last:first+shift-last+shift.
type publication struct {
	first, n, shift int
}

// bindings are the range as the engine's API takes it: port by port, which is what
// the docker command makes of a range, too.
func (p publication) bindings() nat.PortMap {
	m := make(nat.PortMap, p.n)
	for i := range p.n {
		inside := nat.Port(strconv.Itoa(p.first+p.shift+i) + "/tcp")
		m[inside] = []nat.PortBinding{{HostPort: strconv.Itoa(p.first + i)}}
	}
	return m
}

// measurePorts starts and stops containers that publish ports.
func measurePorts(ctx context.Context, s settings) (r *report, err error) {
	t, err := newSite(ctx, "ports", s, siteOptions{plugins: []string{"berth-net"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	for _, d := range t.sides() {
		if _, err := t.api.NetworkCreate(ctx, "bench-"+d.key, d.network); err != nil {
			return nil, err
		}
	}
	m := portMeasurement{site: t, table: t.pairs(""), portSettings: s.ports}
	r = &report{Engine: t.version, Tables: []*grid{m.table}}
	for _, n := range s.ports.counts {
		if err := m.pair(ctx, publication{firstPort, n, 0}, portsLabel(n), s.roundsOr(portRounds)); err != nil {
			return r, err
		}
	}
	m.overNone(s.ports.counts)
	if most := slices.Max(s.ports.counts); most > 1 && !s.same {
		if err := m.alone(ctx, publication{firstPort, most, shift}, portsLabel(most)+", shifted", s.roundsOr(portRounds)); err != nil {
			return r, err
		}
	}
	if s.ports.many > 0 && !s.same {
		p := publication{firstPort, s.ports.many, 0}
		err := m.alone(ctx, p, portsLabel(p.n), 1)
		if few := fitting(s.files); err != nil && few < p.n && strings.Contains(err.Error(), "too many open files") {
			r.Notes = append(r.Notes, fmt.Sprintf("%d ports instead of %d: a process may open only %d files here. Their memory shows as too little after the attempt with more; -many %[1]d tells it.", few, p.n, s.files))
			p.n = few
			err = m.alone(ctx, p, portsLabel(p.n), 1)
		}
		if err != nil {
			return r, err
		}
		if err := m.answers(ctx, p); err != nil {
			return r, err
		}
	}
	return r, nil
}

// fitting is how many ports can be published for certain when every process may
// have so many files open: each port takes one for IPv4 and one for IPv6.
func fitting(files int) int {
	const others = 500
	return max(0, files-others) / 2
}

// portsLabel says how many ports.
func portsLabel(n int) string {
	if n == 1 {
		return "1 port"
	}
	return strconv.Itoa(n) + " ports"
}

// portMeasurement fills the table of ports.
type portMeasurement struct {
	*site
	table *grid
	portSettings
}

// pair measures both sides in turns. Docker stops when its time is up, not before
// the first round; with too many ports it does not begin.
func (m portMeasurement) pair(ctx context.Context, p publication, label string, rounds int) error {
	var spent time.Duration
	for round := range rounds {
		for _, i := range turns(round) {
			if i == 1 && (spent > m.budget || p.n > m.dockerMost) {
				continue
			}
			begin := time.Now()
			if err := m.one(ctx, i, p, label); err != nil {
				return err
			}
			if i == 1 {
				spent += time.Since(begin)
			}
		}
	}
	progress("ports: %s, Docker took %s in all", label, spent.Round(time.Second))
	return nil
}

// alone measures the first side only.
func (m portMeasurement) alone(ctx context.Context, p publication, label string, rounds int) error {
	for range rounds {
		if err := m.one(ctx, 0, p, label); err != nil {
			return err
		}
	}
	progress("ports: %s", label)
	return nil
}

// one starts a container, looks at what that added, and stops it.
func (m portMeasurement) one(ctx context.Context, column int, p publication, label string) (err error) {
	d := m.sides()[column]
	name := "bench-ports-" + d.key
	host := &container.HostConfig{NetworkMode: container.NetworkMode("bench-" + d.key), PortBindings: p.bindings()}
	defer func() {
		err = errors.Join(err, m.drop(ctx, name))
		if err != nil {
			err = fmt.Errorf("%s with %s: %w", d.label, label, err)
		}
	}()
	before, err := m.settled(ctx)
	if err != nil {
		return err
	}
	start, err := took(func() error {
		_, err := m.hold(ctx, name, nil, host)
		return err
	})
	if err != nil {
		return err
	}
	after, err := m.footprint(ctx)
	if err != nil {
		return err
	}
	stop, err := took(func() error { return m.api.ContainerStop(ctx, name, container.StopOptions{}) })
	if err != nil {
		return err
	}
	m.table.add("start, "+label, inSeconds, column, start)
	m.table.add("stop, "+label, inSeconds, column, stop)
	m.table.add("processes added, "+label, inPieces, column, float64(after.Processes-before.Processes))
	m.table.add("memory added (PSS), "+label, inBytes, column, float64(after.PSS-before.PSS))
	m.table.add("kernel memory added, "+label, inBytes, column, float64(after.Kernel-before.Kernel))
	m.table.add("descriptors added, "+label, inPieces, column, float64(after.Files-before.Files))
	return nil
}

// overNone adds how much longer a start with ports takes than one with none.
func (m portMeasurement) overNone(counts []int) {
	none := m.table.find("start, " + portsLabel(0))
	if none == nil {
		return
	}
	for _, n := range counts {
		some := m.table.find("start, " + portsLabel(n))
		if n == 0 || some == nil {
			continue
		}
		for i := range m.table.Columns {
			by := middle(none.Values[i])
			if math.IsNaN(by) {
				continue
			}
			l := m.table.line("start, "+portsLabel(n)+" more than none", inSeconds)
			l.Values[i] = less(some.Values[i], by)
		}
	}
}

// answers checks that the ports of a large range work, down to the last.
func (m portMeasurement) answers(ctx context.Context, p publication) (err error) {
	const name = "bench-answers"
	d := m.sides()[0]
	last := p.first + p.n - 1
	host := &container.HostConfig{
		NetworkMode:  container.NetworkMode("bench-" + d.key),
		PortBindings: p.bindings(),
		Binds:        []string{self(m.host) + ":/bench:ro"},
	}
	defer func() { err = errors.Join(err, m.drop(ctx, name)) }()
	if _, err := m.hold(ctx, name, []string{"/bench", loadCommand, serveLoad, strconv.Itoa(p.first + p.shift), strconv.Itoa(last + p.shift)}, host); err != nil {
		return err
	}
	for _, port := range []int{p.first, last} {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if err := until(ctx, func() error {
			_, err := m.host.Exec(ctx, self(m.host), loadCommand, roundTripLoad, "-n", "1", addr)
			return err
		}); err != nil {
			return fmt.Errorf("port %d of %d: %w", port-p.first+1, p.n, err)
		}
	}
	progress("ports: the first and the last of %d ports answer", p.n)
	return nil
}
