package volplugin

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/archive"
)

// Backups of these tests go to engine archive, which needs no other program; engines
// have a suite of their own.
const (
	testEngine   = backup.Archive
	testPassword = ""
)

func openEngine(_ testing.TB, _ string, target backup.Target) (backup.Engine, error) {
	return archive.New(target)
}

// owner of a file.
func owner(t testing.TB, path string) int {
	t.Helper()
	var st unix.Stat_t
	assert.NilError(t, unix.Lstat(path, &st))
	return int(st.Uid)
}

// A keeper is a host that keeps backups, and whose clock can be set.
type keeper struct {
	*host
	repository string

	mu   sync.Mutex
	now  time.Time
	told []notify.Event
	// wrap, unless nil, changes the engine of targets.
	wrap func(backup.Engine) backup.Engine
}

func newKeeper(t *testing.T, repository string) *keeper {
	t.Helper()
	return newKeeperOf(t, t.TempDir(), repository, func(*Config) {})
}

func newKeeperOf(t *testing.T, root, repository string, change func(*Config)) *keeper {
	t.Helper()
	k := &keeper{repository: repository, now: time.Now()}
	dir := t.TempDir()
	k.host = newHost(t, root, func(c *Config) {
		change(c)
		c.Local = filepath.Join(dir, "local")
		c.Now = k.clock
		c.Tell = func(e notify.Event) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.told = append(k.told, e)
		}
		c.Backups = &BackupConfig{
			Targets: filepath.Join(dir, "targets"), Scratch: filepath.Join(dir, "scratch"), Version: "test",
			Open: func(target backup.Target) (backup.Engine, error) {
				eng, err := openEngine(t, dir, target)
				k.mu.Lock()
				defer k.mu.Unlock()
				if err == nil && k.wrap != nil {
					eng = k.wrap(eng)
				}
				return eng, err
			},
		}
	})
	return k
}

func (k *keeper) clock() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now
}

func (k *keeper) pass(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now = k.now.Add(d)
}

func (k *keeper) wrapped(fn func(backup.Engine) backup.Engine) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wrap = fn
}

func (k *keeper) target() {
	k.t.Helper()
	report, err := k.AddTarget(k.t.Context(), control.TargetSpec{Name: "nas", Engine: testEngine, Repository: k.repository, Password: testPassword}, quiet)
	assert.NilError(k.t, err)
	assert.Equal(k.t, report.Target.Name, "nas")
}

func (k *keeper) backup(name string) control.Backup {
	k.t.Helper()
	done, err := k.CreateBackup(k.t.Context(), control.BackupRequest{Volume: name}, quiet)
	assert.NilError(k.t, err)
	assert.Assert(k.t, !done.Incomplete, "%v", done.Missing)
	return done
}

// left are the snapshots and stages that a backup should have taken away.
func (k *keeper) left(name string) []string {
	k.t.Helper()
	left := slices.DeleteFunc(k.snapshots(name), func(s string) bool { return !strings.HasPrefix(s, "backup-") })
	entries, err := os.ReadDir(k.backups.stage)
	assert.NilError(k.t, err)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	return left
}
