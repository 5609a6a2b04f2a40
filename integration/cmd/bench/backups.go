package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/integration/lab"
)

// The part "backups" backs the same snapshots up by Berth and by restic alone, which is
// what both do their work with: whole, unchanged, and with a hundredth changed. Then both
// restore it. It also measures what a backup takes of the machine, and for how long an
// application stands still.

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
			fmt.Sprintf("one file, %d MB", (s.big<<20)/1_000_000),
			[]string{"dd", "if=/dev/urandom", "of=/x/big", "bs=1M", "count=" + strconv.Itoa(s.big)},
			[]string{"dd", "if=/dev/urandom", "of=/x/big", "bs=1M", "count=" + strconv.Itoa(max(s.big/100, 1)), "seek=" + strconv.Itoa(s.big/2), "conv=notrunc"},
		},
	}
}

// Places on the host of a site, and of repositories in the plugin. Both repositories are
// on the host's disk, and both restore to where the volumes are.
const (
	plainRepository   = "/var/lib/berth/plain"
	berthRepositories = "/backup"
	passwordFile      = "/root/password"
	restoredByRestic  = "/var/lib/berth/volumes/.restored"
	snapshotsOfVolume = "/var/lib/berth/volumes/.berth/snapshots"
	archiveFile       = "/var/lib/berth/archive"
)

// usualBackups is how often all is backed up, to new repositories each time: twice, so
// that both are first once.
const usualBackups = 2

// measureBackups backs up two loads in two kinds of storage, and measures pauses in all.
func measureBackups(ctx context.Context, s settings) (*report, error) {
	if s.same {
		return nil, errors.New("-same: Docker's own driver has no backups, leave it out")
	}
	r := &report{}
	pauses := &grid{Title: fmt.Sprintf("A container that writes each millisecond, while its volume (%d files, %d MB) is backed up:", s.tree.files, s.tree.megabytes), plain: true}
	costs := &grid{Title: "What a whole backup takes:", Columns: []string{"Berth", "restic alone", "`tar cf`, then `gzip`", "`tar c \\| zstd`"}}
	for _, kind := range storages() {
		pauses.Columns = append(pauses.Columns, kind.title)
	}
	for column, kind := range storages() {
		for i, load := range backupLoads(s) {
			if i > 0 && !kind.backups {
				continue
			}
			progress("backups: %s, %s", kind.title, load.title)
			table := &grid{Title: kind.title + "; " + load.title + ":", Columns: []string{"Berth", "restic alone"}}
			r.Tables = append(r.Tables, table)
			version, err := withBackups(ctx, s, kind, load, table, func(b backupBench) error {
				if kind.backups {
					if err := b.compare(s.roundsOr(usualBackups)); err != nil {
						return err
					}
				}
				if i > 0 {
					return nil
				}
				if column == 0 {
					if err := b.costs(costs); err != nil {
						return err
					}
				}
				if s.mode != lab.Managed {
					return nil // berthd is started without Docker's socket there
				}
				return b.pauses(pauses, column, s.roundsOr(usualBackups))
			})
			if version != "" {
				r.Engine = version
			}
			if err != nil {
				r.Tables = append(r.Tables, costs, pauses)
				return r, fmt.Errorf("%s, %s: %w", kind.title, load.title, err)
			}
		}
	}
	r.Tables = append(r.Tables, costs, pauses)
	r.Notes = append(r.Notes,
		"restic alone is `restic backup` and `restic snapshots` of the same snapshot, as Berth looks after each backup whether it is listed; and `restic snapshots` and `restic restore`.",
		"Before each time, but those of what is unchanged, the machine's cache is emptied.",
		"Berth takes what berthd and its children take more than before, without the docker command. Memory is the most that all processes had at once. Processor time is that of processes, not of the kernel's own threads.")
	return r, nil
}

// withBackups makes a host with a volume that is filled and has two snapshots, "first"
// and, with a hundredth changed, "second".
func withBackups(ctx context.Context, s settings, kind storage, load backupLoad, table *grid, do func(backupBench) error) (version string, err error) {
	opts := siteOptions{plugins: []string{"berth-vol"}, volumesOn: kind.volumesOn}
	if s.mode == lab.Managed {
		opts.settings = []string{"docker-socket.source=/var/run/docker.sock"}
	}
	t, err := newSite(ctx, "backup", s, opts)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	b := backupBench{t, ctx, kind, table}
	create := append([]string{"docker", "volume", "create", "-d", b.sides()[0].volume, "-o", "on-remove=purge"}, kind.options...)
	err = b.run(append(create, "tree")...)
	if err == nil {
		err = b.run("sh", "-c", "umask 077; echo correct horse battery staple > "+passwordFile)
	}
	if err == nil {
		err = b.inContainer(load.make)
	}
	if err == nil {
		err = b.run("docker", "berth", "snapshot", "create", "tree", "first")
	}
	if err == nil {
		err = b.inContainer(load.change)
	}
	if err == nil {
		err = b.run("docker", "berth", "snapshot", "create", "tree", "second")
	}
	if err == nil {
		err = do(b)
	}
	return t.version, err
}

// A backupBench is a host with a volume to back up.
type backupBench struct {
	*site
	ctx  context.Context //nolint:containedctx // of one measurement
	kind storage
	grid *grid
}

func (b backupBench) run(argv ...string) error {
	_, err := b.host.Exec(b.ctx, argv...)
	return err
}

// restic runs shell words with the plain repository.
func (b backupBench) restic(words string) error {
	return b.run("sh", "-e", "-c", withPlain(words))
}

func withPlain(words string) string {
	return "export RESTIC_REPOSITORY=" + plainRepository + " RESTIC_PASSWORD_FILE=" + passwordFile + "; " + words
}

// inContainer runs a command where the volume is /x.
func (b backupBench) inContainer(argv []string) error {
	words := []string{"docker", "run", "--rm", "--network", "none", "-v", "tree:/x", "-v", self(b.host) + ":/bench:ro", "busybox"}
	return b.run(append(words, argv...)...)
}

// addTarget makes a new repository for Berth.
func (b backupBench) addTarget(name string) error {
	return b.run("docker", "berth", "target", "add", name, berthRepositories+"/"+name, "--password-file", passwordFile)
}

// backupByRestic are the shell words for what Berth does.
func (b backupBench) backupByRestic(snapshot string) string {
	flags := ""
	if b.kind.copies {
		flags = "--ignore-inode --ignore-ctime "
	}
	// One path for all, as a user who cares for speed would have it.
	return "mkdir -p /tmp/b; mount --bind " + snapshotsOfVolume + "/*/" + snapshot + " /tmp/b; " +
		"cd /tmp; restic -q backup " + flags + "b; umount /tmp/b; restic -q snapshots"
}

// emptyCache makes the next one read from the disk. It is the whole machine's, so that
// what else runs there becomes slower for a while.
func emptyCache() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// compare backs up and restores, with new repositories for each round.
func (b backupBench) compare(rounds int) error {
	for round := range rounds {
		target := fmt.Sprint("bench", round)
		err := b.addTarget(target)
		if err == nil {
			err = b.restic("restic -q init")
		}
		for _, step := range []struct {
			work, snapshot string
			cold           bool
			order          int
		}{
			{"whole", "first", true, round},
			{"unchanged", "first", false, round},
			{"unchanged", "first", false, round + 1},
			{"1 % changed", "second", true, round},
		} {
			if err == nil {
				err = b.backup(step.work, target, step.snapshot, step.cold, step.order)
			}
		}
		if err == nil {
			err = b.restore(target, round)
		}
		if err == nil {
			err = b.run("docker", "berth", "target", "rm", "--force", target)
		}
		if err == nil {
			err = b.run("rm", "-rf", plainRepository, "/var/lib/berth/"+target)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// backup backs a snapshot up once by each, in turns.
func (b backupBench) backup(work, target, snapshot string, cold bool, order int) error {
	for _, i := range turns(order) {
		if cold {
			if err := emptyCache(); err != nil {
				return err
			}
		}
		seconds, err := took(func() error {
			if i == 0 {
				return b.run("docker", "berth", "backup", "create", "tree@"+snapshot, "--target", target)
			}
			return b.restic(b.backupByRestic(snapshot))
		})
		if err != nil {
			return err
		}
		b.grid.add(work, inSeconds, i, seconds)
	}
	return nil
}

// restore restores the second snapshot once by each. Berth's volume is on disk when it is
// whole, so that what restic takes is measured without that and with it.
func (b backupBench) restore(target string, order int) error {
	const name = "restored"
	for _, i := range turns(order) {
		if err := emptyCache(); err != nil {
			return err
		}
		if i == 0 {
			seconds, err := took(func() error { return b.run("docker", "berth", "backup", "restore", target+"/tree", name) })
			if err != nil {
				return err
			}
			b.grid.add("restored", inSeconds, i, seconds)
			b.grid.add("restored, on disk", inSeconds, i, seconds)
			if err := b.run("docker", "volume", "rm", name); err != nil {
				return err
			}
			continue
		}
		restored, err := took(func() error {
			return b.restic("restic -q snapshots; restic -q restore latest --sparse --target " + restoredByRestic)
		})
		if err != nil {
			return err
		}
		synced, err := took(func() error { return b.run("sync", "-f", restoredByRestic) })
		if err != nil {
			return err
		}
		b.grid.add("restored", inSeconds, i, restored)
		b.grid.add("restored, on disk", inSeconds, i, restored+synced)
		if err := b.run("rm", "-rf", restoredByRestic); err != nil {
			return err
		}
	}
	return nil
}

// costs measures what a whole backup takes of the machine, beside archives: convoy's way,
// which is to pack all and then to compress it, and a pipe.
func (b backupBench) costs(g *grid) error {
	const target = "cost"
	zstd, err := b.zstd()
	if err != nil {
		return err
	}
	if err := errors.Join(b.addTarget(target), b.restic("restic -q init")); err != nil {
		return err
	}
	dir := snapshotsOfVolume + "/*/first"
	for column, argv := range [][]string{
		{"docker", "berth", "backup", "create", "tree@first", "--target", target},
		{"sh", "-e", "-c", withPlain(b.backupByRestic("first"))},
		{"sh", "-e", "-c", "tar cf " + archiveFile + " -C " + dir + " .; gzip " + archiveFile},
		{"sh", "-e", "-c", "tar c -C " + dir + " . | " + zstd + " -q > " + archiveFile + ".zst"},
	} {
		if err := emptyCache(); err != nil {
			return err
		}
		var out strings.Builder
		counted := "berthd"
		if column > 0 {
			counted = "none"
		}
		if err := b.runSelf(b.ctx, &out, append([]string{costCommand, counted}, argv...)...); err != nil {
			return err
		}
		var c cost
		if err := json.Unmarshal([]byte(out.String()), &c); err != nil {
			return fmt.Errorf("%s: %w: %.200q", costCommand, err, out.String())
		}
		g.add("time", inSeconds, column, c.Seconds)
		g.add("processor time", inSeconds, column, c.CPU)
		g.add("memory", inBytes, column, float64(c.Memory))
	}
	return b.run("sh", "-c", "rm -rf "+plainRepository+" "+archiveFile+"*")
}

// zstd puts the machine's own zstd where the host can run it, which has none, and returns
// shell words that do.
func (b backupBench) zstd() (string, error) {
	program, err := exec.LookPath("zstd")
	if err != nil {
		return "", err
	}
	needs, err := exec.CommandContext(b.ctx, "ldd", program).Output()
	if err != nil {
		return "", fmt.Errorf("ldd %s: %w", program, err)
	}
	dir := filepath.Join(b.host.Dir, "zstd")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	loader := ""
	for _, word := range append(strings.Fields(string(needs)), program) {
		if !filepath.IsAbs(word) {
			continue
		}
		at := filepath.Join(dir, filepath.Base(word))
		if strings.HasPrefix(filepath.Base(word), "ld-") {
			loader = at
		}
		if out, err := exec.CommandContext(b.ctx, "cp", "-L", word, at).CombinedOutput(); err != nil {
			return "", fmt.Errorf("copy %s: %w: %s", word, err, out)
		}
	}
	words := filepath.Join(dir, "zstd")
	if loader != "" {
		words = loader + " --library-path " + dir + " " + words
	}
	return words, nil
}
