package volplugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/convoy"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// imports are the volumes that requests of this process make of archives, by UUID.
type imports struct {
	mu sync.Mutex
	by map[string]*importing
}

func newImports() *imports { return &imports{by: map[string]*importing{}} }

// importing is one of them.
type importing struct {
	// archive is decompressed, and read once; nil when the volume's Source says where it
	// is.
	archive io.Reader
	options tarball.Options
	// got is what was extracted, and is there when the volume is whole.
	got tarball.Extracted
}

func (i *imports) put(uuid string, one *importing) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.by[uuid] = one
}

// get is nil for a volume whose request is not of this process, or has ended.
func (i *imports) get(uuid string) *importing {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.by[uuid]
}

func (i *imports) drop(uuid string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.by, uuid)
}

// errImportLost is why a volume is broken whose archive was not read to its end.
var errImportLost = fault.Conflict("the import was interrupted, and its archive is not sent again; remove the volume and import again")

// errNothingIn keeps an archive from becoming an empty volume by mistake.
var errNothingIn = fault.Invalid("there is nothing in the archive, or nothing that has as many leading components in its path as are stripped")

// ImportVolume implements control.BackupAdmin.
func (d *Driver) ImportVolume(ctx context.Context, req control.ImportRequest, archive io.Reader, tell func(control.Progress)) (out control.Import, err error) {
	if err := d.importable(req.Name, req.Options); err != nil {
		return out, err
	}
	content, err := tarball.Decompress(archive)
	if err != nil {
		return out, fmt.Errorf("read the archive: %w", err)
	}
	defer content.Close()
	one := &importing{options: tarball.Options{Layout: tarball.Foreign, Strip: req.Strip}}
	var manifest *backup.Manifest
	if manifest, one.archive, err = beginning(content); err != nil {
		return out, err
	}
	given := map[string]string{}
	if manifest != nil {
		if req.Strip > 0 {
			return out, fault.Invalid("nothing is stripped from the paths of an archive that Berth has made: it is of volume %s, and is imported as it was", manifest.Volume)
		}
		one.options.Layout = tarball.Volume
		given = restoredOptions(manifest.Options)
	}
	maps.Copy(given, req.Options)
	return d.makeImported(ctx, req.Name, given, one, func(spec *options.Spec) { spec.FromArchive = true }, tell)
}

// importable refuses what no archive could make up for.
func (d *Driver) importable(name string, given map[string]string) error {
	if d.backups == nil {
		return errNoBackups
	}
	if err := volume.CheckName(name); err != nil {
		return err
	}
	for _, option := range []string{"from", "seed", "from-backup"} {
		if _, ok := given[option]; ok {
			return fault.Invalid("option %s does not go with an import", option)
		}
	}
	if d.ledger.owner(name) != "" {
		return fault.Conflict("volume %s exists already", name)
	}
	return nil
}

// beginning looks whether an archive is one of a volume of Berth's: manifest is nil if
// not. What is wrong with an archive is told by who reads all of it.
func beginning(content io.Reader) (manifest *backup.Manifest, archive io.Reader, err error) {
	var read bytes.Buffer
	text, err := tarball.ReadManifest(io.TeeReader(content, &read))
	archive = io.MultiReader(&read, content)
	if err != nil {
		return nil, archive, nil //nolint:nilerr // it is somebody else's, or the same error comes again
	}
	found, err := backup.DecodeManifest(text)
	if err != nil {
		return nil, nil, fault.Invalid("the archive begins with a file %s, as those of Berth do: %w", backup.ManifestName, err)
	}
	return &found, archive, nil
}

// makeImported makes a volume of an archive and returns when it is whole. source says in
// its options where that is.
func (d *Driver) makeImported(ctx context.Context, name string, given map[string]string, one *importing, source func(*options.Spec), tell func(control.Progress)) (out control.Import, err error) {
	var made string
	defer func() { d.imports.drop(made) }()
	out.Volume, err = d.makeFilled(ctx, name, given, tell, func(ctx context.Context, root *volume.Root, spec options.Spec) (volume.Record, error) {
		source(&spec)
		rec, begun, err := root.CreateBegin(ctx, name, spec)
		if err == nil && !begun {
			err = fault.Conflict("volume %s exists already", name)
		}
		if err == nil {
			made = rec.UUID
			d.imports.put(made, one)
		}
		return rec, err
	})
	if err != nil {
		return control.Import{}, err
	}
	out.Files, out.Bytes, out.Missing = one.got.Files, one.got.Bytes, one.got.Missing
	out.Lost, out.LostSome = one.got.Lost, one.got.LostSome
	return out, nil
}

// ImportConvoy implements control.BackupAdmin.
func (d *Driver) ImportConvoy(ctx context.Context, req control.ConvoyRequest, tell func(control.Progress)) (out control.Import, err error) {
	if err := d.importable(req.Name, req.Options); err != nil {
		return out, err
	}
	from, err := convoy.Open(req.Directory)
	if err != nil {
		return out, err
	}
	found, err := pickConvoy(ctx, from, req)
	if err := errors.Join(err, from.Close()); err != nil {
		return out, err
	}
	source := convoy.Reference{Dir: req.Directory, Volume: found.Volume, Backup: found.Name}.String()
	one := &importing{options: tarball.Options{Layout: tarball.Foreign}}
	return d.makeImported(ctx, req.Name, req.Options, one, func(spec *options.Spec) { spec.FromBackup = source }, tell)
}

// maxShown bounds how many backups an error lists.
const maxShown = 100

// pickConvoy finds the one backup that is meant.
func pickConvoy(ctx context.Context, from *convoy.Store, req control.ConvoyRequest) (convoy.Backup, error) {
	if req.Volume != "" && req.Backup != "" {
		return from.Find(req.Volume, req.Backup)
	}
	all, others, err := from.List(ctx)
	if err != nil {
		return convoy.Backup{}, err
	}
	all = slices.DeleteFunc(all, func(b convoy.Backup) bool {
		return req.Volume != "" && b.Volume != req.Volume || req.Backup != "" && b.Name != req.Backup
	})
	if len(all) == 1 {
		return all[0], nil
	}
	var list []string
	for _, b := range all {
		made := "at an unknown time"
		if !b.Time.IsZero() {
			made = b.Time.UTC().Format(time.RFC3339)
		}
		list = append(list, fmt.Sprintf("volume %s, backup %s, made %s, %s", b.Volume, b.Name, made, units.HumanSize(float64(b.Size))))
	}
	if len(list) == 0 {
		for _, other := range others {
			list = append(list, "not usable: "+other)
		}
	}
	if more := len(list) - maxShown; more > 0 {
		list = append(list[:maxShown], fmt.Sprintf("and %d more", more))
	}
	text := ""
	if len(list) > 0 {
		text = ":\n" + strings.Join(list, "\n")
	}
	if len(all) == 0 {
		return convoy.Backup{}, fault.NotFound("convoy's store in %s has no such backup%s", req.Directory, text)
	}
	return convoy.Backup{}, fault.Invalid("convoy's store in %s has %d backups that could be meant; name the volume and the backup%s", req.Directory, len(all), text)
}

// importInto is restoreInto for volumes that are made of archives.
func (d *Driver) importInto(ctx context.Context, rec volume.Record, dst *rooted.Dir, progress func(engine.Progress)) error {
	one := d.imports.get(rec.UUID)
	if one == nil || one.archive == nil {
		return errImportLost
	}
	// There is no second time, whatever comes of the first.
	d.imports.drop(rec.UUID)
	return d.extractInto(ctx, rec, one, one.archive, dst, progress)
}

// convoyInto is restoreInto for volumes that are made of backups of convoy's.
func (d *Driver) convoyInto(ctx context.Context, rec volume.Record, dst *rooted.Dir, progress func(engine.Progress)) (err error) {
	one := d.imports.get(rec.UUID)
	if one == nil {
		// Nobody waits for the volume any more.
		one = &importing{options: tarball.Options{Layout: tarball.Foreign}}
	}
	ref, err := convoy.ParseURL(rec.Source.Backup)
	if err != nil {
		return err
	}
	from, err := convoy.Open(ref.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	found, err := from.Find(ref.Volume, ref.Backup)
	if err != nil {
		return err
	}
	archive, err := from.Archive(found)
	if err != nil {
		return err
	}
	defer archive.Close()
	content, err := tarball.Decompress(archive)
	if err != nil {
		return err
	}
	defer content.Close()
	return d.extractInto(ctx, rec, one, content, dst, progress)
}

// extractInto makes the data of a volume of an archive, and syncs it.
func (d *Driver) extractInto(ctx context.Context, rec volume.Record, one *importing, archive io.Reader, dst *rooted.Dir, progress func(engine.Progress)) error {
	o := one.options
	if progress != nil {
		o.Progress = func(files, bytes uint64) { progress(engine.Progress{Files: files, Bytes: bytes}) }
	}
	got, err := tarball.Extract(ctx, archive, dst, o)
	if err != nil {
		return err
	}
	if got.Files+got.Dirs+got.Others == 0 {
		return errNothingIn
	}
	log := d.cfg.Log.WithField("volume", rec.Name)
	log.Infof("imported %d files", got.Files)
	if got.Lost > 0 {
		log.Warnf("%d extended attributes cannot be stored in the volume's file system: %s", got.Lost, strings.Join(got.LostSome, "; "))
	}
	one.got = got
	return unix.Syncfs(dst.FD())
}
