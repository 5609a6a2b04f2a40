package archive

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// Engine keeps backups as archives. It implements backup.Engine.
type Engine struct {
	store    store
	up, down *rate.Limiter // nil for no limit
}

// New gives the engine for a target, which nothing is asked of yet. Errors are invalid.
func New(target backup.Target) (*Engine, error) {
	if target.EngineName() != backup.Archive {
		return nil, fault.Invalid("target %s is one of engine %s", target.Name, target.EngineName())
	}
	if err := target.Check(); err != nil {
		return nil, err
	}
	e := &Engine{up: limiter(target.UploadLimit), down: limiter(target.DownloadLimit)}
	if target.Kind() == "s3" {
		place, err := newS3(target)
		if err != nil {
			return nil, err
		}
		e.store = place
		return e, nil
	}
	e.store = local{strings.TrimPrefix(target.Repository, "local:")}
	return e, nil
}

// marker is what a repository is known by.
const marker = "{\"berth-archive\": 1}\n"

// Init implements backup.Engine.
func (e *Engine) Init(ctx context.Context) error {
	err := e.there(ctx)
	if !errors.Is(err, backup.ErrNoRepository) {
		return err
	}
	if err := e.store.make(ctx); err != nil {
		return e.failed("make the repository", err)
	}
	if err := e.store.put(ctx, markerName, int64(len(marker)), strings.NewReader(marker)); err != nil {
		return e.failed("make the repository", err)
	}
	return e.there(ctx)
}

// there makes sure that the store is a repository.
func (e *Engine) there(ctx context.Context) error {
	text, err := e.read(ctx, markerName, 1<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", e.store, backup.ErrNoRepository)
	}
	if err != nil {
		return e.failed("open the repository", err)
	}
	if string(text) != marker {
		return fmt.Errorf("%s: %s is none that this Berth can read", e.store, markerName)
	}
	return nil
}

func (e *Engine) failed(what string, err error) error {
	return fmt.Errorf("%s: %s: %w", e.store, what, err)
}

// read reads a small object.
func (e *Engine) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	r, err := e.store.open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return text, err
}

// patience is how long is waited for what has to be done though a call was cancelled.
const patience = 20 * time.Second

// Backup implements backup.Engine.
func (e *Engine) Backup(ctx context.Context, source backup.Source, progress func(backup.Progress)) (result backup.Result, err error) {
	if !volumes.MatchString(source.Volume) {
		return result, fault.Invalid("volume %.80q has a name that no volume can have", source.Volume)
	}
	if err := e.there(ctx); err != nil {
		return result, err
	}
	var random [16]byte
	_, _ = rand.Read(random[:])
	rec := record{ID: hex.EncodeToString(random[:]), Volume: source.Volume, UUID: source.UUID, Host: source.Host, Time: source.Time.UTC(), Tags: source.Tags}
	defer func() {
		if err != nil {
			late, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
			defer cancel()
			err = errors.Join(err, e.forget(late, rec.Volume, rec.ID))
		}
	}()
	if err := e.archive(ctx, source, &rec, progress); err != nil {
		return result, e.failed("back up volume "+source.Volume, ended(ctx, err))
	}
	text, err := rec.encode()
	if err == nil {
		err = e.store.put(ctx, recordName(rec.Volume, rec.ID), int64(len(text)), bytes.NewReader(text))
	}
	if err == nil {
		err = e.seen(ctx, rec)
	}
	if err != nil {
		return result, e.failed("record the backup of volume "+source.Volume, ended(ctx, err))
	}
	return backup.Result{
		ID: rec.ID, Files: rec.Files, Dirs: rec.Dirs, Bytes: rec.Bytes, Added: uint64(rec.Size) + uint64(len(text)),
		Missing: rec.Missing, MissingCount: rec.MissingCount,
	}, nil
}

// ended is ctx's error if ctx has ended, because what fails then does so in many words.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// archive stores the archive of a source, and completes the record.
func (e *Engine) archive(ctx context.Context, source backup.Source, rec *record, progress func(backup.Progress)) error {
	top, err := rooted.Open(source.Dir)
	if err != nil {
		return err
	}
	defer top.Close()
	manifest, err := top.ReadFile(backup.ManifestName, maxManifest)
	if err != nil {
		return err
	}
	// It may be a mount.
	data, err := rooted.Open(filepath.Join(source.Dir, backup.DataName))
	if err != nil {
		return err
	}
	defer data.Close()
	total, err := tree.Size(ctx, data)
	if err != nil {
		return err
	}
	tell := telling(progress, "reading", backup.Progress{TotalFiles: total.Files, TotalBytes: total.Bytes})
	sum := &counted{hash: sha256.New()}
	group, within := errgroup.WithContext(ctx)
	r, w := io.Pipe()
	var written tarball.Written
	group.Go(func() error {
		var err error
		written, err = write(within, io.MultiWriter(sum, limited(within, w, e.up)), manifest, data, tell)
		_ = w.CloseWithError(err) // nil is the end
		return err
	})
	group.Go(func() error {
		err := e.store.put(within, archiveName(rec.Volume, rec.ID), int64(total.Bytes), r)
		_ = r.CloseWithError(errors.Join(errStopped, err))
		return err
	})
	if err := group.Wait(); err != nil {
		return err
	}
	rec.Files, rec.Dirs, rec.Bytes = written.Files, written.Dirs, written.Bytes
	rec.Missing, rec.MissingCount = written.Missing, written.MissingCount
	rec.Size, rec.SHA256 = sum.size, hex.EncodeToString(sum.hash.Sum(nil))
	return nil
}

var errStopped = errors.New("the archive is not taken any more")

// maxManifest bounds a manifest, in bytes, more widely than package backup.
const maxManifest = 1 << 20

func write(ctx context.Context, to io.Writer, manifest []byte, data *rooted.Dir, tell func(files, bytes uint64)) (tarball.Written, error) {
	compressor, err := tarball.Compress(to)
	if err != nil {
		return tarball.Written{}, err
	}
	written, err := tarball.Write(ctx, compressor, manifest, data, tell)
	return written, errors.Join(err, compressor.Close())
}

// seen makes sure that the backup is in the list, and as large as was written.
func (e *Engine) seen(ctx context.Context, want record) error {
	all, err := e.store.list(ctx, want.Volume)
	if err != nil {
		return err
	}
	archive, recorded := false, false
	for _, o := range all {
		switch o.name() {
		case archiveName(want.Volume, want.ID):
			if o.size != want.Size {
				return fmt.Errorf("%s has %d bytes, and %d were written", o.name(), o.size, want.Size)
			}
			archive = true
		case recordName(want.Volume, want.ID):
			recorded = true
		}
	}
	if !archive || !recorded {
		return errors.New("what was written is not there")
	}
	_, err = e.record(ctx, want.Volume, want.ID)
	return err
}

// record reads the record of a backup.
func (e *Engine) record(ctx context.Context, volume, id string) (record, error) {
	name := recordName(volume, id)
	text, err := e.read(ctx, name, maxRecord)
	if err != nil {
		return record{}, err
	}
	rec, err := decodeRecord(text, volume, id)
	if err != nil {
		return record{}, fmt.Errorf("%s: %w: %w", name, errRecord, err)
	}
	return rec, nil
}

// errRecord is wrapped by errors that tell of what a record says.
var errRecord = errors.New("the record cannot be read")

// readers is how many records are read at a time.
const readers = 8

// records reads those of the backups that a filter lets through, unsorted. damaged are
// errors, those of records that were read and mean nothing.
func (e *Engine) records(ctx context.Context, filter backup.Filter) (all []record, damaged []error, err error) {
	if filter.Volume != "" && !volumes.MatchString(filter.Volume) {
		return nil, nil, nil
	}
	objects, err := e.store.list(ctx, filter.Volume)
	if err != nil {
		return nil, nil, err
	}
	objects = slices.DeleteFunc(objects, func(o object) bool {
		id, ok := o.id(recordSuffix)
		return !ok || !strings.HasPrefix(id, filter.ID)
	})
	read := make([]record, len(objects))
	errs := make([]error, len(objects))
	group, within := errgroup.WithContext(ctx)
	group.SetLimit(readers)
	for i, o := range objects {
		group.Go(func() error {
			id, _ := o.id(recordSuffix)
			read[i], errs[i] = e.record(within, o.volume, id)
			if errors.Is(errs[i], errRecord) || errors.Is(errs[i], fs.ErrNotExist) {
				return nil
			}
			return errs[i]
		})
	}
	if err := group.Wait(); err != nil {
		return nil, nil, ended(ctx, err)
	}
	for i, rec := range read {
		switch {
		case errors.Is(errs[i], errRecord):
			damaged = append(damaged, errs[i])
		case errs[i] == nil && rec.matches(filter):
			all = append(all, rec)
		}
	}
	return all, damaged, nil
}

// List implements backup.Engine.
func (e *Engine) List(ctx context.Context, filter backup.Filter) ([]backup.Backup, error) {
	if err := e.there(ctx); err != nil {
		return nil, err
	}
	records, _, err := e.records(ctx, filter)
	if err != nil {
		return nil, e.failed("list backups", err)
	}
	var all []backup.Backup
	for _, rec := range records {
		all = append(all, rec.backup())
	}
	slices.SortFunc(all, func(a, b backup.Backup) int {
		if order := a.Time.Compare(b.Time); order != 0 {
			return order
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all, nil
}

// find finds the record of a backup.
func (e *Engine) find(ctx context.Context, id string) (record, error) {
	if err := e.there(ctx); err != nil {
		return record{}, err
	}
	if !ids.MatchString(id) {
		return record{}, fmt.Errorf("%s: backup %.80q: %w", e.store, id, backup.ErrNoBackup)
	}
	found, damaged, err := e.records(ctx, backup.Filter{ID: id})
	if err = errors.Join(append(damaged, err)...); err != nil {
		return record{}, e.failed("find backup "+id, err)
	}
	if len(found) != 1 {
		return record{}, fmt.Errorf("%s: backup %s: %w", e.store, id, backup.ErrNoBackup)
	}
	return found[0], nil
}

// Manifest implements backup.Engine.
func (e *Engine) Manifest(ctx context.Context, id string) (backup.Manifest, error) {
	rec, err := e.find(ctx, id)
	if err != nil {
		return backup.Manifest{}, err
	}
	m, err := e.manifest(ctx, rec)
	if err != nil {
		return backup.Manifest{}, e.failed("read the manifest of backup "+id, ended(ctx, err))
	}
	return m, nil
}

func (e *Engine) manifest(ctx context.Context, rec record) (backup.Manifest, error) {
	r, err := e.open(ctx, rec)
	if err != nil {
		return backup.Manifest{}, err
	}
	defer func() { _ = r.Close() }()
	text, err := tarball.ReadManifest(r)
	if err != nil {
		return backup.Manifest{}, err
	}
	return backup.DecodeManifest(text)
}

// An opened archive is read through a sum.
type opened struct {
	io.ReadCloser // decompressed
	raw           io.Closer
	rest          io.Reader // compressed
	sum           *counted
}

// open opens the archive of a backup.
func (e *Engine) open(ctx context.Context, rec record) (*opened, error) {
	raw, err := e.store.open(ctx, archiveName(rec.Volume, rec.ID))
	if err != nil {
		return nil, err
	}
	sum := &counted{hash: sha256.New()}
	rest := io.TeeReader(slowed(ctx, raw, e.down), sum)
	content, err := tarball.Decompress(rest)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return &opened{ReadCloser: content, raw: raw, rest: rest, sum: sum}, nil
}

// Close implements io.Closer.
func (o *opened) Close() error {
	_ = o.ReadCloser.Close()
	return o.raw.Close()
}

// verify reads what is left, and compares size and sum.
func (o *opened) verify(rec record) error {
	_, err := io.Copy(io.Discard, io.LimitReader(o.rest, max(0, rec.Size+1-o.sum.size)))
	if err != nil {
		return err
	}
	return o.sum.compare(rec)
}

// Restore implements backup.Engine.
func (e *Engine) Restore(ctx context.Context, b backup.Backup, dir string, paths []string, progress func(backup.Progress)) (backup.Restored, error) {
	rec, err := e.find(ctx, b.ID)
	if err != nil {
		return backup.Restored{}, err
	}
	restored, err := e.restore(ctx, rec, dir, paths, telling(progress, "restoring", backup.Progress{TotalFiles: rec.Files, TotalBytes: rec.Bytes}))
	if err != nil {
		return restored, e.failed("restore backup "+b.ID, ended(ctx, err))
	}
	return restored, nil
}

func (e *Engine) restore(ctx context.Context, rec record, dir string, paths []string, tell func(files, bytes uint64)) (backup.Restored, error) {
	top, err := rooted.Open(dir)
	if err != nil {
		return backup.Restored{}, err
	}
	defer top.Close()
	if err := top.EnsureDir(backup.DataName, 0o700); err != nil {
		return backup.Restored{}, err
	}
	// It may be a mount, and is nobody's link: nobody else knows dir.
	data, err := rooted.Open(filepath.Join(dir, backup.DataName))
	if err != nil {
		return backup.Restored{}, err
	}
	defer data.Close()
	r, err := e.open(ctx, rec)
	if err != nil {
		return backup.Restored{}, err
	}
	defer func() { _ = r.Close() }()
	got, err := tarball.Extract(ctx, r, data, tarball.Options{
		Layout: tarball.Volume, Paths: paths, Progress: tell,
		Again: func() (io.ReadCloser, error) { return e.open(ctx, rec) },
	})
	restored := backup.Restored{Files: got.Files, Bytes: got.Bytes}
	if err == nil {
		err = r.verify(rec)
	}
	if err != nil || len(paths) > 0 {
		return restored, err
	}
	if got.Files != rec.Files {
		return restored, fmt.Errorf("%d files were restored, and %d were backed up", got.Files, rec.Files)
	}
	if got.Lost > 0 {
		return restored, fmt.Errorf("%d extended attributes cannot be stored here: %s", got.Lost, strings.Join(got.LostSome, "; "))
	}
	return restored, top.WriteNew(backup.ManifestName, got.Manifest, 0o600)
}

// Forget implements backup.Engine. The space becomes free as well.
func (e *Engine) Forget(ctx context.Context, forgotten []string) error {
	if err := e.there(ctx); err != nil {
		return err
	}
	if !slices.ContainsFunc(forgotten, ids.MatchString) {
		return nil
	}
	all, err := e.store.list(ctx, "")
	if err != nil {
		return e.failed("list backups", err)
	}
	for _, o := range all {
		id, ok := o.id(recordSuffix)
		if !ok || !slices.Contains(forgotten, id) {
			continue
		}
		if err := e.forget(ctx, o.volume, id); err != nil {
			return e.failed("remove backup "+id, err)
		}
	}
	return nil
}

// forget removes a backup, which ceases to exist first.
func (e *Engine) forget(ctx context.Context, volume, id string) error {
	if err := e.store.remove(ctx, recordName(volume, id)); err != nil {
		return err
	}
	return e.store.remove(ctx, archiveName(volume, id))
}

// abandoned is the age from which on nobody is at work on what has no record.
const abandoned = 24 * time.Hour

// Prune implements backup.Engine.
func (e *Engine) Prune(ctx context.Context, progress func(backup.Progress)) error {
	if err := e.there(ctx); err != nil {
		return err
	}
	telling(progress, "removing what was not completed", backup.Progress{})(0, 0)
	before := time.Now().Add(-abandoned)
	if err := e.store.sweep(ctx, before); err != nil {
		return e.failed("prune", err)
	}
	all, err := e.store.list(ctx, "")
	if err != nil {
		return e.failed("prune", err)
	}
	recorded := map[string]bool{}
	for _, o := range all {
		if id, ok := o.id(recordSuffix); ok {
			recorded[archiveName(o.volume, id)] = true
		}
	}
	for _, o := range all {
		if _, ok := o.id(archiveSuffix); !ok || recorded[o.name()] || !o.modified.Before(before) {
			continue
		}
		if err := e.store.remove(ctx, o.name()); err != nil {
			return e.failed("prune", err)
		}
	}
	return nil
}

// telling turns the progress of files and bytes into that of a call.
func telling(progress func(backup.Progress), step string, p backup.Progress) func(files, bytes uint64) {
	p.Step = step
	return func(files, bytes uint64) {
		if progress == nil {
			return
		}
		p.Files, p.Bytes = files, bytes
		// What is there to be done was counted without holes and other names.
		p.TotalFiles, p.TotalBytes = max(p.TotalFiles, files), max(p.TotalBytes, bytes)
		progress(p)
	}
}

// counted is a sum of what is written to it.
type counted struct {
	hash hash.Hash
	size int64
}

// Write implements io.Writer.
func (c *counted) Write(data []byte) (int, error) {
	c.size += int64(len(data))
	return c.hash.Write(data)
}

// compare tells whether it is what a record says.
func (c *counted) compare(rec record) error {
	if c.size != rec.Size || hex.EncodeToString(c.hash.Sum(nil)) != rec.SHA256 {
		return fmt.Errorf("%w: %s is not what was written", tarball.ErrArchive, archiveName(rec.Volume, rec.ID))
	}
	return nil
}
