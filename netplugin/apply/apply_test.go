package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"gotest.tools/v3/assert"
)

type step string

func (s step) String() string { return string(s) }

func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var done []string
	// made are steps that have made something.
	do := func(made, failing, ending string) func(context.Context, step) (Inverse, error) {
		done = nil
		return func(_ context.Context, s step) (inverse Inverse, err error) {
			done = append(done, string(s))
			if slices.Contains([]rune(made), []rune(s)[0]) {
				inverse = func(ctx context.Context) error {
					assert.NilError(t, ctx.Err(), "the way back has time of its own")
					done = append(done, "-"+string(s))
					if s == "b" {
						return errors.New("b stays")
					}
					return nil
				}
			}
			if string(s) == failing {
				err = fmt.Errorf("no %s", s)
			}
			if string(s) == ending {
				cancel()
			}
			return inverse, err
		}
	}
	all := []step{"a", "b", "c"}
	assert.NilError(t, Run(ctx, all, do("abc", "", "")))
	assert.DeepEqual(t, done, []string{"a", "b", "c"})

	// What failed may have been half made.
	assert.Error(t, Run(ctx, all, do("ac", "c", "")), "c: no c")
	assert.DeepEqual(t, done, []string{"a", "b", "c", "-c", "-a"})
	assert.Error(t, Run(ctx, all, do("ab", "c", "")), "c: no c\nundo: b stays")
	assert.DeepEqual(t, done, []string{"a", "b", "c", "-b", "-a"})

	err := Run(ctx, all, do("a", "", "a"))
	assert.ErrorIs(t, err, context.Canceled)
	assert.ErrorContains(t, err, "b: ")
	assert.DeepEqual(t, done, []string{"a", "-a"})
}
