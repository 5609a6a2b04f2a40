package volplugin

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

// tarOf makes an archive of files by their names; names that end with a slash are
// directories.
func tarOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range names {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o640, Uid: 33, Gid: 33, Size: int64(len(name))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Size, h.Mode = tar.TypeDir, 0, 0o751
		}
		assert.NilError(t, w.WriteHeader(h))
		if h.Size > 0 {
			_, err := io.WriteString(w, name)
			assert.NilError(t, err)
		}
	}
	assert.NilError(t, w.Close())
	return out.Bytes()
}

func newArchiver(t *testing.T) *keeper {
	t.Helper()
	return newKeeper(t, filepath.Join(t.TempDir(), "repository"))
}

func (k *keeper) export(name, compress string) []byte {
	k.t.Helper()
	var out bytes.Buffer
	done, err := k.ExportVolume(k.t.Context(), control.ExportRequest{Volume: name, Compress: compress}, &out, quiet)
	assert.NilError(k.t, err)
	assert.Equal(k.t, done.MissingCount, uint64(0), "%v", done.Missing)
	return out.Bytes()
}

func (k *keeper) importOf(name string, archive []byte, change func(*control.ImportRequest)) (control.Import, error) {
	req := control.ImportRequest{Name: name}
	if change != nil {
		change(&req)
	}
	return k.ImportVolume(k.t.Context(), req, bytes.NewReader(archive), quiet)
}

func TestAnExportIsImportedAsTheSameVolume(t *testing.T) {
	k := newArchiver(t)
	assert.NilError(t, k.create("web", "label.app=shop", "protect=true"))
	path, err := k.mount("web", "id")
	assert.NilError(t, err)
	nastytree.Make(t, path)
	// The zeros of its hole of 1 TiB take minutes.
	assert.NilError(t, os.Remove(filepath.Join(path, "files/huge")))
	for _, compress := range []string{"", control.CompressNone} {
		archive := k.export("web", compress)
		assert.DeepEqual(t, k.left("web"), []string{})
		other := newArchiver(t)
		done, err := other.importOf("copy", archive, nil)
		assert.NilError(t, err)
		assert.Assert(t, done.Files > 0)
		assert.Equal(t, done.Lost, uint64(0), "%v", done.LostSome)
		assert.Assert(t, done.Volume.Protect)
		assert.Equal(t, done.Volume.Labels["app"], "shop")
		assert.Assert(t, done.Volume.Source.Archive)
		got, err := other.mount("copy", "id")
		assert.NilError(t, err)
		nastytree.CompareLoosely(t, path, got)
		assert.NilError(t, other.unmount("copy", "id"))
	}
	assert.NilError(t, k.unmount("web", "id"))

	done, err := k.importOf("plain", k.export("web", ""), func(r *control.ImportRequest) { r.Options = map[string]string{"protect": "false"} })
	assert.NilError(t, err)
	assert.Assert(t, !done.Volume.Protect)
	packed := k.export("web", "")
	_, err = k.importOf("plain", packed, nil)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = k.importOf("x", packed, func(r *control.ImportRequest) { r.Strip = 1 })
	assert.ErrorContains(t, err, "nothing is stripped from the paths of an archive that Berth has made")
	_, err = k.importOf("x", packed, func(r *control.ImportRequest) { r.Options = map[string]string{"from": "web"} })
	assert.ErrorContains(t, err, "option from does not go with an import")
	assert.DeepEqual(t, k.list(), []string{"plain", "web"})
}

func TestASnapshotIsExportedAndStays(t *testing.T) {
	k := newArchiver(t)
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	_, err := k.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "before"}, quiet)
	assert.NilError(t, err)
	k.put("web", "f", "two")
	var out bytes.Buffer
	_, err = k.ExportVolume(t.Context(), control.ExportRequest{Volume: "web", Snapshot: "before"}, &out, quiet)
	assert.NilError(t, err)
	_, err = k.importOf("old", out.Bytes(), nil)
	assert.NilError(t, err)
	assert.Equal(t, k.content("old", "f"), "one")
	assert.DeepEqual(t, k.snapshots("web"), []string{"before"})
	_, err = k.ExportVolume(t.Context(), control.ExportRequest{Volume: "web", Snapshot: "after"}, io.Discard, quiet)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	_, err = k.ExportVolume(t.Context(), control.ExportRequest{Volume: "nobody"}, io.Discard, quiet)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
}

// goneWriter is a client that has gone.
type goneWriter struct{ err error }

func (w goneWriter) Write([]byte) (int, error) { return 0, w.err }

func TestAnExportThatNobodyTakesLeavesNothing(t *testing.T) {
	k := newArchiver(t)
	assert.NilError(t, k.create("web"))
	k.put("web", "f", strings.Repeat("one", 1000))
	gone := errors.New("broken pipe")
	for _, compress := range []string{"", control.CompressNone} {
		_, err := k.ExportVolume(t.Context(), control.ExportRequest{Volume: "web", Compress: compress}, goneWriter{gone}, quiet)
		assert.ErrorIs(t, err, gone)
		assert.DeepEqual(t, k.left("web"), []string{})
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := k.ExportVolume(ctx, control.ExportRequest{Volume: "web"}, io.Discard, func(control.Progress) { cancel() })
	if err == nil {
		cancel() // it was told nothing before the end
	}
	within(t, func() error {
		k.tend(t.Context())
		list, err := k.Snapshots(t.Context(), "web")
		if err == nil && len(list) > 0 {
			err = errors.New("snapshot " + list[0].Name + " is left")
		}
		return err
	})
}

func TestArchivesOfOthersAreImported(t *testing.T) {
	k := newArchiver(t)
	old := tarOf(t, "dbdata/", "dbdata/sub/", "dbdata/sub/f")
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	_, err := w.Write(old)
	assert.NilError(t, err)
	assert.NilError(t, w.Close())
	for name, archive := range map[string][]byte{"plain": old, "gzip": zipped.Bytes()} {
		done, err := k.importOf(name, archive, func(r *control.ImportRequest) { r.Strip = 1 })
		assert.NilError(t, err)
		assert.Equal(t, done.Files, uint64(1))
		assert.Equal(t, k.content(name, "sub/f"), "dbdata/sub/f")
		path, err := k.mount(name, "id")
		assert.NilError(t, err)
		assert.Equal(t, owner(t, path), 33)
		assert.NilError(t, k.unmount(name, "id"))
	}
}

// Half of an archive, nothing, or something else is no volume, and never an empty one.
func TestArchivesThatAreNotWholeMakeNoVolume(t *testing.T) {
	k := newArchiver(t)
	assert.NilError(t, k.create("web"))
	k.put("web", "f", strings.Repeat("content", 1000))
	plain, packed := k.export("web", control.CompressNone), k.export("web", "")
	others := tarOf(t, "a", "b")
	for name, archive := range map[string][]byte{
		"nothing": {}, "zeros": make([]byte, 2048), "words": []byte(strings.Repeat("words ", 1000)),
		"half": plain[:len(plain)/2], "half packed": packed[:len(packed)/2], "nearly packed": packed[:len(packed)-1],
		"between entries": others[:1024], "without end": others[:2048], "in its end": plain[:len(plain)-512],
		"xz":     append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, plain...),
		"hidden": tarOf(t, "../x"),
	} {
		_, err := k.importOf("copy", archive, nil)
		assert.Assert(t, err != nil, name)
		assert.DeepEqual(t, k.list(), []string{"web"})
	}
	_, err := k.importOf("copy", others, func(r *control.ImportRequest) { r.Strip = 2 })
	assert.ErrorContains(t, err, "there is nothing in the archive")
	newer := bytes.ReplaceAll(plain, []byte(`"schema": 1`), []byte(`"schema": 9`))
	_, err = k.importOf("copy", newer, nil)
	assert.ErrorContains(t, err, "schema 9")
	assert.DeepEqual(t, k.list(), []string{"web"})
	assert.Equal(t, len(k.imports.by), 0)
}

// killedAt starts the daemon anew, as one that is dead from a step on: it undoes nothing.
func (k *keeper) killedAt(stop string) {
	k.t.Helper()
	dead := false
	k.cfg.step = func(step, _ string) error {
		if dead = dead || step == stop; !dead {
			return nil
		}
		k.endTasks()
		return errors.New("killed")
	}
	k.restart()
}

// What was killed in the middle is never ready, never empty, and can be removed.
func TestAnImportThatIsKilledIsBroken(t *testing.T) {
	k := newArchiver(t)
	archive := tarOf(t, "a", "b")
	for _, stop := range []string{"fill.begin", "fill.create", "fill.copy", "fill.ready"} {
		k.killedAt(stop)
		_, err := k.ImportVolume(k.tasks, control.ImportRequest{Name: "copy"}, bytes.NewReader(archive), quiet)
		assert.Assert(t, err != nil, stop)
		k.cfg.step = nil
		k.restart()
		assert.DeepEqual(t, k.list(), []string{"copy"})
		within(t, func() error {
			k.tend(t.Context())
			_, err := k.mount("copy", "id")
			if err == nil {
				t.Fatalf("%s: a half imported volume is mounted", stop)
			}
			if !strings.Contains(err.Error(), "import again") {
				return err
			}
			return nil
		})
		v, err := k.Volume(t.Context(), "copy")
		assert.NilError(t, err)
		assert.Equal(t, v.State, control.VolumeBroken)
		assert.NilError(t, k.remove("copy"))
		assert.DeepEqual(t, k.list(), []string{})
	}
	_, err := k.importOf("copy", archive, nil)
	assert.NilError(t, err)
}

// putConvoy makes a backup as convoy does.
func putConvoy(t *testing.T, dir, name, backup string, archive []byte) {
	t.Helper()
	top := filepath.Join(dir, "convoy-objectstore/volumes", name[:2], name[2:4], name)
	for _, sub := range []string{"backups", "BackupFiles"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(top, sub), 0o700))
	}
	text, err := json.Marshal(map[string]any{
		"Name": backup, "Driver": "vfs", "VolumeName": name, "SnapshotName": "s", "CreatedTime": time.Unix(0, 0).UTC().Format(time.RubyDate),
		"SingleFile": map[string]string{"FilePath": "BackupFiles/" + backup + ".bak"},
	})
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(top, "backups/backup_"+backup+".cfg"), text, 0o600))
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	_, err = w.Write(archive)
	assert.NilError(t, err)
	assert.NilError(t, w.Close())
	assert.NilError(t, os.WriteFile(filepath.Join(top, "BackupFiles", backup+".bak"), zipped.Bytes(), 0o600))
}

func TestBackupsOfConvoyAreImported(t *testing.T) {
	k := newArchiver(t)
	dir := t.TempDir()
	ask := func(name, vol, backup string) (control.Import, error) {
		return k.ImportConvoy(t.Context(), control.ConvoyRequest{Name: name, Directory: dir, Volume: vol, Backup: backup}, quiet)
	}
	_, err := ask("x", "", "")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	putConvoy(t, dir, "data", "backup-1", tarOf(t, "./", "./one"))
	done, err := ask("only", "", "")
	assert.NilError(t, err)
	assert.Equal(t, done.Volume.Source.Backup, "vfs://"+dir+"?backup=backup-1&volume=data")
	assert.Equal(t, k.content("only", "one"), "./one")
	putConvoy(t, dir, "data", "backup-2", tarOf(t, "./", "./two"))
	putConvoy(t, dir, "other", "backup-3", tarOf(t, "./")[:512])
	_, err = ask("x", "data", "")
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	assert.ErrorContains(t, err, "volume data, backup backup-1, made 1970-01-01T00:00:00Z")
	assert.ErrorContains(t, err, "volume data, backup backup-2")
	_, err = ask("x", "nobody", "")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	_, err = ask("x", "other", "backup-3")
	assert.ErrorContains(t, err, "damaged")
	done, err = ask("second", "data", "backup-2")
	assert.NilError(t, err)
	assert.Equal(t, done.Files, uint64(1))
	assert.Equal(t, k.content("second", "two"), "./two")
	assert.DeepEqual(t, k.list(), []string{"only", "second"})
}

// The store is still there after a kill, so the volume is made again.
func TestAnImportFromConvoyThatIsKilledGoesOn(t *testing.T) {
	k := newArchiver(t)
	dir := t.TempDir()
	putConvoy(t, dir, "data", "backup-1", tarOf(t, "./", "./one"))
	k.killedAt("fill.ready")
	_, err := k.ImportConvoy(k.tasks, control.ConvoyRequest{Name: "copy", Directory: dir}, quiet)
	assert.Assert(t, err != nil)
	k.cfg.step = nil
	k.restart()
	within(t, func() error {
		k.tend(t.Context())
		_, err := k.mount("copy", "id")
		return err
	})
	assert.NilError(t, k.unmount("copy", "id"))
	assert.Equal(t, k.content("copy", "one"), "./one")
}
