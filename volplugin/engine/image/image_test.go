package image

import (
	"os"
	"testing"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestMain(m *testing.M) {
	if filesystem.Watchdog() {
		return
	}
	if text := os.Getenv(callEnv); text != "" {
		os.Exit(obey(text))
	}
	// Where what is written costs nothing, if there is such a place: these tests
	// format and copy some hundred file systems.
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() && os.Getenv("TMPDIR") == "" {
		_ = os.Setenv("TMPDIR", "/dev/shm")
	}
	os.Exit(mounttest.Main(m))
}

// all is what berthd gives the engine.
func all() map[filesystem.Kind]engine.Trees {
	return map[filesystem.Kind]engine.Trees{filesystem.Btrfs: btrfs.Trees{}, filesystem.XFS: copying.Dir(), filesystem.Ext4: copying.Dir()}
}

// only is the engine with one kind of file system.
func only(kind filesystem.Kind) *Engine {
	return New(map[filesystem.Kind]engine.Trees{kind: all()[kind]})
}

// size of volumes, some mebibytes above the least.
func size(kind filesystem.Kind) uint64 { return max(64<<20, kind.MinSize()) + 8<<20 }

// roots are file systems that have reflinks, and have not.
var roots = map[string]func(testing.TB) engine.Place{
	"ext4": func(t testing.TB) engine.Place { return rootOn(t, "ext4") },
	"xfs":  func(t testing.TB) engine.Place { return rootOn(t, "xfs") },
}

// rootEnv names a directory in which roots are made, on whatever file system it is,
// in the place of those on loop devices.
const rootEnv = "BERTH_TEST_IMAGE_ROOT"

func rootOn(t testing.TB, fs string) engine.Place {
	t.Helper()
	if base := os.Getenv(rootEnv); base != "" {
		root, err := os.MkdirTemp(base, "root") //nolint:usetesting // on the file system that the caller wants
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(root) })
		return enginetest.NewPlace(t, root)
	}
	return enginetest.NewPlace(t, mounttest.Disk(t, fs, 64<<30))
}

func TestEngine(t *testing.T) {
	t.Parallel()
	for root, newPlace := range roots {
		for _, kind := range filesystem.Kinds {
			// All of them take many minutes; this is what most volumes are.
			if testing.Short() && string(kind)+root != "btrfsext4" {
				continue
			}
			t.Run(string(kind)+" on "+root, func(t *testing.T) {
				t.Parallel() // most of it waits for the kernel
				options := []enginetest.Option{
					enginetest.Template(engine.Volume{Size: size(kind), FS: string(kind)}),
					enginetest.Files(func(p engine.Place, name string) string { return p.Images.Path() + "/" + imageName(name) }),
				}
				if kind == filesystem.Ext4 && !mounttest.HasSysResource(t) {
					options = append(options, enginetest.Fixed())
				}
				enginetest.Run(t, only(kind), newPlace, options...)
			})
		}
	}
}
