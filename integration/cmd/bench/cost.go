package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// costCommand PROCESS COMMAND... runs a command and prints a cost as JSON: that of the
// processes of the name PROCESS and of all that they start, or, if there are none, that of
// the command. A command that asks a daemon to work is not counted.
const costCommand = "cost"

// A cost is what something took.
type cost struct {
	// Seconds by the clock, and of the processors in programs and in the kernel for them.
	Seconds, CPU float64
	// Memory is the most that the processes had at once, in bytes (resident sets), less
	// what those had before that were there.
	Memory int
}

const (
	// sampleEvery is how often memory is looked at: what is shorter may be missed.
	sampleEvery = 10 * time.Millisecond
	// ticksPerSecond is the unit of times in /proc/PID/stat, the same on all systems
	// that Go runs on.
	ticksPerSecond = 100
)

// runCost is costCommand.
func runCost(ctx context.Context, args []string, w io.Writer) error {
	if len(args) < 2 {
		return fmt.Errorf("%s: want a name of processes and a command", costCommand)
	}
	name := args[0]
	before, err := takeProcesses("/proc")
	if err != nil {
		return err
	}
	there := before.below(func(_ int, p process) bool { return p.name == name })
	cmd := exec.CommandContext(ctx, args[1], args[2:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	most, last := 0, before
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-tick.C:
		}
		now, lookErr := takeProcesses("/proc")
		if lookErr != nil {
			return errors.Join(err, lookErr)
		}
		last = now
		ours := now.below(func(pid int, p process) bool {
			return p.name == name || len(there) == 0 && pid == cmd.Process.Pid
		})
		most = max(most, ours.memory())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(args[1:], " "), err)
	}
	c := cost{Seconds: time.Since(begin).Seconds(), Memory: most - there.memory()}
	if len(there) == 0 {
		c.CPU = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	}
	for pid, p := range last {
		if p.name == name {
			// What has ended below it is in its time.
			c.CPU += float64(p.ticks-before[pid].ticks) / ticksPerSecond
		}
	}
	return json.NewEncoder(w).Encode(c)
}

// A process is one line of /proc/PID/stat.
type process struct {
	name   string
	parent int
	// ticks are its time on the processors, with that of children which have ended.
	ticks int
	// memory is its resident set in bytes.
	memory int
}

// processes by their number.
type processes map[int]process

func (all processes) memory() (sum int) {
	for _, p := range all {
		sum += p.memory
	}
	return sum
}

// below are those that are chosen, and all that they have started, as far as it goes.
func (all processes) below(chosen func(pid int, p process) bool) processes {
	some := processes{}
	for pid, p := range all {
		for at, up := pid, p; ; {
			if chosen(at, up) {
				some[pid] = p
				break
			}
			at = up.parent
			var ok bool
			if up, ok = all[at]; !ok {
				break
			}
		}
	}
	return some
}

// takeProcesses reads a proc(5) file system.
func takeProcesses(proc string) (processes, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	all := processes{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, err := os.ReadFile(filepath.Join(proc, e.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		if all[pid], err = parseStat(string(text)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// parseStat reads /proc/PID/stat.
func parseStat(text string) (p process, err error) {
	// The name is in parentheses and may have any characters.
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return p, fmt.Errorf("stat: %.80q", text)
	}
	p.name = text[open+1 : end]
	fields := strings.Fields(text[end+1:])
	// Numbers of proc(5), which counts from 1 and has the name at 2.
	const (
		parent = 4
		utime  = 14
		cstime = 17
		rss    = 24
		first  = 3
	)
	if len(fields) <= rss-first {
		return p, fmt.Errorf("stat: %.80q", text)
	}
	number := func(field int) int {
		n, numberErr := strconv.Atoi(fields[field-first])
		err = errors.Join(err, numberErr)
		return n
	}
	p.parent, p.memory = number(parent), number(rss)*os.Getpagesize()
	for field := utime; field <= cstime; field++ {
		p.ticks += number(field)
	}
	return p, err
}
