package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/volume"
	"golang.org/x/sync/errgroup"

	"github.com/berth-plugin/berth/integration/cmd/bench/ipamload"
)

// What this program is started with inside the host for the parts "volumes" and
// "snapshots".
const (
	// volumeCallsCommand NUMBER makes volumes, calls the plugin as dockerd does, and
	// prints volumeCalls as JSON.
	volumeCallsCommand = "volume-calls"
	// volumeGetsCommand [-for TIME] NAME asks for a volume again and again, and prints
	// the times in seconds as JSON.
	volumeGetsCommand = "volume-gets"
)

// volumeCalls are times in seconds.
type volumeCalls struct {
	Create, Get, Pair, List []float64
}

// createClients make volumes at once.
const createClients = 16

// runVolumeCalls is volumeCallsCommand.
func runVolumeCalls(ctx context.Context, args []string, w io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("%s: want a number", volumeCallsCommand)
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 {
		return fmt.Errorf("%s %s: want a number", volumeCallsCommand, args[0])
	}
	socket, err := ipamload.FindPlugin(ctx, pluginDir, "VolumeDriver")
	if err != nil {
		return err
	}
	var got volumeCalls
	if err := createVolumes(ctx, socket, n); err != nil {
		return err
	}
	c, err := ipamload.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	timed := func(into *[]float64, times int, do func(i int) error) error {
		for i := range times {
			seconds, err := took(func() error { return do(i) })
			if err != nil {
				return err
			}
			*into = append(*into, seconds)
		}
		return nil
	}
	named := func(i int) map[string]string { return map[string]string{"Name": volumeName(i)} }
	const few, many = 30, 2000
	err = timed(&got.Create, few, func(i int) error {
		return c.Call("VolumeDriver.Create", map[string]string{"Name": fmt.Sprintf("one-%d", i)}, nil)
	})
	if err == nil {
		err = timed(&got.Get, many, func(i int) error { return c.Call("VolumeDriver.Get", named(i%n), nil) })
	}
	if err == nil {
		err = timed(&got.Pair, few, func(i int) error {
			body := named(i % n)
			body["ID"] = "bench"
			return errors.Join(c.Call("VolumeDriver.Mount", body, nil), c.Call("VolumeDriver.Unmount", body, nil))
		})
	}
	if err == nil {
		// As volumes are listed on most hosts: a while after the last was made. The
		// first listing after that is one of those that are timed.
		const rest = 12 * time.Second
		time.Sleep(rest)
		err = timed(&got.List, few, func(int) error {
			var list struct{ Volumes []struct{ Name string } }
			err := c.Call("VolumeDriver.List", nil, &list)
			if err == nil && len(list.Volumes) < n {
				err = fmt.Errorf("%d volumes are listed, want %d", len(list.Volumes), n)
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(got)
}

func volumeName(i int) string { return fmt.Sprintf("many-%d", i) }

func createVolumes(ctx context.Context, socket string, n int) error {
	var clients errgroup.Group
	for first := range createClients {
		clients.Go(func() error {
			c, err := ipamload.Dial(ctx, socket)
			if err != nil {
				return err
			}
			defer c.Close()
			for i := first; i < n; i += createClients {
				if err := c.Call("VolumeDriver.Create", map[string]string{"Name": volumeName(i)}, nil); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return clients.Wait()
}

// runVolumeGets is volumeGetsCommand.
func runVolumeGets(ctx context.Context, args []string, w io.Writer) error {
	f := flag.NewFlagSet(volumeGetsCommand, flag.ContinueOnError)
	end := f.Duration("for", time.Minute, "`TIME` to ask for")
	if err := f.Parse(args); err != nil {
		return err
	}
	socket, err := ipamload.FindPlugin(ctx, pluginDir, "VolumeDriver")
	if err != nil {
		return err
	}
	c, err := ipamload.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	var got []float64
	const pause = 10 * time.Millisecond
	for begin := time.Now(); time.Since(begin) < *end; {
		seconds, err := took(func() error {
			return c.Call("VolumeDriver.Get", map[string]string{"Name": f.Arg(0)}, nil)
		})
		if err != nil {
			return err
		}
		got = append(got, seconds)
		time.Sleep(pause)
	}
	return json.NewEncoder(w).Encode(got)
}

// measureVolumes asks the plugin as dockerd does, and lets containers write.
func measureVolumes(ctx context.Context, s settings) (r *report, err error) {
	if s.same {
		return nil, errors.New("-same: Docker's own driver is not called over a socket, leave it out")
	}
	t, err := newSite(ctx, "volumes", s, siteOptions{plugins: []string{"berth-vol"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	r = &report{Engine: t.version}
	writes, err := t.measureWrites(ctx, s.roundsOr(usualWrites))
	if err != nil {
		return nil, err
	}
	r.Tables = append(r.Tables, writes)
	progress("volumes: %d volumes", s.volumes)
	res, err := t.host.Exec(ctx, self(t.host), volumeCallsCommand, strconv.Itoa(s.volumes))
	if err != nil {
		return r, err
	}
	var calls volumeCalls
	if err := json.Unmarshal([]byte(res.Stdout), &calls); err != nil {
		return r, err
	}
	g := &grid{Title: fmt.Sprintf("Calls over the socket, one after the other, with %d volumes:", s.volumes), Columns: []string{"median", "99 of 100"}, plain: true}
	for _, l := range []struct {
		work  string
		times []float64
	}{{"Create", calls.Create}, {"Get", calls.Get}, {"Mount and Unmount", calls.Pair}, {"List", calls.List}} {
		g.add(l.work, inSeconds, 0, middle(l.times))
		g.add(l.work, inSeconds, 1, quantile(l.times, 0.99))
	}
	r.Tables = append(r.Tables, g)
	return r, nil
}

// quantile is the value that so much of the values is not above.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1))]
}

// usualWrites is how often containers write.
const usualWrites = 6

// writesInContainer prints how long a large file and many small ones take, in seconds.
const writesInContainer = `
	now() { cut -d' ' -f1 /proc/uptime; }
	a=$(now); dd if=/dev/zero of=/x/large bs=1M count=256 conv=fsync 2>/dev/null
	b=$(now); mkdir /x/small; i=0; while [ $i -lt 2000 ]; do echo $i > /x/small/$i; i=$((i+1)); done; sync
	c=$(now); rm -r /x/large /x/small
	echo $a $b $c`

// measureWrites compares a volume with the same directory bound by its path.
func (t *site) measureWrites(ctx context.Context, rounds int) (*grid, error) {
	const name = "writes"
	driver := t.sides()[0].volume
	if _, err := t.api.VolumeCreate(ctx, volume.CreateOptions{Name: name, Driver: driver}); err != nil {
		return nil, err
	}
	binds := [2]string{name + ":/x", "/var/lib/berth/volumes/" + name + ":/x"}
	g := &grid{Title: "Writes in a container, in the volume and in the same directory bound by its path:", Columns: []string{"Volume", "Bind mount"}}
	for round := -warmRounds; round < rounds; round++ {
		for _, i := range turns(round + warmRounds) {
			id, err := t.hold(ctx, "bench-writer", nil, &container.HostConfig{NetworkMode: "none", Binds: []string{binds[i]}})
			if err != nil {
				return nil, err
			}
			res, err := t.host.Exec(ctx, "docker", "exec", id, "sh", "-c", writesInContainer)
			if err != nil {
				return nil, err
			}
			var a, b, c float64
			if _, err := fmt.Sscan(strings.TrimSpace(res.Stdout), &a, &b, &c); err != nil {
				return nil, fmt.Errorf("times of a container %q: %w", res.Stdout, err)
			}
			if round >= 0 {
				g.add("256 MiB in one file, with fsync", inSeconds, i, b-a)
				g.add("2000 small files, with sync", inSeconds, i, c-b)
			}
			if err := t.drop(ctx, id); err != nil {
				return nil, err
			}
		}
	}
	return g, t.api.VolumeRemove(ctx, name, false)
}
