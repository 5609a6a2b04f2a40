package main

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"
)

// A driver is one side of the comparison.
type driver struct {
	// name stands in the names of the objects made with it.
	name    string
	network network.CreateOptions
	volume  string
}

// Berth is measured with its own addresses, Docker with its own.
func drivers() [2]driver {
	return [2]driver{
		{name: "berth", volume: "berth-vol:latest", network: network.CreateOptions{
			Driver: "berth-net:latest", IPAM: &network.IPAM{Driver: "berth-net:latest"},
		}},
		{name: "docker", volume: "local", network: network.CreateOptions{Driver: "bridge"}},
	}
}

// bench does the work that is measured.
type bench struct {
	api   *client.Client
	image string
}

// A result holds the times of one kind of work, for Berth and for Docker.
type result struct {
	work  string
	times [2][]time.Duration
}

// The kinds of work.
const (
	netCreate = "network create"
	netRemove = "network rm"
	netRun    = "run --rm true on the network"
	netAttach = "network connect, running container"
	netDetach = "network disconnect, running container"
	volCreate = "volume create"
	volRun    = "run --rm true with the volume"
	volRemove = "volume rm"
)

// warmRounds are done first and not counted.
const warmRounds = 1

// measure does every kind of work rounds times with each driver, in turns.
func measure(ctx context.Context, b bench, rounds int) ([]*result, error) {
	var results []*result
	byWork := make(map[string]*result)
	for _, work := range []string{netCreate, netRun, netAttach, netDetach, netRemove, volCreate, volRun, volRemove} {
		byWork[work] = &result{work: work}
		results = append(results, byWork[work])
	}
	target, err := b.hold(ctx)
	if err != nil {
		return nil, err
	}
	for round := -warmRounds; round < rounds; round++ {
		for side, d := range drivers() {
			timed := func(work string, do func() error) error {
				begin := time.Now()
				if err := do(); err != nil {
					return fmt.Errorf("%s, %s: %w", work, d.name, err)
				}
				if round >= 0 {
					r := byWork[work]
					r.times[side] = append(r.times[side], time.Since(begin))
				}
				return nil
			}
			name := fmt.Sprintf("bench-%s-%d", d.name, round+warmRounds)
			if err := b.networks(ctx, d, name, target, timed); err != nil {
				return nil, err
			}
			if err := b.volumes(ctx, d, name, timed); err != nil {
				return nil, err
			}
		}
	}
	return results, nil
}

func (b bench) networks(ctx context.Context, d driver, name, target string, timed func(string, func() error) error) error {
	if err := timed(netCreate, func() error {
		_, err := b.api.NetworkCreate(ctx, name, d.network)
		return err
	}); err != nil {
		return err
	}
	if err := timed(netRun, func() error {
		return b.runTrue(ctx, &container.HostConfig{NetworkMode: container.NetworkMode(name)})
	}); err != nil {
		return err
	}
	if err := timed(netAttach, func() error { return b.api.NetworkConnect(ctx, name, target, nil) }); err != nil {
		return err
	}
	if err := timed(netDetach, func() error { return b.api.NetworkDisconnect(ctx, name, target, false) }); err != nil {
		return err
	}
	return timed(netRemove, func() error { return b.api.NetworkRemove(ctx, name) })
}

func (b bench) volumes(ctx context.Context, d driver, name string, timed func(string, func() error) error) error {
	if err := timed(volCreate, func() error {
		_, err := b.api.VolumeCreate(ctx, volume.CreateOptions{Name: name, Driver: d.volume})
		return err
	}); err != nil {
		return err
	}
	if err := timed(volRun, func() error {
		return b.runTrue(ctx, &container.HostConfig{NetworkMode: "none", Binds: []string{name + ":/volume"}})
	}); err != nil {
		return err
	}
	return timed(volRemove, func() error { return b.api.VolumeRemove(ctx, name, false) })
}

// runTrue is `docker run --rm IMAGE true`: it ends when the container is gone.
func (b bench) runTrue(ctx context.Context, host *container.HostConfig) error {
	host.AutoRemove = true
	made, err := b.api.ContainerCreate(ctx, &container.Config{Image: b.image, Cmd: []string{"true"}}, host, nil, nil, "")
	if err != nil {
		return err
	}
	gone, failed := b.api.ContainerWait(ctx, made.ID, container.WaitConditionRemoved)
	if err := b.api.ContainerStart(ctx, made.ID, container.StartOptions{}); err != nil {
		return err
	}
	select {
	case end := <-gone:
		if end.StatusCode != 0 {
			return fmt.Errorf("true ended with exit code %d", end.StatusCode)
		}
		return nil
	case err := <-failed:
		return err
	}
}

// hold starts the container that networks are attached to. It goes with the host.
func (b bench) hold(ctx context.Context) (string, error) {
	made, err := b.api.ContainerCreate(ctx, &container.Config{Image: b.image, Cmd: []string{"hold"}}, nil, nil, nil, "bench-target")
	if err != nil {
		return "", err
	}
	return made.ID, b.api.ContainerStart(ctx, made.ID, container.StartOptions{})
}
