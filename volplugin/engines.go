package volplugin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/image"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// engines are those that this Berth has, one of each for all stores.
type engines struct {
	all  volume.Engines
	thin *thin.Engine // nil where nothing can be mounted
}

// newEngines makes them. local is Config.Local: without it there is nowhere to mount an
// image or a device. pool is Config.ThinPool.
func newEngines(local string, pool thin.Settings) (engines, error) {
	e := engines{all: volume.Engines{
		treeengine.New(btrfs.Trees{}), treeengine.New(copying.Reflink()), treeengine.New(copying.Dir()),
	}}
	if local == "" {
		return e, nil
	}
	inside := map[filesystem.Kind]engine.Trees{
		filesystem.Btrfs: btrfs.Trees{}, filesystem.XFS: copying.Dir(), filesystem.Ext4: copying.Dir(),
	}
	var err error
	if e.thin, err = thin.New(pool); err != nil {
		return e, err
	}
	e.all = append(e.all, image.New(inside), e.thin)
	return e, nil
}

// recover makes good what a killed process has left outside of the roots.
func (e engines) recover(ctx context.Context) error {
	if e.thin == nil {
		return nil
	}
	return e.thin.Recover(ctx)
}

// localName is a store's directory in Config.Local. Its key may have slashes.
func localName(key string) string {
	sum := sha256.Sum256([]byte(key))
	const enough = 8
	return hex.EncodeToString(sum[:enough])
}
