package volplugin

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// in calls fn with the path of a volume's data, as a container sees it.
func (k *keeper) in(name string, fn func(dir string)) {
	k.t.Helper()
	path, err := k.mount(name, "in")
	assert.NilError(k.t, err)
	fn(path)
	assert.NilError(k.t, k.unmount(name, "in"))
}

// restorePaths restores paths of the newest backup in their places.
func (k *keeper) restorePaths(name string, paths ...string) (control.Restore, error) {
	return k.RestoreBackup(k.t.Context(), control.RestoreRequest{Reference: "nas/web", Name: name, InPlace: true, Paths: paths}, quiet)
}

// listed are the files below a directory, with their content, or where they lead to.
func listed(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	assert.NilError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		name := strings.TrimPrefix(strings.TrimPrefix(path, dir), "/")
		switch {
		case err != nil || name == "" || entry.IsDir() && entry.Name() == "lost+found":
		case entry.Type()&os.ModeSymlink != 0:
			files[name], err = os.Readlink(path)
		case entry.Type().IsRegular():
			files[name] = read(t, path)
		}
		return err
	}))
	return files
}

// preRestore are the snapshots that restores in place have kept.
func (k *keeper) preRestore(name string) []string {
	return slices.DeleteFunc(k.snapshots(name), func(s string) bool { return !strings.HasPrefix(s, "pre-restore-") })
}

func TestSinglePathsAreRestoredInTheirPlaces(t *testing.T) {
	for _, tc := range []struct {
		engine string
		root   func() string
		opts   []string
	}{
		{"dir", t.TempDir, []string{"engine=dir"}},
		{"reflink", func() string { return mounttest.Disk(t, "xfs", 1<<30) }, nil},
		{"btrfs", func() string { return mounttest.Disk(t, "btrfs", 1<<30) }, nil},
		{"image", func() string { return mounttest.Disk(t, "ext4", 2<<30) }, []string{"engine=image", "size=100M"}},
	} {
		t.Run(tc.engine, func(t *testing.T) {
			k := newKeeperOf(t, tc.root(), filepath.Join(t.TempDir(), "repository"), func(*Config) {})
			k.target()
			assert.NilError(t, k.create("web", tc.opts...))
			assert.Equal(t, k.ledger.view(k.home.key, "web").Record.Engine, tc.engine)
			k.in("web", func(dir string) {
				for _, file := range []string{"etc/app.conf", "etc/other", "conf/deep/a/file", "conf/deep/b/file", "conf/deep/c/file"} {
					assert.NilError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755))
					write(t, filepath.Join(dir, file), "old "+file)
				}
				assert.NilError(t, os.Chown(filepath.Join(dir, "etc/app.conf"), 70, 71))
				assert.NilError(t, os.Chown(filepath.Join(dir, "conf/deep"), 72, 73))
				assert.NilError(t, unix.Chmod(filepath.Join(dir, "conf/deep"), 0o2710))
			})
			k.backup("web")
			k.in("web", func(dir string) {
				write(t, filepath.Join(dir, "etc/other"), "new")
				write(t, filepath.Join(dir, "etc/more"), "new")
				assert.NilError(t, os.Remove(filepath.Join(dir, "etc/app.conf")))
				// What is at the place itself goes, and where it leads to stays.
				assert.NilError(t, os.Symlink("other", filepath.Join(dir, "etc/app.conf")))
				assert.NilError(t, os.RemoveAll(filepath.Join(dir, "conf")))
			})
			changed := map[string]string{"etc/app.conf": "other", "etc/other": "new", "etc/more": "new"}
			done, err := k.restorePaths("web", "etc/app.conf", "conf/deep/b/file", "conf/deep/a/file", "conf/deep/a")
			assert.NilError(t, err)
			k.in("web", func(dir string) {
				assert.DeepEqual(t, listed(t, dir), map[string]string{
					"etc/app.conf": "old etc/app.conf", "etc/other": "new", "etc/more": "new",
					"conf/deep/a/file": "old conf/deep/a/file", "conf/deep/b/file": "old conf/deep/b/file",
				})
				assert.Equal(t, owner(t, filepath.Join(dir, "etc/app.conf")), 70)
				var st unix.Stat_t
				assert.NilError(t, unix.Lstat(filepath.Join(dir, "conf/deep"), &st))
				assert.DeepEqual(t, []uint32{st.Uid, st.Gid, st.Mode & 0o7777}, []uint32{72, 73, 0o2710})
			})
			k.in("web@"+done.Kept.Name, func(dir string) { assert.DeepEqual(t, listed(t, dir), changed) })
			assert.Assert(t, k.status("web")["source"] == nil)

			// A directory is replaced as a whole.
			_, err = k.restorePaths("web", "etc")
			assert.NilError(t, err)
			k.in("web", func(dir string) {
				assert.DeepEqual(t, listed(t, filepath.Join(dir, "etc")), map[string]string{"app.conf": "old etc/app.conf", "other": "old etc/other"})
			})
		})
	}
}

func TestPathsThatCannotBeRestoredInPlaceChangeNothing(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("origin"))
	assert.NilError(t, k.create("web", "from=origin"))
	outside := t.TempDir()
	write(t, filepath.Join(outside, "app.conf"), "outside")
	k.in("web", func(dir string) {
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, "etc"), 0o755))
		write(t, filepath.Join(dir, "etc/app.conf"), "old")
		write(t, filepath.Join(dir, "f"), "old")
	})
	k.backup("web")
	k.in("web", func(dir string) {
		assert.NilError(t, os.Rename(filepath.Join(dir, "etc"), filepath.Join(dir, "etc.d")))
		assert.NilError(t, os.Symlink(outside, filepath.Join(dir, "etc")))
		write(t, filepath.Join(dir, "f"), "new")
	})
	want := map[string]string{"etc.d/app.conf": "old", "etc": outside, "f": "new"}
	long := make([]string, 900)
	for i := range long {
		long[i] = strings.Repeat("x", 100)
	}
	for _, tc := range []struct {
		paths []string
		wrap  error
		kind  func(error) bool
		text  string
	}{
		{[]string{"f", "etc/app.conf"}, nil, errdefs.IsConflict, "path etc/app.conf: etc, which is above it, is a symbolic link in the volume"},
		{[]string{"f", "nowhere"}, nil, errdefs.IsNotFound, "nowhere"},
		{[]string{"f", "../x"}, nil, nil, "../x"},
		{[]string{"f"}, backup.ErrPassword, nil, "password"},
		{[]string{"f"}, errors.New("connection reset"), errdefs.IsUnavailable, "connection reset"},
		{long, nil, errdefs.IsInvalidArgument, "give fewer options, labels or paths"},
	} {
		if tc.wrap != nil {
			k.wrapped(func(eng backup.Engine) backup.Engine { return cut{eng, tc.wrap} })
		}
		_, err := k.restorePaths("web", tc.paths...)
		k.wrapped(nil)
		assert.ErrorContains(t, err, tc.text)
		assert.Assert(t, tc.kind == nil || tc.kind(err), "%v", err)
		k.in("web", func(dir string) { assert.DeepEqual(t, listed(t, dir), want) })
		assert.DeepEqual(t, k.preRestore("web"), []string{})
		assert.Equal(t, k.status("web")["source"], "origin")
	}
	assert.Equal(t, read(t, filepath.Join(outside, "app.conf")), "outside")
	k.in("web", func(string) {
		_, err := k.restorePaths("web", "f")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	})
}

// Wherever this process dies, the volume has all of the paths of before or all of the
// backup's, and nothing beside them.
func TestARestoreOfPathsThatIsKilledLeavesNoMixture(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	put := func(text string) {
		for _, file := range []string{"a", "b", "c"} {
			k.put("web", file, text)
		}
	}
	put("old")
	k.backup("web")
	all := func(text, c string) map[string]string { return map[string]string{"a": text, "b": text, "c": c} }
	// kill stops a restore of a and b before the step that comes for the time'th time.
	kill := func(stop string, time int32) {
		dead := errors.New("killed")
		var left atomic.Int32
		left.Store(time)
		var driver atomic.Pointer[Driver]
		k.cfg.step = func(step, _ string) error {
			if step == stop {
				left.Add(-1)
			}
			if left.Load() <= 0 {
				if d := driver.Load(); d != nil {
					d.endTasks()
				}
				return dead
			}
			return nil
		}
		k.restart()
		driver.Store(k.Driver)
		_, err := k.RestoreBackup(k.tasks, control.RestoreRequest{Reference: "nas/web", Name: "web", InPlace: true, Paths: []string{"a", "b"}}, quiet)
		assert.Assert(t, err != nil, stop)
		k.cfg.step = nil
	}
	ready := func() {
		within(t, func() error {
			k.tend(t.Context())
			_, err := k.mount("web", "id")
			return err
		})
		assert.NilError(t, k.unmount("web", "id"))
	}
	for _, tc := range []struct {
		stop string
		time int32
		want string
	}{
		{"restore.begin", 1, "new"}, {"restore.work", 1, "old"}, {"restore.data", 1, "new"}, {"restore.placing", 1, "new"},
		{"restore.place", 1, "old"}, {"restore.place", 2, "old"}, {"restore.tidy", 1, "old"}, {"restore.ready", 1, "old"},
	} {
		put("new")
		kept := len(k.preRestore("web"))
		kill(tc.stop, tc.time)
		k.restart()
		ready()
		if tc.stop != "restore.begin" {
			// The snapshot is for going back, if there is anything to go back from.
			assert.Equal(t, len(k.preRestore("web")) > kept, tc.want == "old", tc.stop)
		}
		k.in("web", func(dir string) { assert.DeepEqual(t, listed(t, dir), all(tc.want, "new")) })
		assert.Assert(t, k.status("web")["source"] == nil)
	}

	// When the backup is not to be had any more, the data of before is.
	for _, tc := range []struct {
		stop   string
		time   int32
		broken bool
	}{{"restore.work", 1, false}, {"restore.placing", 1, false}, {"restore.place", 2, true}} {
		put("new")
		kill(tc.stop, tc.time)
		k.wrapped(func(eng backup.Engine) backup.Engine { return cut{eng, backup.ErrNoBackup} })
		k.restart()
		within(t, func() error {
			k.tend(t.Context())
			if phase := k.ledger.view(k.home.key, "web").Record.Phase; phase == volume.Restoring {
				return errors.New("it is still restoring")
			}
			return nil
		})
		k.wrapped(nil)
		rec := k.ledger.view(k.home.key, "web").Record
		assert.Equal(t, rec.Phase == volume.Broken, tc.broken, "%s", rec.Reason)
		if tc.broken {
			_, err := k.RollbackVolume(t.Context(), control.RollbackRequest{Volume: "web", Snapshot: rec.Source.Kept}, quiet)
			assert.NilError(t, err)
		}
		k.in("web", func(dir string) { assert.DeepEqual(t, listed(t, dir), all("new", "new")) })
	}
}
