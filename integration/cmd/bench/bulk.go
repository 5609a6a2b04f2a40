package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"golang.org/x/sync/errgroup"
)

// bulkSettings are those of starting many containers at once.
type bulkSettings struct {
	containers, workers, rounds int
}

// edge is how many networks at the beginning and at the end of many are compared:
// one alone varies too much.
const edge = 10

// measureManyNetworks makes networks until there are n, of one driver after the
// other, and compares the last with the first. What the empty driver's grow by is
// what dockerd itself takes longer.
func (t *site) measureManyNetworks(ctx context.Context, n int) (*grid, error) {
	g, list := t.withEmpty(fmt.Sprintf("%d networks at once, each with a subnet given:", n))
	some := min(edge, n)
	for i, c := range list {
		times, removal, err := t.manyNetworks(ctx, c, n)
		if err != nil {
			return nil, fmt.Errorf("%d networks of %s: %w", n, c.label, err)
		}
		first := g.line(fmt.Sprintf("`network create`, the first %d of %d", some, n), inSeconds)
		last := g.line(fmt.Sprintf("`network create`, the last %d of %d", some, n), inSeconds)
		first.Values[i], last.Values[i] = times[:some], times[n-some:]
		g.add("last over first", asRatio, i, middle(last.Values[i])/middle(first.Values[i]))
		all := 0.0
		for _, v := range times {
			all += v
		}
		g.add(fmt.Sprintf("`network create`, all %d", n), inSeconds, i, all)
		g.add(fmt.Sprintf("`network rm`, all %d", n), inSeconds, i, removal)
		progress("start: %d networks of %s", n, c.label)
	}
	return g, nil
}

// manyNetworks returns how long each of n networks took to make, and how long all of
// them took to remove.
func (t *site) manyNetworks(ctx context.Context, c contender, n int) (times []float64, removal float64, err error) {
	name := func(i int) string { return fmt.Sprintf("%s-many-%d", c.name, i) }
	for i := range n {
		// Docker's own pools are used up after some thirty networks.
		options := withSubnet(*c.options, manySubnet(i).String())
		elapsed, err := took(func() error {
			_, err := t.api.NetworkCreate(ctx, name(i), options)
			return err
		})
		if err != nil {
			return nil, 0, err
		}
		times = append(times, elapsed)
	}
	removal, err = took(func() error {
		for i := range n {
			if err := t.api.NetworkRemove(ctx, name(i)); err != nil {
				return err
			}
		}
		return nil
	})
	return times, removal, err
}

// withSubnet are the options with a subnet, and the address management they had.
func withSubnet(options network.CreateOptions, subnet string) network.CreateOptions {
	ipam := &network.IPAM{Config: []network.IPAMConfig{{Subnet: subnet}}}
	if options.IPAM != nil {
		ipam.Driver = options.IPAM.Driver
	}
	options.IPAM = ipam
	return options
}

// manySubnet is the /24 with the number i, out of 10.0.0.0/8.
func manySubnet(i int) netip.Prefix {
	const first = 100 << 8 // 10.100.0.0
	i += first
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
}

// measureBulk starts many containers by several workers at once, in turns.
func (t *site) measureBulk(ctx context.Context, s bulkSettings) (*grid, error) {
	g := t.pairs(fmt.Sprintf("%d containers, %d at once:", s.containers, s.workers))
	for round := range s.rounds {
		for _, i := range turns(round) {
			d := t.sides()[i]
			start, removal, err := t.bulk(ctx, d, s)
			if err != nil {
				return nil, fmt.Errorf("%d containers on %s: %w", s.containers, d.label, err)
			}
			g.add(fmt.Sprintf("`run -d`, all %d", s.containers), inSeconds, i, start)
			g.add(fmt.Sprintf("`rm -f`, all %d", s.containers), inSeconds, i, removal)
			progress("start: %d containers on %s", s.containers, d.label)
		}
	}
	return g, nil
}

// bulk is one round of one side.
func (t *site) bulk(ctx context.Context, d side, s bulkSettings) (start, removal float64, err error) {
	netName := "bench-bulk-" + d.key
	if _, err := t.api.NetworkCreate(ctx, netName, withSubnet(d.network, bulkSubnet)); err != nil {
		return 0, 0, err
	}
	name := func(i int) string { return fmt.Sprintf("bench-bulk-%s-%d", d.key, i) }
	all := func(do func(context.Context, int) error) func() error {
		return func() error {
			group, ctx := errgroup.WithContext(ctx)
			group.SetLimit(s.workers)
			for i := range s.containers {
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
	if removal, err = took(all(func(ctx context.Context, i int) error { return t.drop(ctx, name(i)) })); err != nil {
		return 0, 0, err
	}
	return start, removal, t.api.NetworkRemove(ctx, netName)
}

// bulkSubnet has room for a thousand containers.
const bulkSubnet = "10.99.0.0/22"
