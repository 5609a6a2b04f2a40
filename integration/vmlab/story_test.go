package vmlab

import (
	"testing"
	"time"
)

// A chapter of a story about S goes on where the one before it has ended.
type chapter[S any] struct {
	name string
	tell func(S, *testing.T)
}

// tell tells the chapters in their order, each as a test of its own; on is the story for
// that test. It ends with the first that fails.
func tell[S any](t *testing.T, on func(*testing.T) S, chapters []chapter[S]) {
	for _, c := range chapters {
		began := time.Now()
		if !t.Run(c.name, func(t *testing.T) { c.tell(on(t), t) }) {
			return // the next would stumble over what this one left
		}
		t.Logf("%.1f s: %s", time.Since(began).Seconds(), c.name)
	}
}
