package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"golang.org/x/sync/errgroup"
)

// measureMacvlan starts containers on macvlan networks of Berth and of Docker. Each has
// a parent of its own: engines before 28 do not share one.
func measureMacvlan(ctx context.Context, s settings) (r *report, err error) {
	t, err := newSite(ctx, "macvlan", s, siteOptions{plugins: []string{"berth-net"}, lan: true, nics: 2})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	list := t.macvlans()
	starts, err := t.measureMacvlanRuns(ctx, list, s.roundsOr(usualRounds))
	if err != nil {
		return nil, err
	}
	r = &report{Engine: t.version, Tables: []*grid{starts}}
	progress("macvlan: containers one by one")
	if s.together > 0 {
		together, err := t.measureTogether(ctx, list, s.together, s.bulk.rounds)
		if err != nil {
			return r, err
		}
		r.Tables = append(r.Tables, together)
	}
	return r, nil
}

// The subnets of the part "macvlan": where containers run one by one, and where they
// start together.
const (
	macvlanSubnet  = "198.51.100.0/24"
	togetherSubnet = "10.98.0.0/24"
)

// macvlans are the two sides, and Berth's without a look at the LAN.
func (t *site) macvlans() []contender {
	sides := t.sides()
	list := []contender{
		{label: sides[0].label, name: "bench-" + sides[0].key, options: macvlanOptions(sides[0], "eth0")},
		{label: sides[1].label, name: "bench-" + sides[1].key, options: macvlanOptions(sides[1], "eth1")},
	}
	if !t.same {
		quiet := macvlanOptions(sides[0], "eth0")
		quiet.IPAM.Options["probe"] = "off"
		list = append(list, contender{label: sides[0].label + ", probe=off", name: "bench-quiet", options: quiet})
	}
	return list
}

// macvlanOptions are those of a macvlan network of the side.
func macvlanOptions(d side, parent string) *network.CreateOptions {
	options := d.network
	options.Options = map[string]string{"parent": parent}
	if d.docker {
		options.Driver = "macvlan"
		options.IPAM = &network.IPAM{}
		return &options
	}
	options.IPAM = &network.IPAM{Driver: d.network.IPAM.Driver, Options: map[string]string{"parent": parent}}
	return &options
}

// addressed are the options with a subnet, and with a range in it unless that is "".
func addressed(options network.CreateOptions, subnet, ipRange string) network.CreateOptions {
	ipam := *options.IPAM
	ipam.Config = []network.IPAMConfig{{Subnet: subnet, IPRange: ipRange}}
	options.IPAM = &ipam
	return options
}

// ranges are the addresses of the contenders, which share the LAN.
func ranges(i int) string { return fmt.Sprintf("198.51.100.%d/26", 64*(i+1)) }

// measureMacvlanRuns runs a container on each network in turns.
func (t *site) measureMacvlanRuns(ctx context.Context, list []contender, rounds int) (*grid, error) {
	g := &grid{Title: "On macvlan:"}
	for i, c := range list {
		g.Columns = append(g.Columns, c.label)
		if _, err := t.api.NetworkCreate(ctx, c.name, addressed(*c.options, macvlanSubnet, ranges(i))); err != nil {
			return g, fmt.Errorf("network of %s: %w", c.label, err)
		}
	}
	for round := -warmRounds; round < rounds; round++ {
		for i := range list {
			i = (i + round + warmRounds) % len(list)
			timed := g.timer(round, i)
			if err := timed(netRun, func() error {
				return t.runTrue(ctx, &container.HostConfig{NetworkMode: container.NetworkMode(list[i].name)})
			}); err != nil {
				return g, err
			}
		}
	}
	for _, c := range list {
		if err := t.api.NetworkRemove(ctx, c.name); err != nil {
			return g, err
		}
	}
	return g, nil
}

// measureTogether starts n containers at the same moment on one /24 of each side.
func (t *site) measureTogether(ctx context.Context, list []contender, n, rounds int) (*grid, error) {
	g := t.pairs(fmt.Sprintf("%d containers at once on a macvlan /24:", n))
	for round := range rounds {
		for _, i := range turns(round) {
			start, removal, err := t.together(ctx, list[i], n)
			if err != nil {
				return nil, fmt.Errorf("%d containers at once on %s: %w", n, list[i].label, err)
			}
			g.add(fmt.Sprintf("`run -d`, all %d", n), inSeconds, i, start)
			g.add(fmt.Sprintf("`rm -f`, all %d", n), inSeconds, i, removal)
			progress("macvlan: %d containers on %s", n, list[i].label)
		}
	}
	return g, nil
}

// together is one round of one contender. An address that two have is an error.
func (t *site) together(ctx context.Context, c contender, n int) (start, removal float64, err error) {
	netName := c.name + "-together"
	if _, err := t.api.NetworkCreate(ctx, netName, addressed(*c.options, togetherSubnet, "")); err != nil {
		return 0, 0, err
	}
	name := func(i int) string { return fmt.Sprintf("%s-%d", netName, i) }
	all := func(do func(context.Context, int) error) func() error {
		return func() error {
			group, ctx := errgroup.WithContext(ctx)
			for i := range n {
				group.Go(func() error { return do(ctx, i) })
			}
			return group.Wait()
		}
	}
	if start, err = took(all(func(ctx context.Context, i int) error {
		_, err := t.hold(ctx, name(i), nil, &container.HostConfig{NetworkMode: container.NetworkMode(netName)})
		return err
	})); err != nil {
		return 0, 0, err
	}
	if err := t.eachHasItsAddress(ctx, netName, n); err != nil {
		return 0, 0, err
	}
	if removal, err = took(all(func(ctx context.Context, i int) error { return t.drop(ctx, name(i)) })); err != nil {
		return 0, 0, err
	}
	return start, removal, t.api.NetworkRemove(ctx, netName)
}

// eachHasItsAddress looks for addresses that two containers of the network have.
func (t *site) eachHasItsAddress(ctx context.Context, netName string, n int) error {
	made, err := t.api.NetworkInspect(ctx, netName, network.InspectOptions{})
	if err != nil {
		return err
	}
	seen := map[netip.Prefix]string{}
	for _, c := range made.Containers {
		addr, err := netip.ParsePrefix(c.IPv4Address)
		if err != nil {
			return fmt.Errorf("container %s: %w", c.Name, err)
		}
		if other, ok := seen[addr]; ok {
			return fmt.Errorf("%s and %s both have %s", other, c.Name, addr)
		}
		seen[addr] = c.Name
	}
	if len(seen) != n {
		return fmt.Errorf("%d containers have addresses, want %d", len(seen), n)
	}
	return nil
}
