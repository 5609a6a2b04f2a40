package btrfs_test

import (
	"context"
	"testing"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func newPlace(t testing.TB) engine.Place {
	return enginetest.NewPlace(t, mounttest.Disk(t, "btrfs", 1<<30))
}

func TestConformance(t *testing.T) { enginetest.Run(t, treeengine.New(btrfs.Trees{}), newPlace) }

// adopted makes ordinary directories, as an operator does.
type adopted struct{ btrfs.Trees }

func (adopted) Make(parent *rooted.Dir, name string, _ bool) error { return parent.Mkdir(name, 0o700) }

func (a adopted) Probe(ctx context.Context, dir *rooted.Dir) (engine.Abilities, error) {
	can, err := a.Trees.Probe(ctx, dir)
	can.Limit, can.Instant, can.Consistency = false, false, engine.None
	return can, err
}

func TestConformanceOfDirectoriesThatWereAdopted(t *testing.T) {
	enginetest.Run(t, treeengine.New(adopted{}), newPlace)
}
