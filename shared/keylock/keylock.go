// Package keylock locks by name: one lock for each network or volume, held over
// a whole operation, while other names go on.
package keylock

import (
	"context"
	"fmt"
	"sync"
)

// A Locker is a set of named locks. The zero value is not usable; see New. All
// methods may be called concurrently.
type Locker struct {
	mu    sync.Mutex
	locks map[string]*entry
}

// entry is one name's lock. The channel holds a token while the lock is free, so
// that waiting can end with a context.
type entry struct {
	token chan struct{}
	users int
}

// New returns an empty set of locks.
func New() *Locker {
	return &Locker{locks: make(map[string]*entry)}
}

// Lock waits until the name is free or ctx ends. The returned function unlocks
// and may be called more than once.
func (l *Locker) Lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	e, ok := l.locks[name]
	if !ok {
		e = &entry{token: make(chan struct{}, 1)}
		e.token <- struct{}{}
		l.locks[name] = e
	}
	e.users++
	l.mu.Unlock()

	// A context that has ended wins over a lock that is free.
	if err := ctx.Err(); err != nil {
		l.leave(name, e)
		return nil, fmt.Errorf("wait for another request on %s: %w", name, err)
	}
	select {
	case <-e.token:
		return sync.OnceFunc(func() {
			e.token <- struct{}{}
			l.leave(name, e)
		}), nil
	case <-ctx.Done():
		l.leave(name, e)
		return nil, fmt.Errorf("wait for another request on %s: %w", name, ctx.Err())
	}
}

// leave forgets the name when nobody holds or awaits it, so that the map does
// not grow with every name ever used.
func (l *Locker) leave(name string, e *entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.users--
	if e.users == 0 {
		delete(l.locks, name)
	}
}
