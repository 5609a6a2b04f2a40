package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
)

const (
	emptyName   = "empty"
	emptySocket = "/run/docker/plugins/" + emptyName + ".sock"
)

// measureStart starts containers on networks of several drivers, makes networks,
// many of them, and starts many containers at once.
func measureStart(ctx context.Context, s settings) (r *report, err error) {
	t, err := newSite(ctx, "start", s, siteOptions{plugins: []string{"berth-net"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	t.background(ctx, emptyCommand, emptySocket)
	if err := until(ctx, func() error {
		_, err := t.host.Exec(ctx, "test", "-S", emptySocket)
		return err
	}); err != nil {
		return nil, fmt.Errorf("the empty plugin made no socket: %w", err)
	}
	starts, err := t.measureRuns(ctx, s.roundsOr(usualRounds))
	if err != nil {
		return nil, err
	}
	progress("start: containers one by one")
	creates, err := t.measureNetworks(ctx, s.roundsOr(usualRounds))
	if err != nil {
		return nil, err
	}
	progress("start: networks one by one")
	r = &report{Engine: t.version, Tables: []*grid{starts.grid, creates}, texts: map[*grid]string{starts.grid: starts.markdown()}}
	if s.networks > 0 {
		many, err := t.measureManyNetworks(ctx, s.networks)
		if err != nil {
			return r, err
		}
		r.Tables = append(r.Tables, many)
	}
	if s.bulk.containers > 0 {
		bulk, err := t.measureBulk(ctx, s.bulk)
		if err != nil {
			return r, err
		}
		r.Tables = append(r.Tables, bulk)
	}
	return r, nil
}

// contender is one kind of network that a container is started on.
type contender struct {
	label string
	// options are nil for a network that is always there, of the name.
	name    string
	options *network.CreateOptions
}

// contenders are the two sides, and what there is to compare both with.
func (t *site) contenders() []contender {
	sides := t.sides()
	return []contender{
		{label: sides[0].label, name: "bench-" + sides[0].key, options: &sides[0].network},
		{label: sides[1].label, name: "bench-" + sides[1].key, options: &sides[1].network},
		{label: "Empty driver, Docker's addresses", name: "bench-empty", options: &network.CreateOptions{Driver: emptyName}},
		{label: "Empty driver, its own addresses", name: "bench-empty-ipam",
			options: &network.CreateOptions{Driver: emptyName, IPAM: &network.IPAM{Driver: emptyName}}},
		{label: "None", name: "none"},
	}
}

// columns of the contenders that others are compared with.
const (
	dockerColumn = 1
	floorColumn  = 3
)

// measureRuns runs a container on each kind of network in turns. The networks stay.
func (t *site) measureRuns(ctx context.Context, rounds int) (runGrid, error) {
	list := t.contenders()
	g := runGrid{&grid{Title: "`run --rm true`, by network:"}}
	for _, c := range list {
		g.Columns = append(g.Columns, c.label)
		if c.options == nil {
			continue
		}
		if _, err := t.api.NetworkCreate(ctx, c.name, *c.options); err != nil {
			return g, fmt.Errorf("network of %s: %w", c.label, err)
		}
	}
	for round := -warmRounds; round < rounds; round++ {
		for i := range list {
			// Each begins as often as the others.
			i = (i + round + warmRounds) % len(list)
			timed := g.timer(round, i)
			if err := timed(netRun, func() error {
				return t.runTrue(ctx, &container.HostConfig{NetworkMode: container.NetworkMode(list[i].name)})
			}); err != nil {
				return g, err
			}
		}
	}
	return g, nil
}

// runGrid is a grid with one line, which is printed as a column.
type runGrid struct{ *grid }

// markdown has a line for each network, compared with the floor and with Docker.
// The first comparison is the median of the rounds' differences: a few milliseconds
// are less than what the machine does to the times from round to round.
func (g runGrid) markdown() string {
	var b strings.Builder
	b.WriteString("| Network | Time | More than the empty driver with its own addresses | Of Docker's bridge |\n|---|---:|---:|---:|\n")
	for _, l := range g.Lines {
		docker := middle(l.Values[dockerColumn])
		for i, label := range g.Columns {
			v := middle(l.Values[i])
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", label, inSeconds.format(v), inSeconds.format(middle(paired(l.Values[i], l.Values[floorColumn]))), asRatio.format(ratio(v, docker)))
		}
	}
	return b.String()
}

// withEmpty is a table for the two sides and the empty driver with its own
// addresses, and the contenders for its columns.
func (t *site) withEmpty(title string) (*grid, []contender) {
	all := t.contenders()
	list := []contender{all[0], all[1], all[floorColumn]}
	g := t.pairs(title)
	g.Columns = append(g.Columns, all[floorColumn].label)
	return g, list
}

// measureNetworks makes and removes networks in turns, beside those of measureRuns:
// with the first network and the last one a driver may have more to do.
func (t *site) measureNetworks(ctx context.Context, rounds int) (*grid, error) {
	g, list := t.withEmpty("One more network:")
	for round := -warmRounds; round < rounds; round++ {
		for i := range list {
			i = (i + round + warmRounds) % len(list)
			name := list[i].name + "-more"
			timed := g.timer(round, i)
			if err := timed(netCreate, func() error {
				_, err := t.api.NetworkCreate(ctx, name, *list[i].options)
				return err
			}); err != nil {
				return nil, err
			}
			if err := timed(netRemove, func() error { return t.api.NetworkRemove(ctx, name) }); err != nil {
				return nil, err
			}
		}
	}
	return g, nil
}
