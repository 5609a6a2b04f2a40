package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// treeCommand [-files NUMBER] [-megabytes NUMBER] DIR makes a directory tree.
const treeCommand = "tree"

// treeSettings are those of the part "snapshots".
type treeSettings struct {
	files, megabytes int
}

// A storage is what a volume is kept in.
type storage struct {
	title string
	// volumesOn is lab.Options'.
	volumesOn string
	options   []string
	// copies: a snapshot is a copy, whose files have other inodes.
	copies bool
	// backups are compared with those by restic alone.
	backups bool
	// copy is the command that a snapshot is compared with.
	copy []string
}

func storages() []storage {
	return []storage{
		{"ext4, engine dir", "", []string{"-o", "engine=dir"}, true, true, []string{"cp", "-a"}},
		{"xfs, engine reflink", "xfs", []string{"-o", "engine=reflink"}, true, false, []string{"cp", "-a", "--reflink=always"}},
		{"btrfs, engine btrfs", "btrfs", []string{"-o", "engine=btrfs"}, false, true, []string{"cp", "-a", "--reflink=always"}},
		{"ext4, engine image with btrfs inside", "", []string{"-o", "engine=image", "-o", "fs=btrfs", "-o", "size=2G"}, false, false, nil},
	}
}

// makeTree is treeCommand. Files are of all sizes, most of them small.
func makeTree(_ context.Context, args []string) error {
	f := flag.NewFlagSet(treeCommand, flag.ContinueOnError)
	files := f.Int("files", 1000, "`NUMBER` of files")
	megabytes := f.Int("megabytes", 10, "`NUMBER` of megabytes in them")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 1 || *files < 1 {
		return fmt.Errorf("%s: want files and one directory", treeCommand)
	}
	const (
		inDirectory = 100
		// One file in so many is large, and they share half of all bytes.
		large = 1000
	)
	total := *megabytes * 1_000_000
	larges := (*files + large - 1) / large
	largeSize, smallSize := total/2/larges, total/2 / *files
	noise := make([]byte, max(largeSize, smallSize*2, 1))
	for i := range noise {
		noise[i] = byte(i * 7 >> (i % 5))
	}
	for i := range *files {
		dir := filepath.Join(f.Arg(0), strconv.Itoa(i/inDirectory/inDirectory), strconv.Itoa(i/inDirectory))
		if i%inDirectory == 0 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		size := smallSize * (i % 3) // 0, 1 or 2 times what the small ones have on average
		if i%large == 0 {
			size = largeSize
		}
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), noise[:size], 0o644); err != nil {
			return err
		}
	}
	return nil
}

// usualSnapshots is how often a snapshot is made of each kind of storage.
const usualSnapshots = 3

// measureSnapshots makes snapshots of one tree in each kind of storage.
func measureSnapshots(ctx context.Context, s settings) (*report, error) {
	if s.same {
		return nil, errors.New("-same: Docker's own driver has no snapshots, leave it out")
	}
	r := &report{}
	for _, kind := range storages() {
		progress("snapshots: %s", kind.title)
		table, version, err := snapshotsOn(ctx, s, kind)
		if version != "" {
			r.Engine = version
		}
		if table != nil {
			r.Tables = append(r.Tables, table)
		}
		if err != nil {
			return r, fmt.Errorf("%s: %w", kind.title, err)
		}
	}
	return r, nil
}

func snapshotsOn(ctx context.Context, s settings, kind storage) (g *grid, version string, err error) {
	t, err := newSite(ctx, "snap", s, siteOptions{plugins: []string{"berth-vol"}, volumesOn: kind.volumesOn})
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	run := func(argv ...string) error {
		_, err := t.host.Exec(ctx, argv...)
		return err
	}
	driver := t.sides()[0].volume
	for _, name := range []string{"tree", "other"} {
		argv := append([]string{"docker", "volume", "create", "-d", driver}, kind.options...)
		if err := run(append(argv, name)...); err != nil {
			return nil, t.version, err
		}
	}
	// By a container, as users fill volumes.
	if err := run("docker", "run", "--rm", "--network", "none", "-v", "tree:/x", "-v", self(t.host)+":/bench:ro", "busybox",
		"/bench", treeCommand, "-files", strconv.Itoa(s.tree.files), "-megabytes", strconv.Itoa(s.tree.megabytes), "/x"); err != nil {
		return nil, t.version, err
	}
	if err := run("sync"); err != nil {
		return nil, t.version, err
	}
	g = &grid{Title: fmt.Sprintf("%s; %d files, %d MB:", kind.title, s.tree.files, s.tree.megabytes), Columns: []string{"Berth"}}
	if kind.copy != nil {
		g.Columns = append(g.Columns, fmt.Sprint("`", kind.copy, "`"))
	}
	const volumes = "/var/lib/berth/volumes"
	for round := range s.roundsOr(usualSnapshots) {
		timed := func(work string, column int, argv ...string) error {
			seconds, err := took(func() error { return run(argv...) })
			if err == nil {
				g.add(work, inSeconds, column, seconds)
			}
			return err
		}
		for _, i := range turns(round) {
			var err error
			switch {
			case i == 0:
				err = timed("snapshot", 0, "docker", "berth", "snapshot", "create", "tree", "snap")
				if err == nil {
					err = timed("clone", 0, "docker", "berth", "volume", "clone", "tree@snap", "clone")
				}
				if err == nil {
					err = timed("removal of the snapshot", 0, "docker", "berth", "snapshot", "rm", "tree@snap")
				}
				if err == nil {
					err = timed("`docker volume rm` of the clone", 0, "docker", "volume", "rm", "clone")
				}
			case kind.copy != nil:
				argv := append(append([]string{}, kind.copy...), volumes+"/tree", volumes+"/.copy")
				// As the snapshot, the copy is on disk at the end.
				err = timed("snapshot", 1, "sh", "-c", shellJoin(argv)+" && sync -f "+volumes)
				if err == nil {
					err = timed("removal of the snapshot", 1, "rm", "-r", volumes+"/.copy")
				}
			}
			if err != nil {
				return g, t.version, err
			}
		}
	}
	return g, t.version, t.getsDuringSnapshot(ctx, g)
}

// shellJoin is for words that need no quotes.
func shellJoin(argv []string) string {
	out := ""
	for _, a := range argv {
		out += a + " "
	}
	return out
}

// getsDuringSnapshot asks for one volume while a snapshot of another is made.
func (t *site) getsDuringSnapshot(ctx context.Context, g *grid) error {
	const enough = 5 * time.Second
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- t.runSelf(ctx, in, volumeGetsCommand, "-for", enough.String(), "other")
		_ = in.Close()
	}()
	decoded := make(chan error, 1)
	var times []float64
	go func() { decoded <- json.NewDecoder(out).Decode(&times) }()
	for i := 0; ; i++ {
		if _, err := t.host.Exec(ctx, "docker", "berth", "snapshot", "create", "tree", fmt.Sprintf("s%d", i)); err != nil {
			return err
		}
		select {
		case err := <-ended:
			if err := errors.Join(err, <-decoded); err != nil {
				return err
			}
			g.add("Get of another volume meanwhile, median", inSeconds, 0, middle(times))
			g.add("Get of another volume meanwhile, 99 of 100", inSeconds, 0, quantile(times, 0.99))
			return nil
		default:
		}
	}
}
