package quiesce

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// The labels of containers.
const (
	labelPrefix = "berth.backup."
	// LabelPre and LabelPost are commands, for sh -c in the container.
	LabelPre  = labelPrefix + "pre"
	LabelPost = labelPrefix + "post"
	// LabelPause and LabelStop are true or false.
	LabelPause = labelPrefix + "pause"
	LabelStop  = labelPrefix + "stop"
	// LabelTimeout is a duration, as 90s.
	LabelTimeout = labelPrefix + "timeout"
	// LabelVolumes lists the volumes that the others are for, with commas; none is all.
	LabelVolumes = labelPrefix + "volumes"
)

const (
	// defaultTimeout is how long a hook may take and how long a container stands still
	// at most; leastTimeout and mostTimeout are what a label may say instead.
	defaultTimeout = 30 * time.Second
	leastTimeout   = time.Second
	mostTimeout    = time.Hour
)

// wishes are the labels of a container.
type wishes struct {
	pre, post   string
	pause, stop bool
	timeout     time.Duration
}

// any tells whether something is to be done.
func (w wishes) any() bool { return w.pre != "" || w.post != "" || w.pause || w.stop }

// parseLabels reads what a container's labels want for a volume. The error names the
// label, its value and what is allowed.
func parseLabels(labels map[string]string, volume string) (w wishes, err error) {
	w.timeout = defaultTimeout
	limited := false
	for _, label := range slices.Sorted(maps.Keys(labels)) {
		value := labels[label]
		switch label {
		case LabelPre:
			w.pre = value
		case LabelPost:
			w.post = value
		case LabelPause:
			w.pause, err = parseBool(label, value)
		case LabelStop:
			w.stop, err = parseBool(label, value)
		case LabelTimeout:
			if w.timeout, err = time.ParseDuration(value); err != nil || w.timeout < leastTimeout || w.timeout > mostTimeout {
				err = fault.Invalid("label %s=%q: want a time from %s to %s, as 90s", label, value, leastTimeout, mostTimeout)
			}
		case LabelVolumes:
			limited = !slices.ContainsFunc(strings.Split(value, ","), func(name string) bool { return strings.TrimSpace(name) == volume })
		default:
			if strings.HasPrefix(label, labelPrefix) {
				err = fault.Invalid("label %s: there is no such label, but pre, post, pause, stop, timeout and volumes after %s", label, labelPrefix)
			}
		}
		if err != nil {
			return wishes{}, err
		}
	}
	if w.pause && w.stop {
		return wishes{}, fault.Invalid("labels %s and %s: want only one of them to be true", LabelPause, LabelStop)
	}
	if limited {
		return wishes{}, nil
	}
	return w, nil
}

func parseBool(label, value string) (bool, error) {
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, fault.Invalid("label %s=%q: want true or false", label, value)
	}
	return b, nil
}
