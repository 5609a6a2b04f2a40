package volplugin

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestAVolumesLife(t *testing.T) {
	for _, mode := range []string{"managed", "unmanaged"} {
		t.Run(mode, func(t *testing.T) {
			root := t.TempDir()
			h := newHost(t, root, func(c *Config) {
				if mode == "unmanaged" {
					c.MountBase = ""
				}
			})
			_, err := h.get("web")
			assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
			assert.Assert(t, !exists(filepath.Join(root, ".berth")), "looking has written a marker")

			assert.NilError(t, h.create("web"))
			assert.DeepEqual(t, h.list(), []string{"web"})
			status := h.status("web")
			assert.Equal(t, status["engine"], "dir")
			assert.Equal(t, status["on-remove"], "trash")
			assert.Equal(t, status["root"], root)
			v, err := h.get("web")
			assert.NilError(t, err)
			_, err = time.Parse(time.RFC3339, v.CreatedAt)
			assert.NilError(t, err)

			path, err := h.mount("web", "id-1")
			assert.NilError(t, err)
			assert.Equal(t, path, v.Mountpoint)
			// dockerd copies an image's content only into a volume without any entry.
			entries, err := os.ReadDir(path)
			assert.NilError(t, err)
			assert.Equal(t, len(entries), 0)
			info, err := os.Stat(path)
			assert.NilError(t, err)
			assert.Equal(t, info.Mode().Perm(), os.FileMode(0o755))
			write(t, filepath.Join(path, "page"), "hello")
			assert.Equal(t, read(t, filepath.Join(root, "web", "page")), "hello")
			assert.NilError(t, h.unmount("web", "id-1"))
			assert.Equal(t, len(h.mountsBelow()), 0)
			if mode == "managed" {
				assert.Assert(t, !exists(path), "the mount point stays")
			}

			assert.NilError(t, h.remove("web"))
			assert.NilError(t, h.remove("web"), "removing again succeeds")
			_, err = h.get("web")
			assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
			assert.DeepEqual(t, h.list(), []string{})
			assert.Assert(t, !exists(filepath.Join(root, "web")))
			assert.DeepEqual(t, trash(t, root), []string{"web"})
			kept, err := filepath.Glob(filepath.Join(root, ".berth/trash/*/page"))
			assert.NilError(t, err)
			assert.Equal(t, read(t, kept[0]), "hello")

			assert.NilError(t, h.create("web"), "the name is free at once")
			_, err = os.Stat(filepath.Join(root, "web", "page"))
			assert.Assert(t, os.IsNotExist(err), "a new volume holds old data")
			left, err := os.ReadDir(filepath.Join(root, ".berth", "tmp"))
			assert.NilError(t, err)
			assert.Equal(t, len(left), 0)
		})
	}
}

func TestRepeatedCreateChangesNothingAndShowsTheDifference(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web", "mode=0750", "uid=12"))
	h.tend(t.Context()) // learns what engines can do
	before := h.status("web")
	assert.NilError(t, h.create("web", "mode=0750", "uid=12"))
	assert.DeepEqual(t, h.status("web"), before)

	assert.NilError(t, h.create("web", "mode=0700", "on-remove=purge"))
	after := h.status("web")
	assert.DeepEqual(t, after["options-differ"], []any{"mode: has 0750, asked 0700", "on-remove: has none, asked purge", "uid: has 12, asked none"})
	assert.Equal(t, after["uuid"], before["uuid"])
	assert.Equal(t, after["on-remove"], "trash")
	h.restart()
	h.tend(t.Context())
	assert.DeepEqual(t, h.status("web"), after)

	assert.NilError(t, h.create("web", "mode=0750", "uid=12"))
	assert.DeepEqual(t, h.status("web"), before)
}

func TestOwnerAndModeOptions(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web", "uid=1234", "gid=5678", "mode=2770"))
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(root, "web"), &st))
	assert.Equal(t, st.Uid, uint32(1234))
	assert.Equal(t, st.Gid, uint32(5678))
	assert.Equal(t, st.Mode&0o7777, uint32(0o2770))
}

func TestADirectoryIsAdoptedAndKept(t *testing.T) {
	root := t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(root, "old"), 0o711))
	write(t, filepath.Join(root, "old", "db"), "rows")
	h := newHost(t, root, nil)
	assert.DeepEqual(t, h.list(), []string{}) // unrecorded directories are not listed
	_, err := h.get("old")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

	assert.NilError(t, h.create("old"))
	status := h.status("old")
	assert.Equal(t, status["adopted"], true)
	assert.Equal(t, status["on-remove"], "keep")
	info, err := os.Stat(filepath.Join(root, "old"))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o711), "adopting has changed the directory")

	assert.NilError(t, h.remove("old"))
	assert.Equal(t, read(t, filepath.Join(root, "old", "db")), "rows")
	assert.DeepEqual(t, h.list(), []string{})
	assert.DeepEqual(t, trash(t, root), []string{})
	assert.NilError(t, h.create("old"))
	assert.NilError(t, h.remove("old"))
}

func TestWhatIsPurgedAndWhatIsKeptInTheTrash(t *testing.T) {
	root := t.TempDir()
	now := time.Now()
	h := newHost(t, root, func(c *Config) { c.Now = func() time.Time { return now } })
	anonymous := strings.Repeat("0a", 32)
	for _, name := range []string{anonymous, "plain"} {
		assert.NilError(t, h.create(name))
	}
	assert.NilError(t, h.create("secret", "on-remove=purge"))
	for _, name := range h.list() {
		write(t, filepath.Join(root, name, "f"), "x")
		assert.NilError(t, h.remove(name))
	}
	h.expire(t.Context())
	assert.DeepEqual(t, trash(t, root), []string{"plain"})

	now = now.Add(7*24*time.Hour - time.Minute)
	h.expire(t.Context())
	assert.DeepEqual(t, trash(t, root), []string{"plain"})
	now = now.Add(2 * time.Minute)
	h.expire(t.Context())
	assert.DeepEqual(t, trash(t, root), []string{})
	left, err := os.ReadDir(filepath.Join(root, ".berth", "trash"))
	assert.NilError(t, err)
	assert.Equal(t, len(left), 0)
}

func TestHostileNamesAreRefusedByEveryCall(t *testing.T) {
	parent := t.TempDir()
	root := filepath.Join(parent, "root")
	assert.NilError(t, os.Mkdir(root, 0o755))
	write(t, filepath.Join(parent, "outside"), "mine")
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	before := tree(t, parent)
	for _, name := range []string{
		"", ".", "..", "../outside", "../x", "/abs", "/etc/passwd", "a/b", "x/../../y", "a b", "né", "a:b", "-x", "_x", ".berth",
		".berth/volumes", "a\nb", "a\x00b", "web@", "@snap", "web@a@b", "web@../x", strings.Repeat("n", 201), strings.Repeat("n", 300), "web/", " web",
	} {
		for call, err := range map[string]error{
			"Create":  h.create(name),
			"Remove":  h.remove(name),
			"Unmount": h.unmount(name, "id"),
			"Mount":   second(h.mount(name, "id")),
			"Get":     second(h.get(name)),
		} {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%s %q: %v", call, name, err)
			assert.Assert(t, !strings.Contains(err.Error(), "\n"), "%q", err)
		}
	}
	assert.DeepEqual(t, tree(t, parent), before)
	assert.NilError(t, h.create(strings.Repeat("n", 200)))
	assert.Assert(t, errdefs.IsInvalidArgument(second(h.mount("web", ""))))
}

func TestLinksAndMountPointsAreNeverData(t *testing.T) {
	parent := t.TempDir()
	root := filepath.Join(parent, "root")
	for _, dir := range []string{root, filepath.Join(parent, "etc"), filepath.Join(root, "disk")} {
		assert.NilError(t, os.Mkdir(dir, 0o755))
	}
	write(t, filepath.Join(parent, "etc", "passwd"), "root")
	assert.NilError(t, os.Symlink(filepath.Join(parent, "etc"), filepath.Join(root, "link")))
	assert.NilError(t, os.Symlink("../etc", filepath.Join(root, "rel")))
	write(t, filepath.Join(root, "file"), "x")
	mounttest.Bind(t, filepath.Join(parent, "etc"), filepath.Join(root, "disk"))
	h := newHost(t, root, nil)
	for name, want := range map[string]string{"link": "symbolic link", "rel": "symbolic link", "file": "not a directory", "disk": "mount point"} {
		err := h.create(name)
		assert.Assert(t, errdefs.IsConflict(err), "%s: %v", name, err)
		assert.ErrorContains(t, err, want)
		_, err = h.get(name)
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	}

	// The data is replaced behind the record's back.
	assert.NilError(t, h.create("web"))
	assert.NilError(t, os.Remove(filepath.Join(root, "web")))
	assert.NilError(t, os.Symlink(filepath.Join(parent, "etc"), filepath.Join(root, "web")))
	_, err := h.mount("web", "id")
	assert.ErrorContains(t, err, "symbolic link")
	assert.ErrorContains(t, h.remove("web"), "symbolic link")
	assert.Equal(t, len(h.mountsBelow()), 0)
	assert.DeepEqual(t, trash(t, root), []string{})
	assert.Equal(t, read(t, filepath.Join(parent, "etc", "passwd")), "root")

	// Berth's own directory is replaced.
	assert.NilError(t, os.Rename(filepath.Join(root, ".berth"), filepath.Join(parent, "berth")))
	assert.NilError(t, os.Symlink("../berth", filepath.Join(root, ".berth")))
	err = h.create("other")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "symbolic link")
	assert.Assert(t, !exists(filepath.Join(root, "other")))
	h.status("web") // still known
}

func TestAMissingDataDirectoryIsNotMadeAnew(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	assert.NilError(t, os.Remove(filepath.Join(root, "web")))
	_, err := h.mount("web", "id")
	assert.ErrorContains(t, err, "missing")
	assert.Assert(t, !exists(filepath.Join(root, "web")))
	h.status("web")
	assert.NilError(t, h.remove("web"))
	assert.DeepEqual(t, h.list(), []string{})
}

func TestABadRecordHarmsOnlyItsVolume(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	for _, name := range []string{"good", "cut", "newer", "other", "link", "huge"} {
		assert.NilError(t, h.create(name))
		write(t, filepath.Join(root, name, "f"), name)
	}
	record := func(name string) string { return filepath.Join(root, ".berth/volumes", name+".json") }
	whole := read(t, record("cut"))
	write(t, record("cut"), whole[:len(whole)/2])
	write(t, record("newer"), `{"schema":3,"name":"newer","layout":"unheard of"}`)
	write(t, record("other"), whole)
	write(t, record("huge"), strings.Repeat(" ", 1<<20))
	assert.NilError(t, os.Remove(record("link")))
	assert.NilError(t, os.Symlink("good.json", record("link")))
	write(t, filepath.Join(root, ".berth/volumes/no-record"), "x")
	write(t, filepath.Join(root, ".berth/volumes/.x.json"), "x")

	for range 2 {
		assert.DeepEqual(t, h.list(), []string{"cut", "good", "huge", "link", "newer", "other"})
		for name, want := range map[string]string{"cut": "damaged", "newer": "newer", "other": "damaged", "link": "damaged", "huge": "damaged"} {
			before := read(t, filepath.Join(root, name, "f"))
			assert.Assert(t, strings.Contains(h.status(name)["error"].(string), want), "%s: %v", name, h.status(name))
			assert.ErrorContains(t, second(h.mount(name, "id")), "untouched")
			assert.ErrorContains(t, h.create(name), "untouched")
			assert.ErrorContains(t, h.remove(name), "untouched")
			assert.Equal(t, read(t, filepath.Join(root, name, "f")), before)
		}
		path, err := h.mount("good", "id")
		assert.NilError(t, err)
		assert.Equal(t, read(t, filepath.Join(path, "f")), "good")
		assert.NilError(t, h.unmount("good", "id"))
		h.restart()
	}
	// A record that is repaired by hand is read again.
	write(t, record("cut"), whole)
	assert.Equal(t, h.status("cut")["error"], nil)
	assert.Equal(t, second(h.mount("cut", "id")), nil)
}

func TestAFullDiskLeavesNothingHalfMade(t *testing.T) {
	root := mounttest.Tmpfs(t, 256<<10)
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	fill, err := os.Create(filepath.Join(root, "web", "fill"))
	assert.NilError(t, err)
	block := make([]byte, 4096)
	for err == nil {
		_, err = fill.Write(block)
	}
	assert.ErrorIs(t, err, unix.ENOSPC)
	assert.NilError(t, fill.Close())
	before := tree(t, root)

	err = h.create("more")
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	assert.ErrorContains(t, err, "more")
	err = h.remove("web")
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	assert.DeepEqual(t, tree(t, root), before)
	assert.DeepEqual(t, h.list(), []string{"web"})
	path, err := h.mount("web", "id")
	assert.NilError(t, err, "a full root can still be mounted")
	assert.NilError(t, os.Remove(filepath.Join(path, "fill")))
	assert.NilError(t, h.unmount("web", "id"))
	assert.NilError(t, h.create("more"))
	assert.NilError(t, h.remove("web"))
}

func TestWrongOptionsLeaveNothing(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	err := h.create("web", "colour=red")
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	assert.ErrorContains(t, err, "web")
	assert.ErrorContains(t, err, "colour")
	assert.DeepEqual(t, tree(t, root), map[string]string{})

	// What only the root's engines can tell makes it a root, and no volume.
	assert.NilError(t, h.create("other"))
	before := tree(t, root)
	err = h.create("web", "size=10G")
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	assert.ErrorContains(t, err, "size")
	assert.DeepEqual(t, tree(t, root), before)
}

// second drops a call's answer.
func second[T any](_ T, err error) error { return err }

// tree maps all paths below dir to their content or kind.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path) // path is below dir
		files[rel] = entry.Type().String()
		if entry.Type().IsRegular() {
			files[rel] = read(t, path)
		}
		return nil
	})
	assert.NilError(t, err)
	return files
}
