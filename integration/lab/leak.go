package lab

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
	"go.etcd.io/bbolt"
)

// A Snapshot is what a host's kernel, engine and plugins hold, by section; each
// entry is one line of text. Counters, numbers and times are left out.
type Snapshot map[string][]string

// A probe fills one section of a snapshot.
type probe struct {
	section string
	argv    []string
	// keep turns a line of the command's output into an entry; "" drops it.
	keep func(string) string
}

// probes run inside the host, with the programs of the engine's own root.
func probes() []probe {
	rules := func(line string) string {
		if strings.HasPrefix(line, "#") {
			return ""
		}
		return counters.ReplaceAllString(line, "")
	}
	list := []probe{
		{"links", []string{"ip", "-o", "link"}, linkName},
		{"routes", []string{"ip", "-o", "route", "show", "table", "all"}, routeEntry},
		// Docker's own files below /run/docker/netns are collected only every
		// minute; a namespace that is still held shows among the mounts.
		{"namespaces", []string{"find", "/run/netns", "-type", "f"}, strings.TrimSpace},
		{"mounts", []string{"cat", "/proc/self/mountinfo"}, mountEntry},
		{"nftables", []string{"nft", "-s", "list", "tables"}, strings.TrimSpace},
		{"processes", []string{"busybox", "ps", "-o", "comm"}, processName},
		{"plugin sockets", []string{"find", "/run/docker/plugins", "-maxdepth", "1", "-name", "*.sock"}, strings.TrimSpace},
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"nft", "legacy"} {
			list = append(list, probe{family + "-" + variant, []string{family + "-" + variant + "-save"}, rules})
		}
	}
	return list
}

var (
	counters = regexp.MustCompile(`\s*\[\d+:\d+\]`)
	longID   = regexp.MustCompile(`[0-9a-f]{64}`)
	linkLine = regexp.MustCompile(`^\d+: ([^:@]+)[:@]`)
)

func linkName(line string) string {
	if m := linkLine.FindStringSubmatch(line); m != nil {
		return m[1]
	}
	return line
}

// routeEntry drops the routes that the kernel makes with an address.
func routeEntry(line string) string {
	if strings.Contains(line, " proto kernel ") {
		return ""
	}
	return strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(line), "linkdown"))
}

// mountEntry keeps a mount's root, point and type. A plugin that was removed and
// installed again has another ID and is the same to a user. The host's own network
// namespace stays mounted after the first container with --network host.
func mountEntry(line string) string {
	f := strings.Fields(line)
	if len(f) > 5 && f[4] == "/run/docker/netns/default" {
		return ""
	}
	if i := slices.Index(f, "-"); len(f) > 5 && i > 0 && i+1 < len(f) {
		return longID.ReplaceAllString(f[4]+" from "+f[3]+" type "+f[i+1], "ID")
	}
	return line
}

// processName drops what is only there because somebody looks.
func processName(line string) string {
	switch name := strings.TrimSpace(line); name {
	case "COMMAND", "busybox", "ps":
		return ""
	default:
		return name
	}
}

// Snapshot looks at all of the host. The engine must run unless the host has none.
func (h *Host) Snapshot(ctx context.Context) (Snapshot, error) {
	snap := Snapshot{}
	for _, p := range probes() {
		res, err := h.Exec(ctx, p.argv...)
		if err != nil && p.argv[0] != "find" {
			return nil, fmt.Errorf("snapshot of %s: %w", h.Name, err)
		}
		for _, line := range strings.Split(res.Stdout, "\n") {
			if entry := p.keep(line); entry != "" {
				snap[p.section] = append(snap[p.section], entry)
			}
		}
	}
	if !h.opts.NoEngine {
		if err := h.engineEntries(ctx, snap); err != nil {
			return nil, fmt.Errorf("snapshot of %s: %w", h.Name, err)
		}
	}
	ruleset, err := h.Exec(ctx, "nft", "-s", "list", "ruleset")
	if err != nil {
		return nil, fmt.Errorf("snapshot of %s: %w", h.Name, err)
	}
	snap["nftables"] = append(snap["nftables"], rulesetEntries(ruleset.Stdout)...)
	if snap["records"], err = h.records(); err != nil {
		return nil, err
	}
	snap["data"], err = h.dataEntries()
	return snap, err
}

// engineEntries adds the names of containers, networks and volumes. It asks the engine
// itself: three more commands would take longer than all others.
func (h *Host) engineEntries(ctx context.Context, snap Snapshot) error {
	c, err := h.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	containers, err := c.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return err
	}
	for _, one := range containers {
		for _, name := range one.Names {
			snap["containers"] = append(snap["containers"], strings.TrimPrefix(name, "/"))
		}
	}
	networks, err := c.NetworkList(ctx, network.ListOptions{})
	if err != nil {
		return err
	}
	for _, one := range networks {
		snap["networks"] = append(snap["networks"], one.Name)
	}
	volumes, err := c.VolumeList(ctx, volume.ListOptions{})
	if err != nil {
		return err
	}
	for _, one := range volumes.Volumes {
		snap["volumes"] = append(snap["volumes"], one.Name)
	}
	return nil
}

// rulesetEntries gives every line of `nft list ruleset` its table and chain.
// Tables of iptables-nft are left to iptables-save, which orders them better.
func rulesetEntries(text string) []string {
	var entries []string
	var path []string
	for _, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasSuffix(line, "{"):
			path = append(path, strings.TrimSuffix(line, " {"))
			entries = append(entries, strings.Join(path, " / "))
		case line == "}":
			path = path[:max(0, len(path)-1)]
		default:
			entries = append(entries, strings.Join(append(slices.Clone(path), line), " / "))
		}
	}
	return slices.DeleteFunc(entries, func(e string) bool {
		table, _, _ := strings.Cut(e, " / ")
		f := strings.Fields(table)
		return len(f) == 3 && (f[1] == "ip" || f[1] == "ip6") &&
			slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, f[2])
	})
}

// kept is what stays of a repository that was used, for the next time.
var kept = regexp.MustCompile(`^vol/backup/(cache|leases)/`)

// records counts the keys of every bucket in Berth's databases, and other files of
// its state. The database is read from a copy, since its owner holds its lock.
func (h *Host) records() ([]string, error) {
	root := filepath.Join(h.Dir, "disk", "berth")
	var entries []string
	for _, part := range []string{"net", "vol"} {
		err := walkFiles(filepath.Join(root, part), func(path string) error {
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			if kept.MatchString(rel) {
				return nil
			}
			if filepath.Ext(path) != ".db" {
				entries = append(entries, "file "+rel)
				return nil
			}
			counts, err := countKeys(path)
			for _, c := range counts {
				entries = append(entries, rel+" "+c)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return entries, nil
}

// dataEntries lists the volumes and their records. The trash is left out: keeping
// removed volumes is what it is for.
func (h *Host) dataEntries() ([]string, error) {
	root := filepath.Join(h.Dir, "disk", "berth", "volumes")
	var entries []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		rel, relErr := filepath.Rel(root, path)
		if err != nil || relErr != nil || rel == "." {
			return err
		}
		if d.IsDir() && d.Name() == "trash" {
			return fs.SkipDir
		}
		entries = append(entries, rel)
		// Of the volumes only the names count, not what is in them.
		if d.IsDir() && !strings.HasPrefix(rel, ".berth") {
			return fs.SkipDir
		}
		return nil
	})
	return entries, err
}

func walkFiles(dir string, visit func(string) error) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		return visit(path)
	})
}

// countKeys gives "BUCKET: N keys" for a bbolt file, empty buckets left out.
func countKeys(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	tmp, err := os.CreateTemp("", "berth-lab-*.db")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	defer tmp.Close()
	if _, err := tmp.Write(text); err != nil {
		return nil, err
	}
	db, err := bbolt.Open(tmp.Name(), 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer func() { _ = db.Close() }()
	var counts []string
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if n := b.Stats().KeyN; n > 0 && string(name) != "meta" {
				counts = append(counts, fmt.Sprintf("%s: %d keys", name, n))
			}
			return nil
		})
	})
	return counts, err
}

// Diff lists what after has and before has not ("+"), and rules that went away
// ("-"): Berth must not take what is not its own.
func (before Snapshot) Diff(after Snapshot) []string {
	var lines []string
	for _, section := range sortedKeys(before, after) {
		more, fewer := difference(before[section], after[section])
		for _, e := range more {
			lines = append(lines, "+ "+section+": "+e)
		}
		if strings.Contains(section, "tables") || section == "links" {
			for _, e := range fewer {
				lines = append(lines, "- "+section+": "+e)
			}
		}
	}
	return lines
}

func sortedKeys(snaps ...Snapshot) []string {
	var keys []string
	for _, s := range snaps {
		for k := range s {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// difference compares two lists in which order does not count but repetition does.
func difference(before, after []string) (more, fewer []string) {
	counts := map[string]int{}
	for _, e := range before {
		counts[e]++
	}
	for _, e := range after {
		if counts[e] == 0 {
			more = append(more, e)
		} else {
			counts[e]--
		}
	}
	for e, n := range counts {
		for range n {
			fewer = append(fewer, e)
		}
	}
	slices.Sort(fewer)
	return more, fewer
}

// WaitClean compares the host with an earlier snapshot until nothing is left over
// or the time is up, and returns what is left.
func (h *Host) WaitClean(ctx context.Context, before Snapshot, within time.Duration) ([]string, error) {
	deadline := time.Now().Add(within)
	for {
		now, err := h.Snapshot(ctx)
		if err != nil {
			return nil, err
		}
		left := before.Diff(now)
		if len(left) == 0 || time.Now().After(deadline) {
			return left, nil
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return left, err
		}
	}
}

// WriteState writes what the host looks like to log/state.txt, for KeepLogs.
func (h *Host) WriteState(ctx context.Context) error {
	f, err := os.Create(filepath.Join(h.Dir, "log", "state.txt"))
	if err != nil {
		return err
	}
	defer f.Close()
	for _, argv := range [][]string{
		{"ps", "ax"}, {"ip", "addr"}, {"ip", "route"}, {"ip", "-6", "route"}, {"nft", "list", "ruleset"},
		{"iptables-nft-save", "-c"}, {"iptables-legacy-save", "-c"}, {"cat", "/proc/self/mountinfo"},
		{"docker", "ps", "-a"}, {"docker", "network", "ls"}, {"docker", "volume", "ls"}, {"docker", "plugin", "ls"},
	} {
		fmt.Fprintf(f, "$ %s\n", strings.Join(argv, " "))
		if _, err := h.Run(ctx, Command{Argv: argv, Stdout: f, Stderr: f}); err != nil {
			fmt.Fprintln(f, err)
		}
	}
	return nil
}
