package ipamload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// A Load is what many clients together do with one pool.
type Load struct {
	Pool    string
	clients []*Client
}

// Open connects the clients and asks for the pool. The caller closes the load.
func Open(ctx context.Context, socket, subnet string, clients int) (*Load, error) {
	l := &Load{}
	for range clients {
		c, err := Dial(ctx, socket)
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		l.clients = append(l.clients, c)
	}
	var err error
	if l.Pool, err = l.clients[0].RequestPool(subnet); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close ends the connections. The pool stays.
func (l *Load) Close() error {
	var errs []error
	for _, c := range l.clients {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// ReleasePool gives the pool back.
func (l *Load) ReleasePool() error { return l.clients[0].ReleasePool(l.Pool) }

// each runs the work for every client at once, with the number of the client.
func (l *Load) each(work func(int, *Client) error) error {
	var group errgroup.Group
	for i, c := range l.clients {
		group.Go(func() error { return work(i, c) })
	}
	return group.Wait()
}

// Fill takes n addresses that stay taken. It is an error if one is given twice.
func (l *Load) Fill(n int) error {
	var mu sync.Mutex
	seen := make(map[string]bool, n)
	return l.each(func(i int, c *Client) error {
		for range (n + len(l.clients) - 1 - i) / len(l.clients) {
			addr, err := c.RequestAddress(l.Pool)
			if err != nil {
				return err
			}
			mu.Lock()
			twice := seen[addr]
			seen[addr] = true
			mu.Unlock()
			if twice {
				return fmt.Errorf("address %s was given twice", addr)
			}
		}
		return nil
	})
}

// A Result is how fast addresses were taken and given back.
type Result struct {
	// PerSecond counts pairs of a request and a release.
	PerSecond float64
	// Median and P99 are of single calls, in seconds. With a rate they count from the
	// moment that the call was due.
	Median, P99 float64
}

// Pairs takes and gives back addresses for a time, with all clients at once: as fast as
// they are answered, or rate pairs a second if that is not 0.
func (l *Load) Pairs(duration time.Duration, rate int) (Result, error) {
	times := make([][]float64, len(l.clients))
	begin := time.Now()
	err := l.each(func(i int, c *Client) error {
		due := begin
		step := time.Duration(0)
		if rate > 0 {
			step = time.Second * time.Duration(len(l.clients)) / time.Duration(rate)
			due = begin.Add(step * time.Duration(i) / time.Duration(len(l.clients)))
		}
		for ; time.Since(begin) < duration; due = due.Add(step) {
			time.Sleep(time.Until(due))
			if rate == 0 {
				due = time.Now()
			}
			addr, err := c.RequestAddress(l.Pool)
			if err != nil {
				return err
			}
			middle := time.Now()
			if err := c.ReleaseAddress(l.Pool, addr); err != nil {
				return err
			}
			times[i] = append(times[i], middle.Sub(due).Seconds(), time.Since(middle).Seconds())
		}
		return nil
	})
	took := time.Since(begin).Seconds()
	all := slices.Sorted(slices.Values(slices.Concat(times...)))
	if err != nil || len(all) == 0 {
		return Result{}, err
	}
	const calls = 2
	return Result{PerSecond: float64(len(all)) / calls / took, Median: all[len(all)/2], P99: all[len(all)*99/100]}, nil
}

// Recovery waits until another process of the name runs than did, and returns how long
// after its start, in seconds, it answered a request for an address of the pool. Kill
// the first after ready was closed. The kernel counts starts in hundredths of a second.
func Recovery(ctx context.Context, dir, process, pool string, ready chan<- struct{}) (float64, error) {
	old, err := processes(process)
	if err != nil || len(old) == 0 {
		return 0, fmt.Errorf("no process %s: %w", process, err)
	}
	close(ready)
	for ctx.Err() == nil {
		now, err := processes(process)
		if err != nil {
			return 0, err
		}
		now = slices.DeleteFunc(now, func(pid int) bool { return slices.Contains(old, pid) })
		if len(now) > 0 {
			if seconds, ok := answered(ctx, dir, now[0], pool); ok {
				return seconds, nil
			}
		}
		time.Sleep(time.Millisecond)
	}
	return 0, ctx.Err()
}

func answered(ctx context.Context, dir string, pid int, pool string) (float64, bool) {
	socket, err := Find(ctx, dir)
	if err != nil {
		return 0, false
	}
	c, err := Dial(ctx, socket)
	if err != nil {
		return 0, false
	}
	defer func() { _ = c.Close() }()
	if _, err := c.RequestAddress(pool); err != nil {
		return 0, false
	}
	age, err := processAge(pid)
	return age, err == nil
}

// processes finds those of a name.
func processes(name string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	var found []int
	for _, f := range files {
		// One that ends meanwhile is none.
		if text, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(text)) == name {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
				found = append(found, pid)
			}
		}
	}
	return found, nil
}

// processAge is the time since a process was started, in seconds.
func processAge(pid int) (float64, error) {
	const (
		startField     = 22 // of proc(5)'s stat, counted from 1
		ticksPerSecond = 100
	)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the name in brackets, may have blanks.
	fields := strings.Fields(string(text)[strings.LastIndexByte(string(text), ')')+1:])
	if len(fields) < startField-2 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	ticks, err := strconv.ParseFloat(fields[startField-3], 64)
	if err != nil {
		return 0, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, err
	}
	return float64(now.Nano())/float64(time.Second) - ticks/ticksPerSecond, nil
}
