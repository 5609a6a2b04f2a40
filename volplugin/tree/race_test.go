package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

// secret is what is in files outside of the tree.
const secret = "secret of the host"

// A racer changes a tree in all ways that a container can, and quickly, so that what
// walks it finds something else at each step than at the step before.
type racer struct {
	top, outside string
	// opened counts when somebody else had a pipe open for reading, which nobody
	// should.
	opened atomic.Int64
	stop   atomic.Bool
	all    sync.WaitGroup
}

func startRacer(t *testing.T, top, outside string) *racer {
	t.Helper()
	r := &racer{top: top, outside: outside}
	for seed := range 2 {
		r.all.Go(func() {
			random := rand.New(rand.NewPCG(uint64(seed), 7))
			for !r.stop.Load() {
				r.step(random)
			}
		})
	}
	t.Cleanup(r.end)
	return r
}

func (r *racer) end() {
	r.stop.Store(true)
	r.all.Wait()
}

// dir opens one of the directories, and never what a link leads to: the racer must not
// change anything outside itself.
func (r *racer) dir(name string) (fd int, ok bool) {
	top, err := unix.Open(r.top, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, false
	}
	defer unix.Close(top)
	fd, err = unix.Openat(top, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	return fd, err == nil
}

// step does one thing to one entry. What fails because of the other racer or of
// a removal is of no interest.
func (r *racer) step(random *rand.Rand) {
	top, err := unix.Open(r.top, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(top)
	name := func() string { return fmt.Sprintf("dir%d", random.IntN(10)) }
	dirName, aside := name(), fmt.Sprintf("aside%d", random.IntN(4))
	_ = unix.Mkdirat(top, dirName, 0o755)
	dir, ok := r.dir(dirName)
	if !ok {
		return
	}
	defer unix.Close(dir)
	file := fmt.Sprintf("file%d", random.IntN(10))
	switch random.IntN(14) {
	case 0, 1, 2, 3:
		const flags = unix.O_WRONLY | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_CLOEXEC
		fd, err := unix.Openat(dir, file, flags|unix.O_CREAT|[]int{unix.O_TRUNC, unix.O_APPEND}[random.IntN(2)], 0o644)
		if err == nil {
			_, _ = unix.Write(fd, []byte(strings.Repeat("inside", random.IntN(3000))))
			_ = unix.Ftruncate(fd, int64(random.IntN(20_000)))
			_ = unix.Close(fd)
		}
	case 4, 8:
		other, ok := r.dir(name())
		if !ok {
			return
		}
		defer unix.Close(other)
		to := fmt.Sprintf("file%d", random.IntN(10))
		if random.IntN(2) == 0 {
			_ = unix.Renameat(dir, file, other, to)
		} else {
			_ = unix.Linkat(dir, file, other, to, 0)
		}
	case 5:
		_ = unix.Unlinkat(dir, file, 0)
		_ = unix.Symlinkat(filepath.Join(r.outside, "file"), dir, file)
	case 6:
		_ = unix.Unlinkat(dir, file, 0)
		_ = unix.Mknodat(dir, file, unix.S_IFIFO|0o644, 0)
	case 7:
		_ = unix.Unlinkat(dir, file, 0)
		_ = unix.Mknodat(dir, file, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))
	case 9:
		_ = unix.Unlinkat(dir, file, 0)
		if unix.Mkdirat(dir, file, 0o755) != nil {
			_ = unix.Unlinkat(dir, file, unix.AT_REMOVEDIR)
		}
	case 10, 11:
		// A directory and a link to one outside change places in one step, and back.
		_ = unix.Symlinkat(r.outside, top, aside)
		for range 2 {
			_ = unix.Renameat2(top, dirName, top, aside, unix.RENAME_EXCHANGE)
		}
	case 12:
		_ = unix.Renameat(top, dirName, top, aside)
		_ = unix.Symlinkat(r.outside, top, dirName)
		_ = unix.Unlinkat(top, dirName, 0)
		_ = unix.Renameat(top, aside, top, dirName)
	case 13:
		// A file and a pipe change places. If anybody has the pipe open for reading
		// it can be opened for writing.
		pipe := fmt.Sprintf("pipe%d", random.IntN(4))
		_ = unix.Mknodat(dir, pipe, unix.S_IFIFO|0o644, 0)
		for range 10 {
			_ = unix.Renameat2(dir, file, dir, pipe, unix.RENAME_EXCHANGE)
			fd, err := unix.Openat(dir, file, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
				r.opened.Add(1)
			}
			_ = unix.Close(fd)
		}
	}
}

// outsideOf makes a directory with files that nothing has to do with.
func outsideOf(t *testing.T, dir string) (path string, list func() map[string]string) {
	t.Helper()
	path = filepath.Join(dir, "outside")
	assert.NilError(t, os.MkdirAll(filepath.Join(path, "below/below"), 0o755))
	for _, name := range []string{"file", "file1", "file2", "below/file", "below/below/file"} {
		assert.NilError(t, os.WriteFile(filepath.Join(path, name), []byte(secret), 0o600))
	}
	return path, func() map[string]string { return nastytree.List(t, path) }
}

// races is how often a tree is copied or removed while somebody changes it: the short
// form is a sample.
func races() int {
	if testing.Short() {
		return 20
	}
	return 70
}

func TestNothingOutsideIsCopiedWhileTheTreeChanges(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		outside, list := outsideOf(t, dir)
		before := list()
		src := mkdir(t, dir, "src")
		r := startRacer(t, src.Path(), outside)
		top := open(t, dir)
		var files, unstable uint64
		for i := range races() {
			dst := mkdir(t, dir, fmt.Sprint("dst", i))
			stats, err := Copy(t.Context(), src, dst, Options{Parallel: 1 + i%3, NoSync: true, Reflink: []Reflink{Auto, Never}[i%2], old: i%5 == 0})
			assert.NilError(t, err, "copies do not fail because the tree changes")
			files, unstable = files+stats.Files, unstable+stats.Unstable
			checkNoSecret(t, dst.Path())
			assert.NilError(t, Remove(t.Context(), top, filepath.Base(dst.Path())))
		}
		r.end()
		t.Logf("%d files, %d of them unstable", files, unstable)
		assert.Assert(t, files > uint64(races()*20), "the racer has left nothing to copy")
		assert.DeepEqual(t, list(), before)
		assert.Equal(t, r.opened.Load(), int64(0), "pipes were opened")

		// When it has come to rest a copy is the same again.
		_, err := Copy(t.Context(), src, mkdir(t, dir, "dst"), Options{})
		assert.NilError(t, err)
		nastytree.Compare(t, src.Path(), filepath.Join(dir, "dst"))
	})
}

// checkNoSecret looks for anything from outside in a copy that nobody changes.
func checkNoSecret(t *testing.T, top string) {
	t.Helper()
	assert.NilError(t, filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if strings.Contains(string(data), secret) {
			return errors.New(path + " has the content of a file outside")
		}
		return err
	}))
}

func TestNothingOutsideIsRemovedWhileTheTreeChanges(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		outside, list := outsideOf(t, dir)
		before := list()
		top := open(t, dir)
		removed := 0
		for i := range races() {
			name := fmt.Sprint("tree", i)
			assert.NilError(t, os.Mkdir(filepath.Join(dir, name), 0o755))
			r := startRacer(t, filepath.Join(dir, name), outside)
			for range 3 {
				err := Remove(t.Context(), top, name)
				if err == nil {
					removed++
				}
				// New files come faster than they go: that may be said, nothing else.
				assert.Assert(t, err == nil || notEmpty(err), "%v", err)
				_ = os.Mkdir(filepath.Join(dir, name), 0o755)
			}
			r.end()
			assert.NilError(t, Remove(t.Context(), top, name))
		}
		t.Logf("%d removals were through in spite of the racer", removed)
		assert.DeepEqual(t, list(), before)
		names, err := top.Names()
		assert.NilError(t, err)
		for _, name := range names {
			assert.Assert(t, name == "outside" || name == "lost+found", name)
		}
	})
}
