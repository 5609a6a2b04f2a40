package quiesce

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// A plan is what is to be done, and the level of a snapshot for which it is.
type plan struct {
	targets []target
	level   control.Consistency
}

// most is how long the containers stand still at most. Where only hooks are run nothing
// stands still, for all that is known.
func (p plan) most() time.Duration {
	most := mostTimeout
	for _, c := range p.targets {
		if c.Way != wayGo {
			most = min(most, c.Timeout)
		}
	}
	return most
}

// users are the containers that have the volume.
func (h *Hold) users(ctx context.Context) ([]User, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	users, err := Users(ctx, h.cfg.API)
	return users[h.cfg.Volume], err
}

// look finds what is to be done.
func (h *Hold) look(ctx context.Context) (plan, error) {
	users, err := h.users(ctx)
	if err != nil {
		return plan{}, err
	}
	p := plan{level: control.ConsistencyQuiesced}
	for _, u := range users {
		if !u.Running() {
			continue
		}
		level, err := h.lookAt(ctx, u, &p)
		if err != nil {
			return plan{}, err
		}
		if !u.ReadOnly && rank(level) < rank(p.level) {
			p.level = level
		}
	}
	return p, nil
}

// rank orders levels.
func rank(level control.Consistency) int {
	switch level {
	case control.ConsistencyQuiesced:
		return 2
	case control.ConsistencyPaused:
		return 1
	default:
		return 0
	}
}

// lookAt adds a container that runs to the plan, if something is to be done to it, and
// returns the level that this alone gives.
func (h *Hold) lookAt(ctx context.Context, u User, p *plan) (control.Consistency, error) {
	w := wishes{pause: true}
	if h.cfg.ByLabels {
		var err error
		if w, err = parseLabels(u.Labels, h.cfg.Volume); err != nil {
			return "", fmt.Errorf("container %s: %w", u.Name, err)
		}
		if u.Driver == localDriver {
			w = wishes{} // it has another volume of that name
		}
	}
	if u.State == container.StateRestarting && w.any() {
		return "", fault.Conflict("container %s is being restarted: it cannot be brought to rest now", u.Name)
	}
	if !w.any() {
		if u.State == container.StatePaused {
			return control.ConsistencyPaused, nil
		}
		return "", nil
	}
	return h.add(ctx, u, w, p)
}

// localDriver is Docker's own.
const localDriver = "local"

// add adds a container for which something is to be done.
func (h *Hold) add(ctx context.Context, u User, w wishes, p *plan) (control.Consistency, error) {
	within, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	c, err := h.cfg.API.ContainerInspect(within, u.ID)
	if err != nil {
		return "", fmt.Errorf("inspect container %s: %w", u.Name, err)
	}
	switch {
	case c.ContainerJSONBase == nil || c.State == nil || !c.State.Running:
		return control.ConsistencyQuiesced, nil // it has ended meanwhile
	case c.State.Paused && (w.pre != "" || w.post != ""):
		return "", fault.Conflict("container %s is paused: its hooks cannot be run", u.Name)
	case c.State.Paused:
		return control.ConsistencyPaused, nil
	case w.stop && c.HostConfig != nil && c.HostConfig.AutoRemove:
		return "", fault.Invalid("container %s: label %s=true: it was started with --rm, so that Docker would remove it when it is stopped", u.Name, LabelStop)
	}
	t := target{ID: u.ID, Name: u.Name, Started: c.State.StartedAt, Way: wayGo, Pre: w.pre, Post: w.post, Timeout: w.timeout}
	level := control.Consistency("")
	switch {
	case w.stop:
		t.Way, level = wayStop, control.ConsistencyQuiesced
	case w.pause:
		t.Way, level = wayPause, control.ConsistencyPaused
	}
	if w.pre != "" {
		level = control.ConsistencyQuiesced
	}
	p.targets = append(p.targets, t)
	return level, nil
}
