// Package apply carries out what a mode has planned for the host.
package apply

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// undoTimeout bounds the way back, which also runs when the request's own time is
// up.
const undoTimeout = 5 * time.Second

// An Inverse undoes a step.
type Inverse func(context.Context) error

// Run does the steps in order. After an error it undoes what it has done, in reverse,
// and returns all errors; none is begun when ctx has ended. The inverse that do returns
// is nil when nothing was made; it may come with an error, when something was half made.
func Run[S fmt.Stringer](ctx context.Context, steps []S, do func(context.Context, S) (Inverse, error)) error {
	var undo []Inverse
	for _, s := range steps {
		err := ctx.Err()
		if err == nil {
			var inverse Inverse
			inverse, err = do(ctx, s)
			if inverse != nil {
				undo = append(undo, inverse)
			}
		}
		if err == nil {
			continue
		}
		errs := []error{fmt.Errorf("%s: %w", s, err)}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		for i := len(undo) - 1; i >= 0; i-- {
			if err := undo[i](ctx); err != nil {
				errs = append(errs, fmt.Errorf("undo: %w", err))
			}
		}
		return errors.Join(errs...)
	}
	return nil
}
