package volplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// ExportVolume implements control.BackupAdmin.
func (d *Driver) ExportVolume(ctx context.Context, req control.ExportRequest, w io.Writer, tell func(control.Progress)) (out control.Export, err error) {
	if d.backups == nil {
		return out, errNoBackups
	}
	if err := volume.CheckName(req.Volume); err != nil {
		return out, err
	}
	report := newReporter(tell)
	defer report.end()
	s, err := d.storeOf(ctx, req.Volume)
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", req.Volume, err)
	}
	rec := d.ledger.view(s.key, req.Volume).Record
	if rec.UUID == "" {
		return out, fault.NotFound("volume %s does not exist", req.Volume)
	}
	guarded := &guard{w: w}
	defer guarded.end()
	var done control.Export
	err = d.onSnapshot(ctx, s, rec, req.Snapshot, func() {}, report, func(ctx context.Context, root *volume.Root, snapshot string) (err error) {
		done, err = d.exportSnapshot(ctx, s, root, req, snapshot, guarded, report)
		return err
	})
	if err != nil {
		return out, fmt.Errorf("export volume %s: %w", req.Volume, err)
	}
	return done, nil
}

// A guard is a writer that refuses what comes when its owner is gone: somebody who hung
// in a system call may go on to write later.
type guard struct {
	mu    sync.Mutex
	w     io.Writer
	ended bool
}

// Write implements io.Writer.
func (g *guard) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return 0, io.ErrClosedPipe
	}
	return g.w.Write(p)
}

func (g *guard) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
}

// exportSnapshot writes a snapshot as an archive.
func (d *Driver) exportSnapshot(ctx context.Context, s *store, root *volume.Root, req control.ExportRequest, snapshot string, w io.Writer, report *reporter) (out control.Export, err error) {
	rec, err := root.Record(req.Volume)
	if err != nil {
		return out, err
	}
	snap, err := root.Snapshot(ctx, req.Volume, snapshot)
	if err != nil {
		return out, err
	}
	able, err := root.Abilities(ctx, rec)
	if err != nil {
		return out, err
	}
	manifest, err := d.backups.manifest(rec, able, snap, req.Snapshot != "", s.hostName()).Encode()
	if err != nil {
		return out, err
	}
	data, done, err := root.OpenSnapshot(ctx, req.Volume, snapshot)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, done()) }()
	written, err := writeArchive(ctx, w, req.Compress != control.CompressNone, manifest, data, func(files, bytes uint64) {
		report.send(control.Progress{Step: "reading", Files: files, Bytes: bytes})
	})
	if err != nil {
		return out, err
	}
	return control.Export{
		Volume: rec.Name, Time: snap.CreatedAt.UTC(), Consistency: control.Consistency(snap.Consistency),
		Files: written.Files, Bytes: written.Bytes, Missing: written.Missing, MissingCount: written.MissingCount,
	}, nil
}

// writeArchive writes an archive and ends it.
func writeArchive(ctx context.Context, w io.Writer, compress bool, manifest []byte, data *rooted.Dir, tell func(files, bytes uint64)) (tarball.Written, error) {
	if !compress {
		return tarball.Write(ctx, w, manifest, data, tell)
	}
	compressor, err := tarball.Compress(w)
	if err != nil {
		return tarball.Written{}, err
	}
	written, err := tarball.Write(ctx, compressor, manifest, data, tell)
	if errClose := compressor.Close(); err == nil {
		err = errClose
	}
	return written, err
}
