package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/berth-plugin/berth/integration/cmd/bench/ipamload"
)

// What this program is started with inside the host for the part "ipam".
const (
	// pairsCommand [-clients NUMBER] [-for TIME] [-rate NUMBER] HELD... fills a pool
	// step by step, and prints an addressLevel for each as JSON.
	pairsCommand = "addresses"
	// holdCommand NUMBER takes addresses that stay and prints their pool.
	holdCommand = "hold-addresses"
	// recoverCommand POOL prints how long the next berthd takes to answer.
	recoverCommand = "await-addresses"
)

const (
	pluginDir = "/run/docker/plugins"
	// pairsSubnet and holdSubnet are the pools'.
	pairsSubnet = "10.64.0.0/16"
	holdSubnet  = "10.80.0.0/14"
)

// addressSettings are those of the part "ipam".
type addressSettings struct {
	clients, rate int
	held          []int
	recovered     int
	time          time.Duration
}

// maxHeld is how many addresses a /16 has.
const maxHeld = 1<<16 - 2

// usualHeld are steps up to 99 % of a /16.
const usualHeld = "0,30000,60000,64877"

// An addressLevel is what was measured with a number of addresses held.
type addressLevel struct {
	Held int
	// Fill is how long it took to take those that were not held before, in seconds.
	Fill float64
	// Most is measured as fast as it goes, Paced at the rate.
	Most, Paced ipamload.Result
}

// runPairs is pairsCommand.
func runPairs(ctx context.Context, args []string, w io.Writer) error {
	f := flag.NewFlagSet(pairsCommand, flag.ContinueOnError)
	clients := f.Int("clients", 1, "`NUMBER` of clients")
	duration := f.Duration("for", time.Second, "`TIME` to measure for")
	rate := f.Int("rate", 0, "`NUMBER` of pairs a second besides, 0 for none")
	if err := f.Parse(args); err != nil {
		return err
	}
	socket, err := ipamload.Find(ctx, pluginDir)
	if err != nil {
		return err
	}
	l, err := ipamload.Open(ctx, socket, pairsSubnet, *clients)
	if err != nil {
		return err
	}
	held := 0
	for _, word := range f.Args() {
		level := addressLevel{}
		if level.Held, err = strconv.Atoi(word); err != nil || level.Held < held {
			err = errors.Join(err, fmt.Errorf("%s: want numbers that rise, have %q", pairsCommand, f.Args()))
			break
		}
		if level.Fill, err = took(func() error { return l.Fill(level.Held - held) }); err != nil {
			break
		}
		held = level.Held
		if level.Most, err = l.Pairs(*duration, 0); err != nil {
			break
		}
		if *rate > 0 {
			if level.Paced, err = l.Pairs(*duration, *rate); err != nil {
				break
			}
		}
		if err = json.NewEncoder(w).Encode(level); err != nil {
			break
		}
	}
	return errors.Join(err, l.ReleasePool(), l.Close())
}

// holdAddresses is holdCommand.
func holdAddresses(ctx context.Context, args []string, w io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("%s: want a number", holdCommand)
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	socket, err := ipamload.Find(ctx, pluginDir)
	if err != nil {
		return err
	}
	const clients = 64
	l, err := ipamload.Open(ctx, socket, holdSubnet, clients)
	if err != nil {
		return err
	}
	if err := l.Fill(n); err != nil {
		return errors.Join(err, l.Close())
	}
	_, err = fmt.Fprintln(w, l.Pool)
	return errors.Join(err, l.Close())
}

// awaitAddresses is recoverCommand. Its first line says that it waits.
func awaitAddresses(ctx context.Context, args []string, w io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("%s: want a pool", recoverCommand)
	}
	ready := make(chan struct{})
	go func() {
		<-ready
		fmt.Fprintln(w, "ready")
	}()
	seconds, err := ipamload.Recovery(ctx, pluginDir, "berthd", args[0], ready)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, seconds)
	return err
}

// measureAddresses takes addresses and gives them back, without containers.
func measureAddresses(ctx context.Context, s settings) (r *report, err error) {
	if s.same {
		return nil, errors.New("-same: no address of Docker's own is asked for over a socket, leave it out")
	}
	t, err := newSite(ctx, "ipam", s, siteOptions{plugins: []string{"berth-net"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	r = &report{Engine: t.version}
	pairs, err := t.measurePairs(ctx, s.addresses)
	if err != nil {
		return nil, err
	}
	r.Tables = append(r.Tables, pairs)
	progress("ipam: addresses taken and given back")
	recovery, err := t.measureRecovery(ctx, s.addresses.recovered, s.roundsOr(usualRecoveries))
	if recovery != nil {
		r.Tables = append(r.Tables, recovery)
	}
	return r, err
}

// usualRecoveries is how often berthd is killed with all addresses held.
const usualRecoveries = 5

// measurePairs has a column for each number of addresses held.
func (t *site) measurePairs(ctx context.Context, s addressSettings) (*grid, error) {
	args := []string{self(t.host), pairsCommand, "-clients", strconv.Itoa(s.clients), "-for", s.time.String(), "-rate", strconv.Itoa(s.rate)}
	for _, n := range s.held {
		args = append(args, strconv.Itoa(n))
	}
	res, err := t.host.Exec(ctx, args...)
	if err != nil {
		return nil, err
	}
	g := &grid{Title: fmt.Sprintf("RequestAddress and ReleaseAddress by %d clients, with so many addresses of a /16 held:", s.clients), plain: true}
	for range s.held {
		g.Columns = append(g.Columns, "")
	}
	decode := json.NewDecoder(strings.NewReader(res.Stdout))
	held := 0
	for i := range s.held {
		var l addressLevel
		if err := decode.Decode(&l); err != nil {
			return nil, err
		}
		g.Columns[i] = strconv.Itoa(l.Held)
		g.add("pairs", inRate, i, l.Most.PerSecond)
		g.add("call, median", inSeconds, i, l.Most.Median)
		g.add("call, 99 of 100", inSeconds, i, l.Most.P99)
		if s.rate > 0 {
			g.add(fmt.Sprintf("pairs, %d/s wanted", s.rate), inRate, i, l.Paced.PerSecond)
			g.add(fmt.Sprintf("call, median, at %d pairs/s", s.rate), inSeconds, i, l.Paced.Median)
			g.add(fmt.Sprintf("call, 99 of 100, at %d pairs/s", s.rate), inSeconds, i, l.Paced.P99)
		}
		if l.Held > held {
			g.add("requests while filling up", inRate, i, float64(l.Held-held)/l.Fill)
		}
		held = l.Held
	}
	return g, nil
}

// measureRecovery kills berthd while it holds many addresses, and looks at its memory.
func (t *site) measureRecovery(ctx context.Context, n, rounds int) (*grid, error) {
	// A new berthd has nothing of what was measured before.
	if err := t.killPlugin(ctx); err != nil {
		return nil, err
	}
	before, err := t.settled(ctx)
	if err != nil {
		return nil, err
	}
	res, err := t.host.Exec(ctx, self(t.host), holdCommand, strconv.Itoa(n))
	if err != nil {
		return nil, err
	}
	pool := strings.TrimSpace(res.Stdout)
	after, err := t.settled(ctx)
	if err != nil {
		return nil, err
	}
	g := &grid{Title: fmt.Sprintf("%d addresses held:", n), Columns: []string{"Berth"}}
	g.add("memory more (PSS)", inBytes, 0, float64(after.PSS-before.PSS))
	for range rounds {
		seconds, err := t.recovery(ctx, pool)
		if err != nil {
			return g, fmt.Errorf("recovery: %w", err)
		}
		g.add("from berthd's start to its first answer", inSeconds, 0, seconds)
	}
	recovered, err := t.settled(ctx)
	g.add("memory more (PSS), after recovery", inBytes, 0, float64(recovered.PSS-before.PSS))
	return g, err
}

// killPlugin kills berthd when dockerd is sure to see it: for half a second after it has
// started a plugin, dockerd looks away.
func (t *site) killPlugin(ctx context.Context) error {
	const sure = 2 * time.Second
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(sure):
	}
	return t.host.KillPlugin(ctx)
}

// recovery kills berthd once.
func (t *site) recovery(ctx context.Context, pool string) (float64, error) {
	const within = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- t.runSelf(ctx, in, recoverCommand, pool)
		_ = in.Close()
	}()
	var word string
	if _, err := fmt.Fscanln(out, &word); err != nil {
		return 0, errors.Join(err, <-ended)
	}
	if err := t.killPlugin(ctx); err != nil {
		return 0, err
	}
	var seconds float64
	if _, err := fmt.Fscanln(out, &seconds); err != nil {
		return 0, errors.Join(err, <-ended)
	}
	return seconds, <-ended
}
