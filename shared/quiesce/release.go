package quiesce

import (
	"context"
	"errors"
	"fmt"

	"github.com/docker/docker/api/types/container"

	"github.com/berth-plugin/berth/shared/fault"
)

// release lets all containers go and returns the names of those that stood still.
func (r *record) release(ctx context.Context, api API) (names []string, _ error) {
	var errs []error
	for _, c := range r.held() {
		did, err := release(ctx, api, c)
		if err != nil {
			errs = append(errs, err)
		}
		if did {
			names = append(names, c.Name)
		}
	}
	return names, errors.Join(errs...)
}

// release lets a container go unless that is done, or it is not the same run of it any
// more. It reports whether it did. The error tells the user what to do.
func release(ctx context.Context, api API, c target) (did bool, err error) {
	if c.Way == wayStop {
		if did, err = startAgain(ctx, api, c); err != nil {
			err = fmt.Errorf("container %s is not started again: %w (docker start %s)", c.Name, err, c.Name)
		}
		return did, err
	}
	if did, err = unpause(ctx, api, c); err != nil {
		err = fmt.Errorf("container %s is still paused: %w (docker unpause %s)", c.Name, err, c.Name)
	}
	return did, err
}

func unpause(ctx context.Context, api API, c target) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	ours := func() (bool, error) {
		state, err := inspect(ctx, api, c.ID)
		return state != nil && state.Paused && state.StartedAt == c.Started, err
	}
	held, err := ours()
	if err != nil || !held {
		return false, err
	}
	if err := api.ContainerUnpause(ctx, c.ID); err != nil {
		if held, lookErr := ours(); lookErr != nil || held {
			return false, err
		}
	}
	return true, nil
}

// startAgain starts a container that this has asked Docker to stop. Docker may still be
// at that.
func startAgain(ctx context.Context, api API, c target) (bool, error) {
	state, err := inspect(ctx, api, c.ID)
	if err != nil || state == nil || state.StartedAt != c.Started {
		return false, err
	}
	if state.Running {
		if err := stop(ctx, api, c); err != nil {
			return false, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	err = api.ContainerStart(ctx, c.ID, container.StartOptions{})
	if fault.Kind(err) == "notfound" {
		return false, nil
	}
	return err == nil, err
}

// stop waits for the end of the container's processes. Its own time for that, 10 s
// unless it was made with another, is Docker's to keep.
func stop(ctx context.Context, api API, c target) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout+callTime)
	defer cancel()
	return api.ContainerStop(ctx, c.ID, container.StopOptions{})
}

// inspect returns what a container does; nil when there is no such container.
func inspect(ctx context.Context, api API, id string) (*container.State, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	c, err := api.ContainerInspect(ctx, id)
	switch {
	case fault.Kind(err) == "notfound":
		return nil, nil
	case err != nil:
		return nil, err
	case c.ContainerJSONBase == nil:
		return nil, nil
	}
	return c.State, nil
}

// stands reports whether a container does nothing: it is paused, or has no processes.
func stands(ctx context.Context, api API, id string) (bool, error) {
	state, err := inspect(ctx, api, id)
	return state == nil || !state.Running || state.Paused, err
}

// runDue runs the hooks for after the snapshot. One that fails is not run again.
func (r *record) runDue(ctx context.Context, api API) error {
	var errs []error
	for _, c := range r.due() {
		if err := execute(ctx, api, c.ID, c.Post, c.Timeout); err != nil {
			errs = append(errs, hookError(c, LabelPost, err))
		}
		errs = append(errs, r.note(note{Done: c.ID}))
	}
	return errors.Join(errs...)
}

func hookError(c target, label string, err error) error {
	return fmt.Errorf("container %s: hook %s: %w", c.Name, label, err)
}
