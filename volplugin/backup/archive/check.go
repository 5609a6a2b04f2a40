package archive

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
)

// Check implements backup.Engine. Archives are read whole: depth is the share of them, at
// least one.
func (e *Engine) Check(ctx context.Context, depth float64, progress func(backup.Progress)) (backup.Report, error) {
	var report backup.Report
	if err := e.there(ctx); err != nil {
		return report, err
	}
	found := func(err error) { report.Errors = append(report.Errors, err.Error()) }
	records, damaged, err := e.records(ctx, backup.Filter{})
	if err != nil {
		return report, e.failed("check", err)
	}
	for _, err := range damaged {
		found(err)
	}
	records, err = e.sizes(ctx, records, found)
	if err != nil {
		return report, e.failed("check", err)
	}
	rand.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
	records = records[:int(math.Ceil(depth*float64(len(records))))]
	p := backup.Progress{TotalFiles: uint64(len(records))}
	for _, rec := range records {
		p.TotalBytes += uint64(rec.Size)
	}
	tell := telling(progress, "reading", p)
	files, bytes := uint64(0), uint64(0)
	for _, rec := range records {
		tell(files, bytes)
		err := e.readWhole(ctx, rec)
		switch {
		case errors.Is(err, tarball.ErrArchive):
			found(err)
		case err != nil:
			return report, e.failed("check backup "+rec.ID, ended(ctx, err))
		}
		files, bytes = files+1, bytes+uint64(rec.Size)
	}
	tell(files, bytes)
	if len(report.Errors) > 0 {
		report.Hint = "remove the backups that are named, and back up their volumes again"
	}
	return report, nil
}

// sizes returns the records whose archives are there and as large as they should be.
func (e *Engine) sizes(ctx context.Context, records []record, found func(error)) (good []record, err error) {
	objects, err := e.store.list(ctx, "")
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, o := range objects {
		sizes[o.name()] = o.size
	}
	for _, rec := range records {
		name := archiveName(rec.Volume, rec.ID)
		size, there := sizes[name]
		_, recorded := sizes[recordName(rec.Volume, rec.ID)]
		switch {
		case !recorded: // forgotten meanwhile
		case !there:
			found(fmt.Errorf("backup %s of volume %s: %s is missing", rec.ID, rec.Volume, name))
		case size != rec.Size:
			found(fmt.Errorf("backup %s of volume %s: %s has %d bytes, want %d", rec.ID, rec.Volume, name, size, rec.Size))
		default:
			good = append(good, rec)
		}
	}
	return good, nil
}

// readWhole compares the archive of a backup with its record. One that was forgotten
// meanwhile is good.
func (e *Engine) readWhole(ctx context.Context, rec record) error {
	r, err := e.store.open(ctx, archiveName(rec.Volume, rec.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	sum := &counted{hash: sha256.New()}
	if _, err := io.Copy(sum, slowed(ctx, r, e.down)); err != nil {
		return err
	}
	return sum.compare(rec)
}
