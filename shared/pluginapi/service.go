package pluginapi

import (
	"context"
	"sync"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Service hands requests to a driver once there is one. dockerd takes a plugin
// for failed when its socket does not accept within about ten seconds, and
// opening the state and recovering may take longer, so the socket is served first
// and requests wait here. All methods may be called concurrently.
type Service[D any] struct {
	mu      sync.Mutex    // guards all following fields
	changed chan struct{} // closed at the next Set or Refuse
	ready   bool
	driver  D
	refusal error
}

// NewService returns a Service whose requests wait.
func NewService[D any]() *Service[D] {
	return &Service[D]{changed: make(chan struct{})}
}

// Set gives the driver; requests go on.
func (s *Service[D]) Set(driver D) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.driver, s.ready, s.refusal = driver, true, nil
	s.announceLocked()
}

// Refuse answers every request with the reason why there is no driver, until Set
// gives one.
func (s *Service[D]) Refuse(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready, s.refusal = false, reason
	s.announceLocked()
}

func (s *Service[D]) announceLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// wait returns the driver, the reason why there is none, or that of waiting in
// vain when ctx ends.
func (s *Service[D]) wait(ctx context.Context) (D, error) {
	for {
		s.mu.Lock()
		driver, ready, refusal, changed := s.driver, s.ready, s.refusal, s.changed
		s.mu.Unlock()
		if ready || refusal != nil {
			return driver, refusal
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return driver, fault.Unavailable("berthd is still recovering its state; try again")
		}
	}
}
