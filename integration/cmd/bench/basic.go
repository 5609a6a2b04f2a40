package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/go-connections/nat"

	"github.com/berth-plugin/berth/integration/lab"
)

// The kinds of work.
const (
	netCreate = "`network create`"
	netRemove = "`network rm`"
	netRun    = "`run --rm true on the network`"
	netAttach = "`network connect, running container`"
	netDetach = "`network disconnect, running container`"
	volCreate = "`volume create`"
	volRun    = "`run --rm true with the volume`"
	volRemove = "`volume rm`"
)

// usualRounds is how often short work is done if nothing else is wanted.
const usualRounds = 20

// warmRounds are done first and not counted.
const warmRounds = 1

// A timer does some work, measures it unless the round is one for warming up, and
// says in the error what it was.
type timer func(work string, do func() error) error

// timer measures into a column of the table.
func (g *grid) timer(round, column int) timer {
	return func(work string, do func() error) error {
		elapsed, err := took(do)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", work, g.Columns[column], err)
		}
		if round >= 0 {
			g.add(work, inSeconds, column, elapsed)
		}
		return nil
	}
}

// measureBasic does every kind of work with networks and volumes in turns.
func measureBasic(ctx context.Context, s settings) (r *report, err error) {
	t, err := newSite(ctx, "basic", s, siteOptions{plugins: []string{"berth-net", "berth-vol"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	target, err := t.hold(ctx, "bench-target", nil, &container.HostConfig{})
	if err != nil {
		return nil, err
	}
	table := t.pairs("")
	for round := -warmRounds; round < s.roundsOr(usualRounds); round++ {
		for _, i := range turns(round + warmRounds) {
			d := t.sides()[i]
			name := fmt.Sprintf("bench-%s-%d", d.key, round+warmRounds)
			if err := t.networks(ctx, d, name, target, table.timer(round, i)); err != nil {
				return nil, err
			}
			if err := t.volumes(ctx, d, name, table.timer(round, i)); err != nil {
				return nil, err
			}
		}
	}
	return &report{Engine: t.version, Tables: []*grid{table}}, nil
}

func (t *site) networks(ctx context.Context, d side, name, target string, timed timer) error {
	if err := timed(netCreate, func() error {
		_, err := t.api.NetworkCreate(ctx, name, d.network)
		return err
	}); err != nil {
		return err
	}
	if err := timed(netRun, func() error {
		return t.runTrue(ctx, &container.HostConfig{NetworkMode: container.NetworkMode(name)})
	}); err != nil {
		return err
	}
	if err := timed(netAttach, func() error { return t.api.NetworkConnect(ctx, name, target, nil) }); err != nil {
		return err
	}
	if err := timed(netDetach, func() error { return t.api.NetworkDisconnect(ctx, name, target, false) }); err != nil {
		return err
	}
	return timed(netRemove, func() error { return t.api.NetworkRemove(ctx, name) })
}

func (t *site) volumes(ctx context.Context, d side, name string, timed timer) error {
	if err := timed(volCreate, func() error {
		_, err := t.api.VolumeCreate(ctx, volume.CreateOptions{Name: name, Driver: d.volume})
		return err
	}); err != nil {
		return err
	}
	if err := timed(volRun, func() error {
		return t.runTrue(ctx, &container.HostConfig{NetworkMode: "none", Binds: []string{name + ":/volume"}})
	}); err != nil {
		return err
	}
	return timed(volRemove, func() error { return t.api.VolumeRemove(ctx, name, false) })
}

// runTrue is `docker run --rm IMAGE true`: it ends when the container is gone.
func (t *site) runTrue(ctx context.Context, host *container.HostConfig) error {
	host.AutoRemove = true
	config := &container.Config{Image: lab.BusyboxImage, Cmd: []string{"true"}}
	made, err := t.api.ContainerCreate(ctx, config, host, nil, nil, "")
	if err != nil {
		return err
	}
	gone, failed := t.api.ContainerWait(ctx, made.ID, container.WaitConditionRemoved)
	if err := t.api.ContainerStart(ctx, made.ID, container.StartOptions{}); err != nil {
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

// hold is `docker run -d`: it starts a container that stays. A nil command sleeps.
func (t *site) hold(ctx context.Context, name string, cmd []string, host *container.HostConfig) (string, error) {
	if cmd == nil {
		cmd = []string{"sleep", "1d"}
	}
	config := &container.Config{Image: lab.BusyboxImage, Cmd: cmd}
	for port := range host.PortBindings {
		if config.ExposedPorts == nil {
			config.ExposedPorts = make(map[nat.Port]struct{}, len(host.PortBindings))
		}
		config.ExposedPorts[port] = struct{}{}
	}
	made, err := t.api.ContainerCreate(ctx, config, host, nil, nil, name)
	if err != nil {
		return "", err
	}
	return made.ID, t.api.ContainerStart(ctx, made.ID, container.StartOptions{})
}

// drop ends and removes a container; one that is not there is fine, as is an
// interruption: then all of the host goes, at once.
func (t *site) drop(ctx context.Context, name string) error {
	err := t.api.ContainerRemove(ctx, name, container.RemoveOptions{Force: true})
	if ctx.Err() == nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}
