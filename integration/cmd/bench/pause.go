package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// ticksCommand FILE writes the time to a file each millisecond until SIGTERM, and prints
// the longest time between two as seconds.
const ticksCommand = "ticks"

// runTicks is ticksCommand. It is the application of a container that stands still while
// a snapshot of its volume is made.
func runTicks(_ context.Context, args []string, w io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("%s: want a file", ticksCommand)
	}
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	begin := time.Now()
	last, longest := begin, time.Duration(0)
	for {
		select {
		case <-end:
			return json.NewEncoder(w).Encode(longest.Seconds())
		case <-tick.C:
		}
		if err := binary.Write(f, binary.LittleEndian, int64(time.Since(begin))); err != nil {
			return err
		}
		now := time.Now()
		longest, last = max(longest, now.Sub(last)), now
	}
}

// pauses measures how long an application stands still while its volume is backed up to
// a target: a container with the label for a pause, and one without.
func (b backupBench) pauses(g *grid, column, rounds int) error {
	const target = "pause"
	if err := b.addTarget(target); err != nil {
		return err
	}
	for _, labels := range [][]string{{"--label", "berth.backup.pause=true"}, nil} {
		work := "longest time between two writes, paused"
		if labels == nil {
			work = "the same without the label"
		}
		for range rounds {
			longest, err := b.pause(labels, target)
			if err != nil {
				return err
			}
			g.add(work, inSeconds, column, longest)
		}
	}
	return nil
}

func (b backupBench) pause(labels []string, target string) (float64, error) {
	const name = "ticks"
	words := append([]string{"docker", "run", "-d", "--name", name, "--stop-signal", "TERM", "--network", "none", "-v", "tree:/x", "-v", self(b.host) + ":/bench:ro"}, labels...)
	if err := b.run(append(words, "busybox", "/bench", ticksCommand, "/x/ticks")...); err != nil {
		return 0, err
	}
	err := b.run("docker", "berth", "backup", "create", "tree", "--target", target)
	if err == nil {
		err = b.run("docker", "stop", name)
	}
	if err != nil {
		return 0, err
	}
	res, err := b.host.Exec(b.ctx, "docker", "logs", name)
	if err != nil {
		return 0, err
	}
	line, _, _ := bufio.NewReader(strings.NewReader(res.Stdout)).ReadLine()
	var longest float64
	if err := json.Unmarshal(line, &longest); err != nil {
		return 0, fmt.Errorf("%s: %w: %.200q", ticksCommand, err, res.Stdout+res.Stderr)
	}
	return longest, b.run("docker", "rm", "-f", name)
}
