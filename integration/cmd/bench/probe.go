package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// probeCommand makes this program look at the host that it runs in.
const probeCommand = "probe"

// A footprint is what a host's processes take.
type footprint struct {
	// Processes are all of the host's, those of containers included.
	Processes int
	// PSS and RSS are the memory in bytes, and Files the open descriptors, of
	// dockerd, its proxies and berthd together.
	PSS, RSS, Files int
	// Kernel is the memory in bytes of sockets and open files, of the whole
	// machine. The kernel counts no other way.
	Kernel int
}

// networkers are the processes whose memory is counted: the kernel cuts names at
// 15 bytes.
var networkers = map[string]bool{"dockerd": true, "docker-proxy": true, "berthd": true}

// socketCaches are the kernel's caches for what a socket consists of.
var socketCaches = map[string]bool{
	"TCP": true, "TCPv6": true, "UDP": true, "UDPv6": true, "sock_inode_cache": true, "filp": true,
}

// footprint looks at the site's host.
func (t *site) footprint(ctx context.Context) (footprint, error) {
	res, err := t.host.Exec(ctx, self(t.host), probeCommand)
	if err != nil {
		return footprint{}, err
	}
	var f footprint
	return f, json.Unmarshal([]byte(res.Stdout), &f)
}

// settled looks at the host when what was there before has let go of its files.
func (t *site) settled(ctx context.Context) (footprint, error) {
	const (
		pause = 200 * time.Millisecond
		most  = 25
	)
	last, err := t.footprint(ctx)
	for range most {
		if err != nil {
			break
		}
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-time.After(pause):
		}
		var now footprint
		if now, err = t.footprint(ctx); now.Files == last.Files && now.Processes == last.Processes {
			return now, err
		}
		last = now
	}
	return last, err
}

// printFootprint is the part that runs inside.
func printFootprint(w io.Writer) error {
	f, err := takeFootprint("/proc")
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(f)
}

// takeFootprint reads a proc(5) file system, without the calling process.
func takeFootprint(proc string) (footprint, error) {
	var f footprint
	entries, err := os.ReadDir(proc)
	if err != nil {
		return f, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		err = f.addProcess(filepath.Join(proc, e.Name()))
		// A process may end at any time.
		if err != nil && !errors.Is(err, os.ErrNotExist) && !strings.Contains(err.Error(), "no such process") {
			return f, err
		}
	}
	slab, err := os.Open(filepath.Join(proc, "slabinfo"))
	if err != nil {
		return f, err
	}
	defer slab.Close()
	f.Kernel, err = slabBytes(slab)
	return f, err
}

func (f *footprint) addProcess(dir string) error {
	comm, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return err
	}
	f.Processes++
	if !networkers[strings.TrimSpace(string(comm))] {
		return nil
	}
	rollup, err := os.Open(filepath.Join(dir, "smaps_rollup"))
	if err != nil {
		return err
	}
	defer rollup.Close()
	pss, rss, err := rollupBytes(rollup)
	if err != nil {
		return err
	}
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return err
	}
	f.PSS, f.RSS, f.Files = f.PSS+pss, f.RSS+rss, f.Files+len(files)
	return nil
}

// rollupBytes reads /proc/PID/smaps_rollup.
func rollupBytes(r io.Reader) (pss, rss int, err error) {
	scan := bufio.NewScanner(r)
	for scan.Scan() {
		fields := strings.Fields(scan.Text())
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		n, err := strconv.Atoi(fields[1])
		if err != nil {
			return 0, 0, fmt.Errorf("smaps_rollup: %w", err)
		}
		switch fields[0] {
		case "Pss:":
			pss = n << 10
		case "Rss:":
			rss = n << 10
		}
	}
	return pss, rss, scan.Err()
}

// slabBytes reads slabinfo(5): what is in use of the caches that sockets need.
func slabBytes(r io.Reader) (int, error) {
	total := 0
	scan := bufio.NewScanner(r)
	for scan.Scan() {
		fields := strings.Fields(scan.Text())
		if len(fields) < 4 || !socketCaches[fields[0]] {
			continue
		}
		objects, err := strconv.Atoi(fields[1])
		if err != nil {
			return 0, fmt.Errorf("slabinfo: %w", err)
		}
		size, err := strconv.Atoi(fields[3])
		if err != nil {
			return 0, fmt.Errorf("slabinfo: %w", err)
		}
		total += objects * size
	}
	return total, scan.Err()
}
