package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The part "backups" backs the same snapshot up by Berth and by restic alone, which is
// what both do their work with: once whole, once unchanged, and once with one file of a
// hundred changed. Then both restore it.

// bigSize is the size of the one large file, in bytes.
const bigSize = 2 << 30

// A load is what is in a volume that is backed up.
type backupLoad struct {
	title string
	// make fills /x, change alters a hundredth of it; both are commands in a container,
	// where /bench is this program.
	make, change []string
}

func backupLoads(s settings) []backupLoad {
	return []backupLoad{
		{
			fmt.Sprintf("%d files, %d MB", s.tree.files, s.tree.megabytes),
			[]string{"/bench", treeCommand, "-files", strconv.Itoa(s.tree.files), "-megabytes", strconv.Itoa(s.tree.megabytes), "/x"},
			[]string{"sh", "-c", "find /x -type f -name '*00' -exec sh -c 'for f; do echo changed >> $f; done' sh {} +"},
		},
		{
			fmt.Sprintf("one file, %d MB", bigSize/1_000_000),
			[]string{"dd", "if=/dev/urandom", "of=/x/big", "bs=1M", "count=" + strconv.Itoa(bigSize>>20)},
			[]string{"dd", "if=/dev/urandom", "of=/x/big", "bs=1M", "count=20", "seek=1000", "conv=notrunc"},
		},
	}
}

// Places on the host of a site, and of one of them in the plugin.
const (
	plainRepository   = "/var/lib/berth/plain"
	berthRepository   = "/backup/berth"
	passwordFile      = "/root/password"
	restoredByRestic  = "/var/lib/berth/restored"
	snapshotsOfVolume = "/var/lib/berth/volumes/.berth/snapshots"
)

// measureBackups backs up two loads in two kinds of storage.
func measureBackups(ctx context.Context, s settings) (*report, error) {
	if s.same {
		return nil, errors.New("-same: Docker's own driver has no backups, leave it out")
	}
	r := &report{}
	for _, kind := range storages() {
		if !strings.Contains(kind.title, "engine dir") && !strings.Contains(kind.title, "engine btrfs") {
			continue
		}
		for _, load := range backupLoads(s) {
			progress("backups: %s, %s", kind.title, load.title)
			table, version, err := backupsOf(ctx, s, kind, load)
			if version != "" {
				r.Engine = version
			}
			if table != nil {
				r.Tables = append(r.Tables, table)
			}
			if err != nil {
				return r, fmt.Errorf("%s, %s: %w", kind.title, load.title, err)
			}
		}
	}
	r.Notes = append(r.Notes, "restic alone is `restic backup` and `restic snapshots` of the same snapshot, as Berth looks after each backup whether it is listed.")
	return r, nil
}

func backupsOf(ctx context.Context, s settings, kind storage, load backupLoad) (g *grid, version string, err error) {
	t, err := newSite(ctx, "backup", s, siteOptions{plugins: []string{"berth-vol"}, volumesOn: kind.volumesOn})
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	b := backupBench{t, ctx, &grid{Title: kind.title + "; " + load.title + ":", Columns: []string{"Berth", "restic alone"}}}
	return b.grid, t.version, b.measure(s, kind, load)
}

// A backupBench is one host with two repositories.
type backupBench struct {
	*site
	ctx  context.Context //nolint:containedctx // of one measurement
	grid *grid
}

func (b backupBench) run(argv ...string) error {
	_, err := b.host.Exec(b.ctx, argv...)
	return err
}

// restic runs shell words with the plain repository.
func (b backupBench) restic(words string) error {
	return b.run("sh", "-e", "-c", "export RESTIC_REPOSITORY="+plainRepository+" RESTIC_PASSWORD_FILE="+passwordFile+"; "+words)
}

// inContainer runs a command where the volume is /x.
func (b backupBench) inContainer(argv []string) error {
	words := []string{"docker", "run", "--rm", "--network", "none", "-v", "tree:/x", "-v", self(b.host) + ":/bench:ro", "busybox"}
	return b.run(append(words, argv...)...)
}

func (b backupBench) measure(s settings, kind storage, load backupLoad) error {
	driver := b.sides()[0].volume
	steps := [][]string{
		append(append([]string{"docker", "volume", "create", "-d", driver}, kind.options...), "tree"),
		{"sh", "-c", "umask 077; echo correct horse battery staple > " + passwordFile},
		{"docker", "berth", "target", "add", "bench", berthRepository, "--password-file", passwordFile},
	}
	for _, argv := range steps {
		if err := b.run(argv...); err != nil {
			return err
		}
	}
	if err := errors.Join(b.restic("restic -q init"), b.inContainer(load.make)); err != nil {
		return err
	}
	if err := b.state("first", "whole", "unchanged", "unchanged, again"); err != nil {
		return err
	}
	if err := b.inContainer(load.change); err != nil {
		return err
	}
	if err := b.state("second", "1 % changed"); err != nil {
		return err
	}
	for round := range s.roundsOr(2) {
		if err := b.restore(round); err != nil {
			return err
		}
	}
	return nil
}

// state makes a snapshot and backs it up once for each kind of work, by both in turns.
func (b backupBench) state(snapshot string, works ...string) error {
	if err := b.run("docker", "berth", "snapshot", "create", "tree", snapshot); err != nil {
		return err
	}
	for round, work := range works {
		for _, i := range turns(round) {
			seconds, err := took(func() error {
				if i == 0 {
					return b.run("docker", "berth", "backup", "create", "tree@"+snapshot)
				}
				// One path for all, as a user who cares for speed would have it.
				return b.restic("mkdir -p /tmp/b; mount --bind " + snapshotsOfVolume + "/*/" + snapshot + " /tmp/b; " +
					"cd /tmp; restic -q backup --ignore-inode --ignore-ctime b; umount /tmp/b; restic -q snapshots")
			})
			if err != nil {
				return err
			}
			b.grid.add(work, inSeconds, i, seconds)
		}
	}
	return nil
}

func (b backupBench) restore(round int) error {
	for _, i := range turns(round) {
		name := fmt.Sprint("restored", round)
		seconds, err := took(func() error {
			if i == 0 {
				return b.run("docker", "berth", "backup", "restore", "bench/tree", name)
			}
			// What Berth restores is on disk at the end.
			return b.restic("restic -q restore latest --sparse --target " + restoredByRestic + "; sync -f " + restoredByRestic)
		})
		if err != nil {
			return err
		}
		b.grid.add("restored", inSeconds, i, seconds)
		if i == 0 {
			err = b.run("docker", "volume", "rm", name)
		} else {
			err = b.run("rm", "-rf", restoredByRestic)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
