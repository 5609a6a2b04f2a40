package backuptest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

func testIncomplete(b *bench) {
	b.init()
	s := b.source("vol")
	badDisk(b, data(s), map[string]string{"first": "a", "bad name": unreadable, "dir/last": "z"})
	result, err := b.engine.Backup(b.Context(), s, nil)
	assert.NilError(b, err)
	assert.Assert(b, !result.Complete())
	assert.Equal(b, result.MissingCount, uint64(1))
	assert.Equal(b, len(result.Missing), 1)
	assert.Assert(b, strings.Contains(result.Missing[0], "bad name"), "%q", result.Missing)
	all, err := b.engine.List(b.Context(), backup.Filter{})
	assert.NilError(b, err)
	assert.Equal(b, len(all), 1)
	assert.Assert(b, all[0].Incomplete)
	assert.Equal(b, all[0].ID, result.ID)
	dir := b.restore(result.ID)
	lines := nastytree.List(b, filepath.Join(dir, backup.DataName))
	for _, name := range []string{"first", "dir/last"} {
		assert.Assert(b, lines[name] != "", "%s is missing", name)
	}
	assert.Equal(b, lines["bad name"], "", "what could not be read was restored")
}

// unreadable is a content that the disk of badDisk cannot give back.
var unreadable = strings.Repeat("this cannot be read ", 13_000)

// badDisk mounts on dir a file system with the files, until the test ends. Of a file
// with the content unreadable, something after the first bytes gives EIO.
func badDisk(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	assert.NilError(t, os.WriteFile(image, nil, 0o600))
	assert.NilError(t, os.Truncate(image, 128<<20))
	command(t, "mkfs.btrfs", "-q", "-d", "single", "-m", "single", image)
	command(t, "mount", "-o", "loop", image, dir)
	for name, content := range files {
		write(t, filepath.Join(dir, name), content)
	}
	assert.NilError(t, unix.Unmount(dir, 0))
	disk, err := os.ReadFile(image)
	assert.NilError(t, err)
	at := bytes.Index(disk, []byte(unreadable[:8192]))
	assert.Assert(t, at > 0)
	file, err := os.OpenFile(image, os.O_WRONLY, 0)
	assert.NilError(t, err)
	_, err = file.WriteAt([]byte("?"), int64(at+len(unreadable)/2))
	assert.NilError(t, err)
	assert.NilError(t, file.Close())
	command(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() { assert.Check(t, unix.Unmount(dir, 0)) })
}

func command(t testing.TB, argv ...string) {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput()
	assert.NilError(t, err, "%q: %s", argv, out)
}

func testBackupCancelled(b *bench) {
	b.init()
	s := b.source("vol")
	random(b, filepath.Join(data(s), "large"), 32<<20)
	for i := range 500 {
		write(b, filepath.Join(data(s), fmt.Sprint("small", i)), fmt.Sprint(i))
	}
	made := 0
	for _, after := range []time.Duration{0, time.Millisecond, 30 * time.Millisecond, 200 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(b.Context(), after)
		_, err := b.engine.Backup(ctx, s, nil)
		if err == nil {
			made++ // it was faster
			assert.Assert(b, after > 0)
		} else {
			assert.ErrorIs(b, err, ctx.Err())
		}
		cancel()
	}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	if _, err := b.engine.Backup(ctx, s, func(backup.Progress) { cancel() }); err == nil {
		made++
	}
	assert.Equal(b, len(b.list(backup.Filter{})), made)
	id := b.backup(s).ID
	b.same(s, b.restore(id))
	assert.NilError(b, b.engine.Prune(b.Context(), nil))
	report, err := b.engine.Check(b.Context(), 1, nil)
	assert.NilError(b, err)
	assert.Equal(b, len(report.Errors), 0, "%q", report.Errors)
	assert.Equal(b, len(b.list(backup.Filter{})), made+1)
}

func testProgress(b *bench) {
	b.init()
	s := b.source("vol")
	for i := range 20 {
		random(b, filepath.Join(data(s), fmt.Sprint(i)), 1<<20)
	}
	var inside atomic.Int32
	calls := 0
	tell := func(p backup.Progress) {
		if inside.Add(1) != 1 {
			b.Error("progress is told by two at a time")
		}
		calls++
		if p.Step == "" {
			b.Error("no step is told")
		}
		if p.TotalBytes > 0 && p.Bytes > 2*p.TotalBytes {
			b.Errorf("%d bytes of %d", p.Bytes, p.TotalBytes)
		}
		inside.Add(-1)
	}
	result, err := b.engine.Backup(b.Context(), s, tell)
	assert.NilError(b, err)
	assert.Assert(b, calls > 0, "no progress is told")
	_, err = b.engine.Restore(b.Context(), backup.Backup{ID: result.ID}, b.TempDir(), nil, tell)
	assert.NilError(b, err)
	_, err = b.engine.Check(b.Context(), 1, tell)
	assert.NilError(b, err)
	assert.NilError(b, b.engine.Prune(b.Context(), tell))
}
