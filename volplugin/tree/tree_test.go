package tree

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

// fewDescriptors lowers the limit of open files of this process until the test ends.
func fewDescriptors(t *testing.T, limit uint64) {
	t.Helper()
	var old unix.Rlimit
	assert.NilError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: old.Max}))
	t.Cleanup(func() { assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) })
}

// A tree deeper than any path can be, and a directory longer than any buffer, are copied,
// measured and removed with few descriptors, which are all closed in the end.
func TestDepthAndLengthNeedNoDescriptors(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		const depth, length = 1500, 20_000
		top := open(t, dir)
		src := mkdir(t, dir, "src")
		for _, name := range []string{"a", "b", "c"} {
			assert.NilError(t, os.Mkdir(filepath.Join(dir, "src", name), 0o755))
			nastytree.MakeDeep(t, filepath.Join(dir, "src", name), depth)
		}
		assert.NilError(t, os.Mkdir(filepath.Join(dir, "src/long"), 0o755))
		for i := range length {
			assert.NilError(t, unix.Mknod(filepath.Join(dir, "src/long", string(rune('a'+i%26))+filepath.Base(t.Name())+string(rune('0'+i/26))), unix.S_IFREG|0o644, 0))
		}
		dst := mkdir(t, dir, "dst")
		before := descriptors(t)
		fewDescriptors(t, uint64(before)+50)
		stats, err := Copy(t.Context(), src, dst, Options{Parallel: 4})
		assert.NilError(t, err)
		assert.Equal(t, stats.Files, uint64(1+3*(1+depth+1)+1+length))
		for _, tree := range []string{"src", "dst"} {
			usage, err := Size(t.Context(), open(t, dir, tree))
			assert.NilError(t, err)
			assert.Equal(t, usage.Files, stats.Files)
		}
		assert.NilError(t, Remove(t.Context(), top, "dst"))
		assert.Equal(t, descriptors(t)-before, 2, "but for those that the test has opened")
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	return len(list) - 1
}

// Size is what du says.
func TestSizeCountsWhatIsAllocated(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, "src"), 0o755))
		nastytree.Make(t, filepath.Join(dir, "src"))
		usage, err := Size(t.Context(), open(t, dir, "src"))
		assert.NilError(t, err)
		assert.Equal(t, usage.Bytes, output(t, "du", "-s", "-B1", filepath.Join(dir, "src")))
		assert.Equal(t, usage.Files, output(t, "du", "-s", "--inodes", filepath.Join(dir, "src")))
	})
}

// output is the number that a command prints first.
func output(t *testing.T, argv ...string) (number uint64) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).Output()
	assert.NilError(t, err)
	_, err = fmt.Sscan(string(out), &number)
	assert.NilError(t, err)
	return number
}
