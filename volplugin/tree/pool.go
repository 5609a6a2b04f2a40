package tree

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
)

// maxWorkers bounds what a caller may ask for.
const maxWorkers = 64

// workers is how many work at a time when the caller does not say. More than the
// processors have to do help where the disk is slow.
func workers(asked int) int {
	if asked <= 0 {
		asked = min(runtime.GOMAXPROCS(0)+1, 8)
	}
	return min(asked, maxWorkers)
}

// A node is a directory on the way. It has no descriptor.
type node struct {
	parent *node // nil for the top
	name   string
}

// path from the top, "" for the top itself.
func (n *node) path() string {
	size := 0
	for at := n; at.parent != nil; at = at.parent {
		size += len(at.name) + 1
	}
	if size == 0 {
		return ""
	}
	buf := make([]byte, size-1)
	end := len(buf)
	for at := n; at.parent != nil; at = at.parent {
		end -= len(at.name)
		copy(buf[end:], at.name)
		if end--; end >= 0 {
			buf[end] = '/'
		}
	}
	return string(buf)
}

// A pool has jobs done by several workers, the newest first, so that a tree is
// walked into its depth and few jobs wait. Urgent jobs go before all others.
type pool[J any] struct {
	mu     sync.Mutex
	wake   *sync.Cond
	jobs   []J
	urgent []J
	busy   int
	err    error
	closed bool
	// ended is set when an error has closed the pool.
	ended atomic.Bool
}

// errEnded is what a job returns that was cut short because another has failed.
var errEnded = errors.New("ended")

// run does the first job and all that come of it, with as many workers as do has
// elements, and returns the first error. Every worker has a function of its own, called
// by one goroutine.
func run[J any](ctx context.Context, first J, do []func(J) error, p *pool[J]) error {
	p.wake = sync.NewCond(&p.mu)
	p.jobs = append(p.jobs, first)
	stop := context.AfterFunc(ctx, func() { p.fail(ctx.Err()) })
	defer stop()
	var all sync.WaitGroup
	for _, work := range do {
		all.Go(func() {
			for {
				job, ok := p.next()
				if !ok {
					return
				}
				if err := work(job); err != nil {
					p.fail(err)
				}
				p.done()
			}
		})
	}
	all.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *pool[J]) next() (job J, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if p.closed {
			return job, false
		}
		stack := &p.urgent
		if len(*stack) == 0 {
			stack = &p.jobs
		}
		if last := len(*stack) - 1; last >= 0 {
			job = (*stack)[last]
			var none J
			(*stack)[last] = none
			*stack = (*stack)[:last]
			p.busy++
			return job, true
		}
		if p.busy == 0 {
			p.closed = true
			p.wake.Broadcast()
			return job, false
		}
		p.wake.Wait()
	}
}

func (p *pool[J]) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy--; p.busy == 0 && len(p.jobs)+len(p.urgent) == 0 {
		p.wake.Broadcast()
	}
}

func (p *pool[J]) push(jobs ...J) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.jobs = append(p.jobs, jobs...)
	p.signal(len(jobs))
}

func (p *pool[J]) pushUrgent(jobs ...J) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.urgent = append(p.urgent, jobs...)
	p.signal(len(jobs))
}

func (p *pool[J]) signal(n int) {
	for range min(n, maxWorkers) {
		p.wake.Signal()
	}
}

// fail ends the pool: no further job begins.
func (p *pool[J]) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
	p.closed = true
	p.ended.Store(true)
	p.wake.Broadcast()
}
