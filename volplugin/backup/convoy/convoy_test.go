package convoy_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup/convoy"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// put stores a backup as convoy does. change may alter what its file says.
func put(t testing.TB, dir, volume, name, data, created string, change func(map[string]any)) {
	t.Helper()
	filled := volume + "!!!!"
	at := filepath.Join("convoy-objectstore/volumes", filled[:2], filled[2:4], volume)
	archive := filepath.Join(at, "BackupFiles", name+".bak")
	for _, sub := range []string{"backups", "BackupFiles"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, at, sub), 0o755))
	}
	write := func(path string, what map[string]any) {
		t.Helper()
		text, err := json.Marshal(what)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, path), text, 0o644))
	}
	write(filepath.Join(at, "volume.cfg"), map[string]any{"Name": volume, "Driver": "vfs", "Size": "0", "CreatedTime": created})
	what := map[string]any{
		"Name": name, "Driver": "vfs", "VolumeName": volume, "SnapshotName": "snap", "SnapshotCreatedAt": created, "CreatedTime": created,
		"SingleFile": map[string]string{"FilePath": archive},
	}
	if change != nil {
		change(what)
	}
	write(filepath.Join(at, "backups", "backup_"+name+".cfg"), what)
	out, err := exec.CommandContext(context.Background(), "tar", "-C", data, "-czf", filepath.Join(dir, archive), ".").CombinedOutput()
	assert.NilError(t, err, "%s", out)
}

func data(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o640))
	assert.NilError(t, os.Chown(dir, 33, 44))
	assert.NilError(t, os.Chmod(dir, 0o751))
	return dir
}

func open(t testing.TB, dir string) *convoy.Store {
	t.Helper()
	s, err := convoy.Open(dir)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestBackupsAreListedAndExtracted(t *testing.T) {
	dir, from := t.TempDir(), data(t)
	put(t, dir, "vol1", "backup-b", from, "Tue Jan 02 15:04:05 +0000 2018", nil)
	put(t, dir, "vol1", "backup-a", from, "Wed Jan 03 15:04:05 +0100 2018", nil)
	put(t, dir, "v", "backup-c", from, "some time", nil)
	s := open(t, dir)
	all, others, err := s.List(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, len(others), 0, "%q", others)
	got := []string{}
	for _, b := range all {
		got = append(got, b.Volume+"/"+b.Name)
		assert.Assert(t, b.Size > 0)
		assert.Equal(t, b.Snapshot, "snap")
	}
	assert.DeepEqual(t, got, []string{"v/backup-c", "vol1/backup-b", "vol1/backup-a"})
	assert.Assert(t, all[0].Time.IsZero())
	assert.Equal(t, all[2].Time.UTC().String(), "2018-01-03 14:04:05 +0000 UTC")

	ref, err := convoy.ParseURL("vfs://" + dir + "/?backup=backup-a&volume=vol1")
	assert.NilError(t, err)
	assert.Equal(t, ref.Dir, dir)
	b, err := s.Find(ref.Volume, ref.Backup)
	assert.NilError(t, err)
	assert.DeepEqual(t, b.Name, "backup-a")
	archive, err := s.Archive(b)
	assert.NilError(t, err)
	defer archive.Close()
	r, err := tarball.Decompress(archive)
	assert.NilError(t, err)
	defer r.Close()
	to := t.TempDir()
	top, err := rooted.Open(to)
	assert.NilError(t, err)
	defer top.Close()
	_, err = tarball.Extract(t.Context(), r, top, tarball.Options{Layout: tarball.Foreign})
	assert.NilError(t, err)
	text, err := os.ReadFile(filepath.Join(to, "file"))
	assert.NilError(t, err)
	assert.Equal(t, string(text), "content")
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(to, &st))
	assert.Equal(t, st.Uid, uint32(33))
	assert.Equal(t, st.Mode&0o7777, uint32(0o751))
}

func TestHostileStoresStayInside(t *testing.T) {
	dir, from := t.TempDir(), data(t)
	away := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(away, "secret.bak"), []byte("secret"), 0o600))
	before := nastytree.List(t, away)
	archive := func(path string) func(map[string]any) {
		return func(what map[string]any) { what["SingleFile"] = map[string]string{"FilePath": path} }
	}
	put(t, dir, "good", "backup-good", from, "", nil)
	put(t, dir, "path1", "backup-1", from, "", archive("../../../../../../../../.."+away+"/secret.bak"))
	put(t, dir, "path2", "backup-1", from, "", archive(away+"/secret.bak"))
	put(t, dir, "path3", "backup-1", from, "", archive(".."))
	put(t, dir, "path4", "backup-1", from, "", archive(""))
	put(t, dir, "other", "backup-1", from, "", func(what map[string]any) { what["VolumeName"] = "good" })
	put(t, dir, "named", "backup-1", from, "", func(what map[string]any) { what["Name"] = "backup-good" })
	put(t, dir, "blocks", "backup-1", from, "", func(what map[string]any) { what["Driver"] = "devicemapper" })
	put(t, dir, "linked", "backup-1", from, "", nil)
	bak := filepath.Join(dir, "convoy-objectstore/volumes/li/nk/linked/BackupFiles/backup-1.bak")
	assert.NilError(t, os.Remove(bak))
	assert.NilError(t, os.Symlink(filepath.Join(away, "secret.bak"), bak))
	put(t, dir, "piped", "backup-1", from, "", nil)
	bak = filepath.Join(dir, "convoy-objectstore/volumes/pi/pe/piped/BackupFiles/backup-1.bak")
	assert.NilError(t, os.Remove(bak))
	assert.NilError(t, unix.Mkfifo(bak, 0o600))
	put(t, dir, "large", "backup-1", from, "", func(what map[string]any) { what["SnapshotName"] = strings.Repeat("x", 2<<20) })
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "convoy-objectstore/volumes/xx/yy/wrong/backups"), 0o755))
	assert.NilError(t, os.Symlink(away, filepath.Join(dir, "convoy-objectstore/volumes/xx/link")))
	s := open(t, dir)
	all, others, err := s.List(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, len(all), 1)
	assert.Equal(t, all[0].Name, "backup-good")
	assert.Assert(t, len(others) >= 11, "%d: %q", len(others), others)
	for _, name := range []string{"", "..", "../..", "a/b", "*", "missing"} {
		_, err := s.Find(name, "backup-1")
		assert.Assert(t, errdefs.IsNotFound(err), "%q: %v", name, err)
		_, err = s.Find("good", name)
		assert.Assert(t, errdefs.IsNotFound(err), "%q: %v", name, err)
	}
	assert.DeepEqual(t, nastytree.List(t, away), before)
	_, err = convoy.Open(away)
	assert.Assert(t, errdefs.IsNotFound(err))
	_, err = convoy.Open(filepath.Join(away, "missing"))
	assert.Assert(t, errdefs.IsNotFound(err))
}

func TestURLs(t *testing.T) {
	ref, err := convoy.ParseURL("vfs:///opt/backup?backup=backup-1&volume=v")
	assert.NilError(t, err)
	assert.DeepEqual(t, ref, convoy.Reference{Dir: "/opt/backup", Volume: "v", Backup: "backup-1"})
	ref, err = convoy.ParseURL("vfs:///opt/backup/")
	assert.NilError(t, err)
	assert.DeepEqual(t, ref, convoy.Reference{Dir: "/opt/backup"})
	for _, text := range []string{
		"s3://bucket@region/path?backup=b&volume=v", "vfs://host/dir", "vfs:relative", "/opt/backup", "vfs:///d?backup=b", "vfs:///d?volume=v",
		"vfs:///d?backup=../b&volume=v", "vfs:///d?backup=b&volume=..", "vfs:///d?%zz", "", "\x00",
	} {
		_, err := convoy.ParseURL(text)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", text, err)
	}
}
