package vmlab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
)

func TestMain(m *testing.M) { Main(m) }

// TestHungGuest boots a guest whose test fails and then never ends: it has to be
// stopped at its caller's wish, and what it said until then has to arrive.
func TestHungGuest(t *testing.T) {
	if os.Getenv(guestEnv) != "" {
		t.Run("fails", func(t *testing.T) { t.Error("on purpose") })
		time.Sleep(time.Hour)
	}
	t.Parallel()
	defer boot()()
	img, err := Image(t.Context())
	assert.NilError(t, err)
	m := machine{image: img, work: t.TempDir(), test: guestPattern(t.Name())}
	assert.NilError(t, m.build(t.Context()))
	ctx, cancel := context.WithCancelCause(t.Context())
	live := &waitingBuffer{text: "on purpose", found: func() { cancel(errors.New("seen enough")) }}
	out, err := m.run(ctx, live)
	assert.ErrorContains(t, err, "guest was stopped: seen enough")
	assert.ErrorContains(t, err, "end of the guest's console")
	assert.Assert(t, !finished(out) && !passed(out))
	assert.Equal(t, live.String(), string(out))
}

// waitingBuffer calls found when a text has been written to it.
type waitingBuffer struct {
	bytes.Buffer
	text  string
	found func()
}

func (w *waitingBuffer) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if bytes.Contains(w.Bytes(), []byte(w.text)) {
		w.found()
	}
	return n, err
}

func TestResultsOfAGuest(t *testing.T) {
	out := []byte("=== RUN   TestX\n" +
		"    x_test.go:1: --- FAIL: TestX/quoted (0.00s)\n" +
		"--- FAIL: TestX (0.02s)\n" +
		"    --- PASS: TestX/good (0.01s)\n" +
		"        --- FAIL: TestX/good/deep#01 (1.50s)\n" +
		"FAIL\n\nvmlab: exit 1\n")
	assert.DeepEqual(t, results(out), []result{
		{name: "TestX", failed: true}, {name: "TestX/good"}, {name: "TestX/good/deep#01", failed: true},
	}, cmp.AllowUnexported(result{}))
	for _, c := range []struct {
		out              string
		finished, passed bool
	}{
		{"PASS\n\nvmlab: exit 0\n", true, true},
		{"FAIL\n\nvmlab: exit 1\n", true, false},
		{"t.Log says vmlab: exit 0\n", false, false},
		{"PASS\n", false, false},
		{"", false, false},
	} {
		assert.Equal(t, finished([]byte(c.out)), c.finished, "%q", c.out)
		assert.Equal(t, passed([]byte(c.out)), c.passed, "%q", c.out)
	}
}

func TestInitialRAMDiskUnpacks(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789abcde"), 1000)
	var archive bytes.Buffer
	assert.NilError(t, writeCPIO(&archive, []cpioFile{
		{name: "init", mode: modeExec, data: large},
		{name: "dir", mode: modeDir},
		{name: "dir/a", mode: modeFile, data: []byte("x")},
		{name: "dir/empty", mode: modeFile},
	}))
	dir := t.TempDir()
	unpack := exec.CommandContext(t.Context(), "busybox", "cpio", "-i")
	unpack.Dir, unpack.Stdin = dir, &archive
	out, err := unpack.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	for name, want := range map[string][]byte{"init": large, "dir/a": []byte("x"), "dir/empty": {}} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		assert.NilError(t, err)
		assert.Assert(t, bytes.Equal(got, want), name)
	}
	stat, err := os.Stat(filepath.Join(dir, "init"))
	assert.NilError(t, err)
	assert.Equal(t, stat.Mode().Perm(), os.FileMode(0o755))
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	dir := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(
		"k/base.ko:\nk/ring.ko: k/base.ko\nk/my-disk.ko: k/ring.ko k/base.ko\nk/other.ko: k/ring.ko k/base.ko\n"), 0o644))
	order, err := moduleOrder(dir, []string{"my_disk", "other"})
	assert.NilError(t, err)
	want := []string{"k/base.ko", "k/ring.ko", "k/my-disk.ko", "k/other.ko"}
	for i := range want {
		want[i] = filepath.Join(dir, want[i])
	}
	assert.DeepEqual(t, order, want)
	_, err = moduleOrder(dir, []string{"absent"})
	assert.ErrorContains(t, err, "kernel module absent is not in "+dir)
}
