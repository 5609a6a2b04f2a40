package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/berth-plugin/berth/integration/cmd/bench/emptydriver"
	"github.com/berth-plugin/berth/integration/cmd/bench/load"
)

// What this program is started with inside hosts and containers.
const (
	// loadCommand KIND [-for TIME] [-n NUMBER] [-workers NUMBER] ADDRESS prints one
	// number; loadCommand serve PORT... answers.
	loadCommand     = "load"
	serveLoad       = "serve"
	throughputLoad  = "throughput"
	roundTripLoad   = "roundtrip"
	connectionsLoad = "connections"
	// emptyCommand SOCKET is the empty plugin.
	emptyCommand = "empty-plugin"
)

func runLoad(ctx context.Context, args []string, w io.Writer) error {
	if len(args) == 0 {
		return errors.New("load: want serve, throughput, roundtrip or connections")
	}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	duration := f.Duration("for", time.Second, "`TIME` to send for")
	n := f.Int("n", 1, "`NUMBER` of round trips or connections")
	workers := f.Int("workers", 1, "`NUMBER` of connections at once")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if args[0] == serveLoad {
		return serveLoadOn(ctx, f.Args())
	}
	if f.NArg() != 1 {
		return fmt.Errorf("load %s: want one address", args[0])
	}
	value, err := measureLoad(ctx, args[0], f.Arg(0), *duration, *n, *workers)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, value)
	return err
}

func measureLoad(ctx context.Context, kind, addr string, duration time.Duration, n, workers int) (float64, error) {
	switch kind {
	case throughputLoad:
		return load.Throughput(ctx, addr, duration)
	case roundTripLoad:
		rtt, err := load.RoundTrip(ctx, addr, n)
		return rtt.Seconds(), err
	case connectionsLoad:
		return load.Connections(ctx, addr, n, workers)
	}
	return 0, fmt.Errorf("load %s: want serve, throughput, roundtrip or connections", kind)
}

// serveLoadOn answers on the ports until it is killed.
func serveLoadOn(ctx context.Context, ports []string) error {
	group, ctx := errgroup.WithContext(ctx)
	var config net.ListenConfig
	for _, port := range ports {
		l, err := config.Listen(ctx, "tcp", net.JoinHostPort("", port))
		if err != nil {
			return err
		}
		group.Go(func() error { return load.Serve(ctx, l) })
	}
	return group.Wait()
}

// serveEmpty answers dockerd until it is killed.
func serveEmpty(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("empty-plugin: want a socket")
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "unix", args[0])
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	return emptydriver.New().Serve(l)
}
