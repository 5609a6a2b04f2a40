// Package fault gives the kinds of error that Berth tells apart. A kind decides
// the HTTP status of a plugin answer and the word in the log; the text is all
// that a user sees. Kinds are those of github.com/containerd/errdefs, so
// errdefs.IsNotFound and its siblings work on every error made here.
//
// It does not know HTTP: the mapping to statuses is in shared/pluginapi.
package fault

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// kindError carries a kind without showing it in the text.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.kind, e.error} }

func newKind(kind error, format string, args ...any) error {
	return &kindError{error: fmt.Errorf(format, args...), kind: kind}
}

// Invalid says that the request itself is wrong. The text names the option, its
// value and what is allowed. Nothing has been changed.
func Invalid(format string, args ...any) error {
	return newKind(errdefs.ErrInvalidArgument, format, args...)
}

// NotFound says that the object was looked for and is certainly not there.
func NotFound(format string, args ...any) error {
	return newKind(errdefs.ErrNotFound, format, args...)
}

// Conflict says that the object exists with other properties, or is in use.
func Conflict(format string, args ...any) error {
	return newKind(errdefs.ErrConflict, format, args...)
}

// Exhausted says that a pool, a range or a disk has no room left.
func Exhausted(format string, args ...any) error {
	return newKind(errdefs.ErrResourceExhausted, format, args...)
}

// Unavailable says that something Berth needs does not answer now (storage that
// is away, state that is damaged); the same request may succeed later.
func Unavailable(format string, args ...any) error {
	return newKind(errdefs.ErrUnavailable, format, args...)
}

// Kind is one word for logs and counters: "ok", "invalid", "notfound",
// "conflict", "exhausted", "unavailable", "timeout" or "internal".
func Kind(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errdefs.IsInvalidArgument(err):
		return "invalid"
	case errdefs.IsNotFound(err):
		return "notfound"
	case errdefs.IsConflict(err), errdefs.IsAlreadyExists(err):
		return "conflict"
	case errdefs.IsResourceExhausted(err):
		return "exhausted"
	case errdefs.IsUnavailable(err):
		return "unavailable"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return "timeout"
	default:
		return "internal"
	}
}
