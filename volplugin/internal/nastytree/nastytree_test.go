package nastytree_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

// silent takes the failures of a comparison.
type silent struct {
	testing.TB
	failures int
}

func (s *silent) Errorf(string, ...any) { s.failures++ }

func TestCompareSeesEveryDifference(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	for _, top := range []string{a, b} {
		assert.NilError(t, os.Mkdir(top, 0o755))
		nastytree.Make(t, top)
	}
	nastytree.Compare(t, a, b)
	at := func(name string) string { return filepath.Join(b, name) }
	attr := func(name, key, value string) func() error {
		return func() error { return unix.Lsetxattr(at(name), key, []byte(value), 0) }
	}
	for name, change := range map[string]struct{ do, undo func() error }{
		"an attribute":            {attr("attributes/user", "user.text", "other"), attr("attributes/user", "user.text", "value")},
		"an attribute of a link":  {attr("links/dangling", "trusted.link", "other"), attr("links/dangling", "trusted.link", "of the link")},
		"an attribute of the top": {attr(".", "user.top", "other"), attr(".", "user.top", "of the top")},
		"a mode":                  {func() error { return os.Chmod(at("links/a/1"), 0o600) }, func() error { return os.Chmod(at("links/a/1"), 0o644) }},
		"an owner":                {func() error { return os.Lchown(at("links/dangling"), 13, 34) }, func() error { return os.Lchown(at("links/dangling"), 12, 34) }},
		"a file more":             {func() error { return keepTimes(b, func() error { return unix.Mknod(at("more"), unix.S_IFIFO, 0) }) }, func() error { return keepTimes(b, func() error { return os.Remove(at("more")) }) }},
		"one hard link less": {
			func() error { return keepTimes(b, func() error { return os.Rename(at("fifth"), at("../fifth")) }) },
			func() error { return keepTimes(b, func() error { return os.Rename(at("../fifth"), at("fifth")) }) },
		},
		"a nanosecond": {func() error { return shift(at("files/1"), 1) }, func() error { return shift(at("files/1"), -1) }},
	} {
		assert.NilError(t, change.do(), name)
		s := &silent{TB: t}
		nastytree.Compare(s, a, b)
		assert.Assert(t, s.failures > 0, "%s is not seen", name)
		assert.NilError(t, change.undo(), name)
	}
	// They were seen for what they were.
	nastytree.Compare(t, a, b)
	assert.NilError(t, punch(at("files/65536")))
	s := &silent{TB: t}
	nastytree.Compare(s, a, b)
	assert.Assert(t, s.failures > 0, "a hole is not seen")
}

// keepTimes does something in a directory whose times stay as they were.
func keepTimes(dir string, do func() error) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return unix.UtimesNano(dir, []unix.Timespec{st.Atim, st.Mtim})
}

func shift(path string, by time.Duration) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Chtimes(path, time.Time{}, info.ModTime().Add(by))
}

// punch makes a hole in a file, which keeps its times.
func punch(path string) error {
	return keepTimes(path, func() error {
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer file.Close()
		return unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	})
}
