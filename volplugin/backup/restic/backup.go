package restic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// maxMissing is how many files a Result names.
const maxMissing = 100

// timeFormat is what --time takes, in the zone of the environment, which is UTC.
const timeFormat = "2006-01-02 15:04:05"

// settleTime bounds the look for a backup that restic has made.
const settleTime = 5 * time.Minute

// Backup implements backup.Engine. The time of the backup has whole seconds. Nothing is compared
// with older backups than source.Parent: without one, all is read.
func (e *Engine) Backup(ctx context.Context, source backup.Source, progress func(backup.Progress)) (backup.Result, error) {
	if err := checkSource(source); err != nil {
		return backup.Result{}, err
	}
	want, err := count(ctx, source.Dir)
	if err != nil {
		return backup.Result{}, fmt.Errorf("count what is there: %w", err)
	}
	run := &backing{want: want, progress: told(progress), seen: map[string]bool{}}
	err = e.back(ctx, source, run)
	if source.Parent != "" && !run.done && parentGone(err) {
		e.Log.Infof("target %s: volume %s: the backup %.8s is gone: reading all files", e.Target.Name, source.Volume, source.Parent)
		source.Parent = ""
		err = e.back(ctx, source, run)
	}
	var exit *exitError
	incomplete := errors.As(err, &exit) && exit.code == exitIncomplete
	// With the summary the backup is in the repository. A caller who gives up now is told
	// of it all the same.
	late := run.done && ctx.Err() != nil
	if err != nil && !incomplete && !late {
		return backup.Result{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	if !run.done {
		return backup.Result{}, errors.New("restic ended without a summary")
	}
	if incomplete && run.count == 0 {
		run.miss("restic says that something could not be read, and not what: " + exit.text)
	}
	return e.settle(ctx, run)
}

// settle compares what restic has counted with what was there, and with the repository.
func (e *Engine) settle(ctx context.Context, run *backing) (backup.Result, error) {
	id := run.summary.ID
	if !fullID.MatchString(id) {
		return backup.Result{}, fmt.Errorf("restic's summary has no ID: %.80q", id)
	}
	have, err := run.summary.stored(run.want.manifest)
	if err != nil {
		return backup.Result{}, err
	}
	differs := have != run.want
	if differs && run.count == 0 {
		run.miss(fmt.Sprintf("%d files, %d directories and %d bytes were there, and restic has stored %d, %d and %d",
			run.want.Files, run.want.Dirs, run.want.Bytes, have.Files, have.Dirs, have.Bytes))
	}
	if run.count > 0 && !differs {
		marked, err := e.mark(ctx, id)
		if err != nil {
			return backup.Result{}, fmt.Errorf("backup %.8s is incomplete (%s) and cannot be marked as such: %w", id, run.missing[0], err)
		}
		id = marked
	}
	listed, err := e.find(ctx, id)
	if err != nil {
		return backup.Result{}, fmt.Errorf("look for the new backup %.8s: %w", id, err)
	}
	if listed.Files != have.Files || listed.Bytes != have.Bytes || listed.Incomplete != (run.count > 0) {
		return backup.Result{}, fmt.Errorf("backup %.8s is listed with %d files and %d bytes, and was stored with %d and %d", id, listed.Files, listed.Bytes, have.Files, have.Bytes)
	}
	return backup.Result{
		ID: id, Files: have.Files, Dirs: have.Dirs, Bytes: have.Bytes, Added: *run.summary.Added,
		Missing: run.missing, MissingCount: run.count,
	}, nil
}

// told makes a function that can be called of one that may be nil.
func told(progress func(backup.Progress)) func(backup.Progress) {
	if progress == nil {
		return func(backup.Progress) {}
	}
	return progress
}

// mark gives a snapshot the tag incomplete, and with it another ID.
func (e *Engine) mark(ctx context.Context, id string) (string, error) {
	var changed tagChanged
	err := e.run(ctx, call{
		args:  []string{"--json", "tag", "--add", tagIncomplete, id},
		alone: true,
		out: func(line []byte) error {
			_, err := readMessage(line, map[string]any{"changed": &changed})
			return err
		},
		err: e.notice,
	})
	if err == nil && (changed.Old != id || !fullID.MatchString(changed.New)) {
		err = errors.New("restic has not changed its tags")
	}
	return changed.New, err
}

func checkSource(s backup.Source) error {
	if !filepath.IsAbs(s.Dir) {
		return fault.Invalid("directory %.200q: want an absolute path", s.Dir)
	}
	if s.Host == "" || s.Volume == "" || s.UUID == "" {
		return fault.Invalid("backup of volume %.80q with UUID %.80q of host %.80q: want all three", s.Volume, s.UUID, s.Host)
	}
	for _, word := range append([]string{s.Volume, s.UUID}, s.Tags...) {
		if word == "" || strings.ContainsAny(word, ", \t\r\n\x00") {
			return fault.Invalid("tag %.80q: want a word without commas", word)
		}
	}
	if s.Parent != "" && !fullID.MatchString(s.Parent) {
		return fault.Invalid("parent %.80q: want the ID of a backup", s.Parent)
	}
	return nil
}

// count adds up what restic should store.
func count(ctx context.Context, dir string) (want contents, err error) {
	info, err := os.Lstat(filepath.Join(dir, backup.ManifestName))
	if err != nil {
		return want, err
	}
	if !info.Mode().IsRegular() {
		return want, fmt.Errorf("%s is not a regular file", backup.ManifestName)
	}
	want.manifest = uint64(info.Size())
	want.Held, err = countData(ctx, dir)
	return want, err
}

// countData adds up what is in dir's data, which may be a mount point.
func countData(ctx context.Context, dir string) (tree.Held, error) {
	path := filepath.Join(dir, backup.DataName)
	info, err := os.Lstat(path)
	if err != nil {
		return tree.Held{}, err
	}
	if !info.IsDir() {
		return tree.Held{}, fmt.Errorf("%s is not a directory", backup.DataName)
	}
	data, err := rooted.Open(path)
	if err != nil {
		return tree.Held{}, err
	}
	defer data.Close()
	return tree.Count(ctx, data)
}

// backing is one run of `restic backup`.
type backing struct {
	want     contents
	progress func(backup.Progress)
	summary  backupSummary
	done     bool
	// What is missing: the first reasons, how many, and of which items.
	missing []string
	count   uint64
	seen    map[string]bool
}

func (b *backing) miss(text string) {
	if b.count++; len(b.missing) < maxMissing {
		b.missing = append(b.missing, cut(text, maxTailLine))
	}
}

func (e *Engine) back(ctx context.Context, source backup.Source, run *backing) error {
	// The totals are known already, so restic need not look for them.
	args := []string{"--json", "backup", "--no-scan", "--host", source.Host, "--tag", tagBerth,
		"--tag", tagVolume + source.Volume, "--tag", tagUUID + source.UUID, "--tag", run.want.tag()}
	for _, tag := range source.Tags {
		args = append(args, "--tag", tagWord+tag)
	}
	if !source.Time.IsZero() {
		args = append(args, "--time", source.Time.UTC().Format(timeFormat))
	}
	// Without either, restic would choose a snapshot by itself, of another volume perhaps.
	if source.Parent == "" || source.Reread {
		args = append(args, "--force")
	} else {
		args = append(args, "--parent", source.Parent)
	}
	if source.Copied {
		args = append(args, "--ignore-inode", "--ignore-ctime")
	}
	run.tell(backupStatus{}) // restic itself tells nothing in the first half second
	return e.run(ctx, call{
		args: append(args, "--", backup.DataName, backup.ManifestName),
		dir:  source.Dir,
		out:  run.message,
		err:  func(line []byte) error { return run.failure(e, line) },
	})
}

func (b *backing) message(line []byte) error {
	var status backupStatus
	var summary backupSummary
	kind, err := readMessage(line, map[string]any{"status": &status, "summary": &summary})
	switch {
	case err != nil:
		return err
	case kind == "summary" && b.done:
		return malformed(line, errors.New("it is the second summary"))
	case kind == "summary":
		b.summary, b.done = summary, true
	case kind == "status":
		b.tell(status)
	}
	return nil
}

// tell tells the progress; what restic counts has the manifest in it.
func (b *backing) tell(s backupStatus) {
	b.progress(backup.Progress{
		Step: "reading", Files: min(s.FilesDone, b.want.Files), TotalFiles: b.want.Files, Bytes: min(s.BytesDone, b.want.Bytes), TotalBytes: b.want.Bytes,
	})
}

func (b *backing) failure(e *Engine, line []byte) error {
	m, ok, err := readError(line)
	if err != nil || !ok || b.seen[m.Item] {
		return err
	}
	if m.Item != "" && len(b.seen) < 1<<16 {
		b.seen[m.Item] = true
	}
	b.miss(e.redact.Replace(m.text()))
	return nil
}

// parentGone tells whether restic found no snapshot by the ID of the parent.
func parentGone(err error) bool {
	var exit *exitError
	return errors.As(err, &exit) && exit.code == 1 && exit.kind == nil &&
		(strings.Contains(exit.text, "failed to load snapshot") || strings.Contains(exit.text, "no matching ID found"))
}
