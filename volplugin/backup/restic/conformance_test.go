package restic_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/backuptest"
	"github.com/berth-plugin/berth/volplugin/backup/restic"
	"github.com/berth-plugin/berth/volplugin/internal/restictest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	backuptest.Run(t, func(t testing.TB) backuptest.Repository {
		repo := filepath.Join(t.TempDir(), "repository")
		return backuptest.Repository{
			Open:   func(t testing.TB) backup.Engine { return quick{engine(t, config(t, repo)), t, repo} },
			Damage: func(t testing.TB) { damage(t, repo) },
			Stray: func(t testing.TB) {
				restictest.Plain(t, repo, "backup", "--tag", "volume=vol", source(t).Dir)
			},
		}
	})
}

// quick is an engine that makes a repository whose key needs no time.
type quick struct {
	*restic.Engine
	t    testing.TB
	repo string
}

func (q quick) Init(ctx context.Context) error {
	if _, err := os.Stat(q.repo); errors.Is(err, fs.ErrNotExist) {
		assert.NilError(q.t, os.Rename(restictest.Repository(q.t), q.repo))
	}
	return q.Engine.Init(ctx)
}

// damage changes a byte in the middle of each pack.
func damage(t testing.TB, repo string) {
	t.Helper()
	packs, err := filepath.Glob(filepath.Join(repo, "data/*/*"))
	assert.NilError(t, err)
	for _, pack := range packs {
		text, err := os.ReadFile(pack)
		assert.NilError(t, err)
		text[len(text)/2] ^= 1
		assert.NilError(t, os.Chmod(pack, 0o600))
		assert.NilError(t, os.WriteFile(pack, text, 0o600))
	}
}
