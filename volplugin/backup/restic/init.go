package restic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// Init implements backup.Engine. The directory that a local repository is made in must be
// there: it may be a disk that is not mounted.
func (e *Engine) Init(ctx context.Context) error {
	return fail("open or make the repository", e.init(ctx))
}

func (e *Engine) init(ctx context.Context) error {
	err := e.open(ctx)
	if !errors.Is(err, backup.ErrNoRepository) {
		if badKey(err) != "" {
			return e.repair(ctx, err)
		}
		return err
	}
	if e.Target.Kind() == "local" {
		parent := filepath.Dir(strings.TrimPrefix(e.Target.Repository, "local:"))
		if info, err := os.Stat(parent); err != nil || !info.IsDir() {
			return fault.Unavailable("there is no directory %s to make the repository in: is its disk mounted?", parent)
		}
	}
	began := time.Now()
	made := e.run(ctx, call{args: []string{"--json", "init"}})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// Whoever else has seen that there was none is done when as much time again has passed.
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Since(began)):
	}
	err = e.open(ctx)
	if made != nil && errors.Is(err, backup.ErrNoRepository) {
		return made
	}
	return e.repair(ctx, err)
}

// open reads the configuration of the repository.
func (e *Engine) open(ctx context.Context, more ...string) error {
	return e.run(ctx, call{args: append(more, "--no-lock", "--json", "cat", "config")})
}

var damagedKey = regexp.MustCompile(`config or key ([0-9a-f]{8,64}) is damaged`)

// badKey is the key that opens, but not to the configuration: it was made by a host that made the
// repository at the same time as another one.
func badKey(err error) string {
	var exit *exitError
	if errors.As(err, &exit) {
		if m := damagedKey.FindStringSubmatch(exit.text); m != nil {
			return m[1]
		}
	}
	return ""
}

// maxHints bounds the beginnings of keys that are tried.
const maxHints = 64

// repair removes keys that open nothing. failed is how opening has ended.
func (e *Engine) repair(ctx context.Context, failed error) error {
	var with []string
	if badKey(failed) != "" {
		hint, err := e.goodKey(ctx, failed)
		if err != nil {
			return err
		}
		with = []string{"--key-hint", hint}
	} else if failed != nil {
		return failed
	}
	var keys []string
	err := e.run(ctx, call{args: slices.Concat(with, []string{"--no-lock", "--quiet", "list", "keys"}), out: func(line []byte) error {
		if !fullID.Match(line) {
			return malformed(line, errors.New("it is the ID of no key"))
		}
		keys = append(keys, string(line))
		return nil
	}})
	if err != nil || len(keys) == 1 {
		return err
	}
	for _, key := range keys {
		if badKey(e.open(ctx, "--key-hint", key)) != key {
			continue
		}
		e.Log.Warnf("target %s: several hosts have made the repository at once: removing the key %.8s, which opens nothing", e.Target.Name, key)
		// Another host may do the same, and be first.
		if err := e.run(ctx, call{args: slices.Concat(with, []string{"--json", "key", "remove", key}), alone: true}); err != nil {
			e.Log.Infof("target %s: key %.8s: %v", e.Target.Name, key, err)
		}
	}
	return e.open(ctx)
}

// goodKey finds the beginning of the key that opens the configuration. restic cannot list the keys
// without the right one, but takes the beginning of one as a hint; keys have random numbers.
func (e *Engine) goodKey(ctx context.Context, failed error) (string, error) {
	hints := strings.Split("0123456789abcdef", "")
	for tried := 0; tried < maxHints && len(hints) > 0; tried++ {
		hint := hints[0]
		hints = hints[1:]
		err := e.open(ctx, "--key-hint", hint)
		if err == nil {
			return hint, nil
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		// The good one may begin as a bad one does.
		if bad := badKey(err); strings.HasPrefix(bad, hint) {
			for _, digit := range "0123456789abcdef" {
				hints = append(hints, hint+string(digit))
			}
		}
	}
	return "", fmt.Errorf("the repository was made by several hosts at once, and none of its keys opens it: remove what is there, and try again: %w", failed)
}
