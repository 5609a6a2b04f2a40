package dir_test

import (
	"os"
	"testing"

	"github.com/berth-plugin/berth/volplugin/engine/dir"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func TestConformance(t *testing.T) {
	t.Run("the machine's file system", func(t *testing.T) {
		enginetest.Run(t, dir.Engine{}, func(t testing.TB) string { return t.TempDir() })
	})
	t.Run("tmpfs", func(t *testing.T) {
		enginetest.Run(t, dir.Engine{}, func(t testing.TB) string { return mounttest.Tmpfs(t, 1<<20) })
	})
}
