package tarball

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A Layout says what an archive has at its top.
type Layout int

const (
	// Detect takes an archive that begins with a manifest of Berth's for one of a volume,
	// and all others for foreign.
	Detect Layout = iota
	// Volume is what Write makes: manifest.json, and the volume as data. Anything else
	// at the top is an error.
	Volume
	// Foreign archives are all of them the content of a volume.
	Foreign
)

// Options of Extract. The zero value is good.
type Options struct {
	Layout Layout
	// Strip is how many leading components of the paths in a foreign archive are cut
	// off. Entries that have fewer are left out; what has just as many and is a directory
	// is the top.
	Strip int
	// Paths below the top limit what is extracted to these, what is below them, and the
	// directories above them. One that is not in the archive is an error that wraps
	// fs.ErrNotExist.
	Paths []string
	// Again opens the archive, decompressed, once more. It is needed for Paths: what they select may be
	// stored under another name.
	Again func() (io.ReadCloser, error)
	// MaxBytes bounds the sum of the sizes of all files, holes included; 0 is for 64 TiB. A
	// hole of an archive is quickly written, and takes its time to be extracted.
	MaxBytes uint64
	// Progress is called now and then with the files and bytes so far.
	Progress func(files, bytes uint64)
}

// Extracted tells what was extracted.
type Extracted struct {
	// Manifest is the text of the one in the archive, nil for none. Nobody vouches for it.
	Manifest []byte
	// Files counts names of regular files, Dirs directories, Bytes the size of the files.
	// Others counts what is neither.
	Files, Dirs, Bytes, Others uint64
	// Lost counts extended attributes that the target could not store.
	Lost     uint64
	LostSome []string
	// Missing counts files of which the archive says that they could not be read.
	Missing uint64
}

// maxManifest bounds a manifest, in bytes; package backup says how large one is.
const maxManifest = 1 << 20

// maxBytes is Options.MaxBytes unless another is given.
const maxBytes = 64 << 40

// ErrArchive is wrapped by errors that tell of something wrong in the archive and not
// in the place that it is extracted to.
var ErrArchive = errors.New("the archive is damaged or not one of a volume")

// Extract extracts the archive r, decompressed, into dst, which should be empty and known
// to nobody else: what has the name of an entry and its kind is replaced. dst itself gets the owner, mode,
// times and attributes that the archive has for it. When Extract returns without an error, r has been read to
// its end and all that was asked for is in dst, though not synced to the disk. After an error, among them
// ctx's, dst has some part of it.
func Extract(ctx context.Context, r io.Reader, dst *rooted.Dir, o Options) (Extracted, error) {
	for _, path := range o.Paths {
		if err := checkPath(path); err != nil {
			return Extracted{}, err
		}
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = maxBytes
	}
	x := newExtractor(ctx, dst, o)
	defer x.close()
	err := x.all(r)
	x.progress.last(x.Files, x.Bytes)
	return x.Extracted, err
}

type extractor struct {
	Extracted
	place
	ctx      context.Context //nolint:containedctx // of one call of Extract
	options  Options
	layout   Layout
	found    []bool // of options.Paths
	progress ticker
	// extracted is the sum of the sizes so far, of what was replaced too.
	extracted uint64
	// elsewhere are the selected names of files that are stored under a name, the key,
	// that is not selected.
	elsewhere map[string][]string
}

func newExtractor(ctx context.Context, dst *rooted.Dir, o Options) *extractor {
	return &extractor{
		ctx: ctx, options: o, layout: o.Layout, place: newPlace(dst), found: make([]bool, len(o.Paths)),
		progress: ticker{tell: o.Progress}, elsewhere: map[string][]string{},
	}
}

// all extracts the archive.
func (x *extractor) all(r io.Reader) error {
	if err := x.each(r, x.entry); err != nil {
		return err
	}
	for i, found := range x.found {
		if !found {
			return fault.NotFound("path %s: %w in the archive", shown(x.options.Paths[i]), fs.ErrNotExist)
		}
	}
	if len(x.elsewhere) > 0 {
		if err := x.again(); err != nil {
			return err
		}
	}
	return x.leaveAll()
}

// again extracts what is stored under names that are not selected.
func (x *extractor) again() error {
	if x.options.Again == nil {
		return fmt.Errorf("%d selected files are stored under names that are not selected", len(x.elsewhere))
	}
	r, err := x.options.Again()
	if err != nil {
		return err
	}
	defer r.Close()
	err = x.each(r, func(h *tar.Header, content io.Reader) error {
		if h.Typeflag == tar.TypeXGlobalHeader || x.layout == Volume && h.Name == backup.ManifestName {
			return nil
		}
		path, ok, err := x.path(h.Name)
		names := x.elsewhere[path]
		if !ok || err != nil || len(names) == 0 {
			return err
		}
		delete(x.elsewhere, path)
		if err := x.make(h, names[0], content); err != nil {
			return err
		}
		for _, name := range names[1:] {
			if err := x.hardLinkTo(name, names[0]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for first, names := range x.elsewhere {
		return fmt.Errorf("%w: %s is another name of %s, which is not there", ErrArchive, shown(names[0]), shown(first))
	}
	return nil
}

// maxElsewhere bounds the memory for names that wait for their content.
const maxElsewhere = 1 << 20

// maxTrailing is what may follow an archive, in bytes: tar fills its last record.
const maxTrailing = 16 << 20

// each calls do for the entries of an archive, which is read to its end.
func (x *extractor) each(r io.Reader, do func(h *tar.Header, content io.Reader) error) error {
	whole := &reader{ctx: x.ctx, r: r}
	r = whole
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			if whole.ended {
				// It was cut off between two entries: there are two empty blocks at the end.
				return x.unreadable(io.ErrUnexpectedEOF)
			}
			break
		}
		if err != nil {
			return x.unreadable(err)
		}
		if err := do(h, archive); err != nil {
			return err
		}
	}
	// The sums of a compression come at its end.
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxTrailing+1))
	if err != nil {
		return x.unreadable(err)
	}
	if n > maxTrailing {
		return fmt.Errorf("%w: more follows its end", ErrArchive)
	}
	return nil
}

// unreadable words an error of reading the archive.
func (x *extractor) unreadable(err error) error {
	if ended := x.ctx.Err(); ended != nil {
		return ended
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", ErrArchive, err)
	}
	return fmt.Errorf("read the archive: %w", err)
}

// entry extracts one.
func (x *extractor) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if x.layout == Detect || x.layout == Volume && h.Name == backup.ManifestName {
		took, err := x.manifest(h, content)
		if took || err != nil {
			return err
		}
		// What Detect has read is not lost: it was no manifest, and is no file of a megabyte.
		content = io.MultiReader(strings.NewReader(string(x.Manifest)), content)
		x.Manifest = nil
	}
	path, ok, err := x.path(h.Name)
	if !ok || err != nil {
		return err
	}
	if len(x.options.Paths) > 0 && !x.selected(path) {
		return nil
	}
	if reason, marked := h.PAXRecords[missing]; marked && reason != "" {
		x.Missing++
		size, err := x.remove(path)
		if err == nil && size >= 0 {
			x.Files--
			x.Bytes -= uint64(size)
		}
		return err
	}
	return x.make(h, path, content)
}

// manifest takes the entry as the manifest if it is one. If not, Manifest holds what was
// read of it.
func (x *extractor) manifest(h *tar.Header, content io.Reader) (took bool, err error) {
	detect := x.layout == Detect
	if detect {
		x.layout = Foreign
	}
	if h.Name == backup.ManifestName && h.Typeflag == tar.TypeReg && h.Size <= maxManifest {
		if x.Manifest, err = io.ReadAll(content); err != nil {
			return false, x.unreadable(err)
		}
		if !detect {
			return true, nil
		}
		if _, err := backup.DecodeManifest(x.Manifest); err == nil {
			x.layout = Volume
			return true, nil
		}
	}
	if detect {
		return false, nil
	}
	return false, fmt.Errorf("%w: its manifest is no file of at most %d bytes", ErrArchive, maxManifest)
}

// path is that of an entry, or of a link's target, below the volume's top. ok is false for what is left out.
func (x *extractor) path(name string) (path string, ok bool, err error) {
	path, err = clean(name)
	if err != nil {
		return "", false, fmt.Errorf("%w: %w", ErrArchive, err)
	}
	if x.layout == Volume {
		if strings.HasPrefix(name, "/") || !within(path, backup.DataName) {
			return "", false, fmt.Errorf("%w: it has an entry %s", ErrArchive, shown(name))
		}
		return strings.TrimPrefix(path[len(backup.DataName):], "/"), true, nil
	}
	for range x.options.Strip {
		if path == "" {
			return "", false, nil
		}
		_, path, _ = strings.Cut(path, "/")
	}
	return path, true, nil
}

// selected tells whether an entry is one of the paths, below or above one.
func (x *extractor) selected(path string) bool {
	some := false
	for i, want := range x.options.Paths {
		if within(path, want) {
			x.found[i] = true
			some = true
		} else if within(want, path) {
			some = true
		}
	}
	return some
}

// make makes the entry h at a path.
func (x *extractor) make(h *tar.Header, path string, content io.Reader) error {
	kind, ok := typeOf(h)
	if !ok {
		return fmt.Errorf("%w: %s is of a kind %q that is not known", ErrArchive, shown(path), h.Typeflag)
	}
	if path == "" && kind != unix.S_IFDIR {
		return fmt.Errorf("%w: its top is no directory", ErrArchive)
	}
	if kind == 0 {
		return x.hardLink(h, path)
	}
	f, err := fileOf(h, kind)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrArchive, shown(path), err)
	}
	above := len(x.options.Paths) > 0 && !x.below(path)
	switch kind {
	case unix.S_IFDIR:
		err = x.dir(path, f)
		x.Dirs++
	case unix.S_IFREG:
		if above {
			// The path goes on below what is a file here.
			return nil
		}
		// archive/tar refuses negative sizes.
		if x.extracted += uint64(h.Size); x.extracted > x.options.MaxBytes {
			return fmt.Errorf("%w: with %s its files have more than %d bytes", ErrArchive, shown(path), x.options.MaxBytes)
		}
		err = x.regular(path, f, h.Size, &source{x: x, r: content})
		x.Files++
		x.Bytes += uint64(h.Size)
		x.progress.tick(x.Files, x.Bytes)
	default:
		if above {
			return nil
		}
		err = x.node(path, f)
		x.Others++
	}
	if lost := f.lost; len(lost) > 0 {
		x.Lost += uint64(len(lost))
		if len(x.LostSome) < maxMissing {
			x.LostSome = append(x.LostSome, shown(path)+": "+strings.Join(lost, ", "))
		}
	}
	return err
}

// below tells whether a path is one of the selected or below one.
func (x *extractor) below(path string) bool {
	for _, want := range x.options.Paths {
		if within(path, want) {
			return true
		}
	}
	return false
}

// hardLink makes another name of a file.
func (x *extractor) hardLink(h *tar.Header, path string) error {
	first, ok, err := x.path(h.Linkname)
	if err != nil {
		return err
	}
	if !ok || first == "" {
		return fmt.Errorf("%w: %s is a link to %s, which is not in the volume", ErrArchive, shown(path), shown(h.Linkname))
	}
	if len(x.options.Paths) > 0 {
		if !x.below(path) {
			return nil
		}
		if !x.below(first) {
			if len(x.elsewhere) >= maxElsewhere {
				return fmt.Errorf("more than %d files are selected that are stored under other names", maxElsewhere)
			}
			x.elsewhere[first] = append(x.elsewhere[first], path)
			return nil
		}
	}
	return x.hardLinkTo(path, first)
}

func (x *extractor) hardLinkTo(path, first string) error {
	st, err := x.link(path, first)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
		x.Files++
		x.Bytes += uint64(st.Size)
	}
	return err
}

// source is the content of an entry. Its errors are the archive's.
type source struct {
	x    *extractor
	r    io.Reader
	read uint64
}

// Read implements io.Reader.
func (s *source) Read(buf []byte) (int, error) {
	n, err := s.r.Read(buf)
	s.read += uint64(n)
	s.x.progress.tick(s.x.Files, s.x.Bytes+s.read)
	if err != nil && !errors.Is(err, io.EOF) {
		err = s.x.unreadable(err)
	}
	return n, err
}

// reader ends with its context.
type reader struct {
	ctx context.Context //nolint:containedctx // of one call of Extract
	r   io.Reader
	// ended: nothing more came.
	ended bool
}

// Read implements io.Reader.
func (r *reader) Read(buf []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(buf)
	r.ended = r.ended || n == 0 && errors.Is(err, io.EOF)
	return n, err
}

// ReadManifest reads the manifest that an archive of a volume begins with, and nothing
// that comes after it. Nobody vouches for it.
func ReadManifest(r io.Reader) ([]byte, error) {
	archive := tar.NewReader(r)
	h, err := archive.Next()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrArchive, err)
	}
	if h.Name != backup.ManifestName || h.Typeflag != tar.TypeReg || h.Size > maxManifest {
		return nil, fmt.Errorf("%w: it does not begin with a manifest", ErrArchive)
	}
	return io.ReadAll(archive)
}
