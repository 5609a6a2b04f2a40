package restic

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// Tags of snapshots.
const (
	tagBerth      = "berth"
	tagVolume     = "volume="
	tagUUID       = "uuid="
	tagWord       = "tag="
	tagHolds      = "holds="
	tagIncomplete = "incomplete"
)

// maxList bounds what `restic snapshots` writes, in bytes: a snapshot takes less than 2 KiB.
const maxList = 512 << 20

var fullID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// contents is what a backup holds: the data, and the size of the manifest.
type contents struct {
	tree.Held
	manifest uint64
}

// tag tells what was there when the backup was made.
func (c contents) tag() string {
	return fmt.Sprintf("%s%d/%d/%d/%d", tagHolds, c.Files, c.Dirs, c.Bytes, c.manifest)
}

// readHolds reads the tag. What is no such tag is not ok.
func readHolds(tag string) (c contents, ok bool) {
	n, err := fmt.Sscanf(tag, tagHolds+"%d/%d/%d/%d", &c.Files, &c.Dirs, &c.Bytes, &c.manifest)
	return c, err == nil && n == 4 && c.tag() == tag
}

// stored is what restic has counted, of which one file is the manifest.
func (s *backupSummary) stored(manifest uint64) (contents, error) {
	if err := s.check(); err != nil {
		return contents{}, err
	}
	if *s.Files == 0 || *s.Bytes < manifest {
		return contents{}, fmt.Errorf("restic's summary cannot be: %d files and %d bytes, with a manifest of %d", *s.Files, *s.Bytes, manifest)
	}
	return contents{tree.Held{Files: *s.Files - 1, Dirs: s.dirs(), Bytes: *s.Bytes - manifest}, manifest}, nil
}

// List implements backup.Engine.
func (e *Engine) List(ctx context.Context, filter backup.Filter) ([]backup.Backup, error) {
	tags := tagBerth
	if filter.UUID != "" {
		tags += "," + tagUUID + filter.UUID
	}
	if filter.Volume != "" {
		tags += "," + tagVolume + filter.Volume
	}
	snapshots, err := e.snapshots(ctx, e.impatient(e.notice), "--tag", tags)
	if err != nil {
		return nil, fail("list", err)
	}
	var list []backup.Backup
	for _, s := range snapshots {
		b, ok := s.backup()
		if ok && strings.HasPrefix(b.ID, filter.ID) && (filter.UUID == "" || b.UUID == filter.UUID) && (filter.Volume == "" || b.Volume == filter.Volume) {
			list = append(list, b)
		}
	}
	slices.SortFunc(list, func(a, b backup.Backup) int {
		return cmp.Or(a.Time.Compare(b.Time), strings.Compare(a.ID, b.ID))
	})
	return list, nil
}

// impatient gives up what restic has tried for ListWait; other lines go to next.
func (e *Engine) impatient(next func(line []byte) error) func(line []byte) error {
	begin := time.Now()
	return func(line []byte) error {
		if bytes.Contains(line, retrying) && time.Since(begin) > e.ListWait {
			return fault.Unavailable("%.600s", delay.ReplaceAllString(e.redact.Replace(string(line)), ":"))
		}
		return next(line)
	}
}

// snapshots lists those that the arguments choose: options, or one ID. An unknown ID gives none.
// What restic says beside that goes to said, whose error ends it.
func (e *Engine) snapshots(ctx context.Context, said func(line []byte) error, args ...string) ([]snapshot, error) {
	var list []snapshot
	out := func(text []byte) (err error) {
		list, err = readSnapshots(text)
		return err
	}
	written := false
	err := e.run(ctx, call{
		// The list is right without a lock, which takes 0.2 s and would wait for a prune.
		args:  append([]string{"--no-lock", "--json", "snapshots"}, args...),
		whole: maxList,
		out:   func(text []byte) error { written = true; return out(text) },
		err:   said,
	})
	if err == nil && !written {
		err = fmt.Errorf("restic wrote no list of snapshots")
	}
	return list, err
}

// notice reads what restic says when it ends well all the same: that it could not list, and that it
// leaves out a snapshot that cannot be read.
func (e *Engine) notice(line []byte) error {
	switch {
	case bytes.HasPrefix(line, []byte("could not load snapshots")), bytes.HasPrefix(line, []byte("error printing")):
		return fmt.Errorf("%.600s", e.redact.Replace(string(line)))
	case bytes.HasPrefix(line, []byte("Ignoring ")):
		e.Log.Warnf("target %s: restic: %.600s", e.Target.Name, e.redact.Replace(string(line)))
	}
	return nil
}

// find is the backup of that ID.
func (e *Engine) find(ctx context.Context, id string) (backup.Backup, error) {
	if !fullID.MatchString(id) {
		return backup.Backup{}, fmt.Errorf("%w: %.80q is not the ID of one", backup.ErrNoBackup, id)
	}
	snapshots, err := e.snapshots(ctx, e.notice, id)
	if err != nil {
		return backup.Backup{}, err
	}
	for _, s := range snapshots {
		if b, ok := s.backup(); ok && b.ID == id {
			return b, nil
		}
	}
	return backup.Backup{}, fmt.Errorf("%w: %.8s", backup.ErrNoBackup, id)
}

// known looks a backup up unless List has told of it.
func (e *Engine) known(ctx context.Context, b backup.Backup) (backup.Backup, error) {
	if !b.Time.IsZero() && fullID.MatchString(b.ID) {
		return b, nil
	}
	return e.find(ctx, b.ID)
}

// missing tells that a backup is not there any more from what else makes restic fail: its words
// for that depend on the kind of repository.
func (e *Engine) missing(ctx context.Context, id string, err error) error {
	var exit *exitError
	if !errors.As(err, &exit) || exit.code != 1 {
		return err
	}
	if _, unknown := e.find(ctx, id); errors.Is(unknown, backup.ErrNoBackup) {
		return unknown
	}
	return err
}

// backup reads a snapshot. One that Berth has not made is not ok.
func (s snapshot) backup() (b backup.Backup, ok bool) {
	b = backup.Backup{ID: s.ID, Host: s.Hostname, Time: s.Time}
	var want contents
	told := false
	for _, tag := range s.Tags {
		switch {
		case tag == tagBerth:
			ok = true
		case tag == tagIncomplete:
			b.Incomplete = true
		case strings.HasPrefix(tag, tagVolume):
			b.Volume = tag[len(tagVolume):]
		case strings.HasPrefix(tag, tagUUID):
			b.UUID = tag[len(tagUUID):]
		case strings.HasPrefix(tag, tagWord):
			b.Tags = append(b.Tags, tag[len(tagWord):])
		case strings.HasPrefix(tag, tagHolds):
			want, told = readHolds(tag)
		}
	}
	if s.Summary == nil {
		return b, ok
	}
	have, err := s.Summary.stored(want.manifest)
	if err != nil {
		b.Incomplete = true
		return b, ok
	}
	b.Files, b.Bytes, b.Added = have.Files, have.Bytes, *s.Summary.Added
	b.Incomplete = b.Incomplete || told && have != want
	return b, ok
}
