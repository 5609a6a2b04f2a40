package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"

	"github.com/berth-plugin/berth/integration/lab"
)

// A site is the lab host that a part is measured on.
type site struct {
	host *lab.Host
	// lan is nil for parts that need no neighbour.
	lan     *lab.LAN
	api     *client.Client
	version string
	mode    lab.Mode
	same    bool
	// stops end what runs in the background.
	stops []func()
}

// siteOptions say what a part needs.
type siteOptions struct {
	// plugins are installed out of the build directory.
	plugins []string
	// settings are those of the plugins, as NAME=value.
	settings []string
	lan      bool
	// nics is how many links to the LAN the host has; 0 means 1.
	nics   int
	daemon []string
	// volumesOn is what the directory of Berth's volumes is on; "" is the host's disk.
	volumesOn string
}

// newSite makes a host with a running engine and the plugins. The caller closes it.
func newSite(ctx context.Context, part string, s settings, opts siteOptions) (made *site, err error) {
	name := fmt.Sprintf("bench-%d-%s", os.Getpid(), part)
	t := &site{mode: s.mode, same: s.same}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	if opts.lan {
		if t.lan, err = lab.MakeLAN(ctx, lab.LANOptions{Name: fmt.Sprintf("bench-%d", os.Getpid()), Engine: s.engine}); err != nil {
			return nil, err
		}
	}
	t.host, err = lab.New(ctx, lab.Options{Name: name, Engine: s.engine, LAN: t.lan, NICs: opts.nics, DaemonArgs: opts.daemon, VolumesOn: opts.volumesOn})
	if err != nil {
		return nil, err
	}
	if err := t.host.ImportBusybox(ctx); err != nil {
		return nil, err
	}
	if !s.same {
		for _, plugin := range opts.plugins {
			if err := t.host.InstallPlugin(ctx, t.mode, plugin, opts.settings...); err != nil {
				return nil, err
			}
		}
	}
	hosts := []*lab.Host{t.host}
	if t.lan != nil {
		hosts = append(hosts, t.lan.Neighbour)
	}
	for _, h := range hosts {
		if err := copySelf(self(h)); err != nil {
			return nil, err
		}
	}
	if t.api, err = t.host.Client(); err != nil {
		return nil, err
	}
	version, err := t.api.ServerVersion(ctx)
	t.version = version.Version
	return t, err
}

// close removes the host with all that is on it.
func (t *site) close() error {
	for _, stop := range slices.Backward(t.stops) {
		stop()
	}
	var errs []error
	if t.api != nil {
		errs = append(errs, t.api.Close())
	}
	if t.host != nil {
		errs = append(errs, t.host.Close())
	}
	if t.lan != nil {
		errs = append(errs, t.lan.Close())
	}
	return errors.Join(errs...)
}

// self is this program's path, the same inside the host and outside.
func self(h *lab.Host) string { return filepath.Join(h.Dir, "bench") }

// copySelf puts this program where hosts and containers can run it.
func copySelf(to string) error {
	path, err := os.Executable()
	if err != nil {
		return err
	}
	binary, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = binary.Close() }()
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("the benchmark needs a C library, which containers do not have: build it with CGO_ENABLED=0")
		}
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}

// A side is one of the two drivers compared.
type side struct {
	// label heads its column, key stands in the names of its objects.
	label, key string
	network    network.CreateOptions
	// volume is the driver for volumes.
	volume string
	// docker says that this is Docker's own driver.
	docker bool
}

// sides are Berth with its own addresses, and Docker with its own.
func (t *site) sides() [2]side {
	docker := side{label: "Docker", key: "docker", docker: true, network: network.CreateOptions{Driver: "bridge"}, volume: "local"}
	if t.same {
		other := docker
		other.label, other.key, docker.label = "Docker A", "other", "Docker B"
		return [2]side{other, docker}
	}
	driver := lab.DriverName(t.mode, "berth-net")
	return [2]side{
		{label: "Berth", key: "berth", volume: lab.DriverName(t.mode, "berth-vol"),
			network: network.CreateOptions{Driver: driver, IPAM: &network.IPAM{Driver: driver}}},
		docker,
	}
}

// pairs is an empty table for the two sides.
func (t *site) pairs(title string) *grid {
	sides := t.sides()
	return &grid{Title: title, Columns: []string{sides[0].label, sides[1].label}}
}

// turns are the sides' numbers in the order of a round: they take turns in being
// first, so that what one leaves to the next falls on both.
func turns(round int) [2]int {
	if round%2 == 0 {
		return [2]int{0, 1}
	}
	return [2]int{1, 0}
}

// background runs this program on the host until the part ends.
func (t *site) background(ctx context.Context, args ...string) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		code, err := t.host.Run(ctx, lab.Command{Argv: append([]string{self(t.host)}, args...), Stdout: os.Stderr, Stderr: os.Stderr})
		if ctx.Err() == nil {
			progress("%s ended with %d: %v", args[0], code, err)
		}
	}()
	t.stops = append(t.stops, func() {
		cancel()
		<-done
	})
}

// runSelf runs this program on the host, with its standard output going to out.
func (t *site) runSelf(ctx context.Context, out io.Writer, args ...string) error {
	var said strings.Builder
	code, err := t.host.Run(ctx, lab.Command{Argv: append([]string{self(t.host)}, args...), Stdout: out, Stderr: &said})
	if err == nil && code != 0 {
		err = fmt.Errorf("%s ended with %d: %s", args[0], code, strings.TrimSpace(said.String()))
	}
	return err
}

// until repeats something until it succeeds, for some seconds.
func until(ctx context.Context, do func() error) error {
	const (
		within = 20 * time.Second
		pause  = 50 * time.Millisecond
	)
	for deadline := time.Now().Add(within); ; {
		err := do()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// took is how many seconds something lasts.
func took(do func() error) (float64, error) {
	begin := time.Now()
	err := do()
	return time.Since(begin).Seconds(), err
}
