package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/options"
)

// played is an engine that says of itself what a test wants.
type played struct {
	engine.Engine
	name string
	able engine.Abilities
	err  error
}

func (p played) Name() string { return p.name }

func (p played) Probe(context.Context, engine.Place) (engine.Abilities, error) {
	return p.able, p.err
}

// Find of an engine that keeps nothing in directories.
func (p played) Find(place engine.Place, name string) (bool, error) {
	if p.name == imageName {
		_, err := place.Images.Stat(name + ".img")
		return err == nil, nil
	}
	return p.Engine.Find(place, name)
}

func TestTheEngineIsChosen(t *testing.T) {
	limit := engine.Abilities{FileSystem: "btrfs", Limit: true, Instant: true}
	plain := engine.Abilities{FileSystem: "ext4"}
	noBtrfs := played{name: "btrfs", err: errors.New("ext4 has no subvolumes")}
	noReflink := played{name: "reflink", err: errors.New("ext4 shares no data")}
	onDir := played{name: "dir", able: plain}
	image := played{name: "image", able: engine.Abilities{FileSystem: "ext4", Limit: true, Exclusive: true}}
	noImage := played{name: "image", err: errors.New("there are no loop devices")}
	for _, tc := range []struct {
		name    string
		engines []played
		there   string
		spec    options.Spec
		want    string
		reason  string
		refused []string
	}{
		{name: "btrfs first", engines: []played{onDir, {name: "btrfs", able: limit}, image}, want: "btrfs", reason: "the best that btrfs can do"},
		{name: "then reflink", engines: []played{noBtrfs, onDir, {name: "reflink", able: engine.Abilities{FileSystem: "xfs"}}}, want: "reflink", reason: "the best that xfs can do"},
		{name: "then dir", engines: []played{noBtrfs, noReflink, onDir, image}, want: "dir"},
		{name: "nothing", engines: []played{noBtrfs}, refused: []string{"ext4 has no subvolumes"}},
		{name: "a size on btrfs", engines: []played{{name: "btrfs", able: limit}, image}, spec: options.Spec{Size: 1 << 30}, want: "btrfs"},
		{name: "a size on ext4", engines: []played{noBtrfs, noReflink, onDir, image}, spec: options.Spec{Size: 1 << 30}, want: "image", reason: "no size can be enforced for directories on ext4"},
		{name: "a size without images", engines: []played{noBtrfs, onDir, noImage}, spec: options.Spec{Size: 1 << 30}, refused: []string{"size=1G", "ext4", "there are no loop devices", "btrfs"}},
		{name: "a size and no engine image", engines: []played{onDir}, spec: options.Spec{Size: 1 << 30}, refused: []string{"size=1G", "no engine image"}},
		{name: "a size for a directory that is there", engines: []played{onDir, image}, there: "new", spec: options.Spec{Size: 1 << 30}, refused: []string{"is there already"}},
		{name: "a file system", engines: []played{{name: "btrfs", able: limit}, image}, spec: options.Spec{FS: "xfs"}, want: "image", reason: "asked for by option fs or sparse"},
		{name: "a file system without images", engines: []played{onDir}, spec: options.Spec{FS: "xfs"}, refused: []string{"fs and sparse"}},
		{name: "data of an image that was kept", engines: []played{onDir, image}, there: ".berth/images/new.img", want: "image", reason: "its data was there already"},
		{name: "asked for", engines: []played{{name: "btrfs", able: limit}, onDir}, spec: options.Spec{Engine: "dir"}, want: "dir", reason: "asked for"},
		{name: "asked for in vain", engines: []played{noBtrfs, onDir}, spec: options.Spec{Engine: "btrfs"}, refused: []string{"engine=btrfs", "ext4 has no subvolumes"}},
		{name: "asked for and not here", engines: []played{onDir}, spec: options.Spec{Engine: "thin"}, refused: []string{`engine="thin"`, "auto, dir"}},
		{name: "asked for with a size", engines: []played{onDir}, spec: options.Spec{Engine: "dir", Size: 1 << 30}, refused: []string{"size=1G", "dir", "engine=image"}},
		{name: "shared all the same", engines: []played{image}, spec: options.Spec{Engine: "image", Given: map[string]string{"exclusive": "false"}}, refused: []string{"exclusive=false"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := t.TempDir()
			var have Engines
			for _, p := range tc.engines {
				p.Engine = treeengine.New(copying.Dir())
				have = append(have, p)
			}
			r := openRoot(t, Location{Path: path, Engines: have, Host: "a", Now: time.Now})
			if tc.there != "" {
				assert.NilError(t, os.MkdirAll(filepath.Join(path, tc.there), 0o700))
			}
			if tc.spec.Given == nil {
				tc.spec.Given = map[string]string{}
			}
			if tc.spec.Size > 0 {
				tc.spec.Given["size"] = "1G"
			}
			p, err := r.place()
			assert.NilError(t, err)
			rec, _, err := r.plan(t.Context(), p, "new", tc.spec)
			if tc.refused != nil {
				assert.Assert(t, err != nil, "it chose %s", rec.Engine)
				for _, want := range tc.refused {
					assert.ErrorContains(t, err, want)
				}
				assert.Assert(t, fault.Kind(err) != "internal", "%v", err)
				return
			}
			assert.NilError(t, err)
			assert.Equal(t, rec.Engine, tc.want)
			if tc.reason != "" {
				assert.Equal(t, rec.EngineReason, tc.reason)
			}
			assert.Equal(t, rec.Exclusive, rec.Engine == "image")
		})
	}
}

func TestAVolumeOfAnUnknownEngineIsListedAndRefused(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		_, err := r.Create(t.Context(), "far", options.Spec{Engine: "other"})
		assert.NilError(t, err)
		assert.NilError(t, r.Remove(t.Context(), "bystander"))
	})
	r := openRoot(t, Location{Path: s.order.Root, Engines: Engines{treeengine.New(copying.Dir())}, Host: "a", Now: time.Now})
	entries, err := r.Entries(t.Context(), nil)
	assert.NilError(t, err)
	rec := entries["far"].Record
	assert.Equal(t, rec.Engine, "other")
	ctx := t.Context()
	for call, err := range map[string]error{
		"attach":   r.Attach(ctx, rec),
		"data":     second(r.Data(rec)),
		"usage":    second(r.Usage(ctx, rec)),
		"snapshot": second(r.CreateSnapshot(ctx, "far", SnapshotOptions{}, nil)),
		"rename":   second(r.Rename(ctx, "far", "farther")),
		"resize":   second(r.Resize(ctx, "far", 1)),
		"remove":   r.Remove(ctx, "far"),
		"clone":    second(r.Create(ctx, "clone", options.Spec{From: &options.Source{Volume: "far"}})),
	} {
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", call, err)
		assert.ErrorContains(t, err, `engine "other"`, call)
	}
	now, err := r.Record("far")
	assert.NilError(t, err)
	assert.Equal(t, now.Phase, Ready)
}
