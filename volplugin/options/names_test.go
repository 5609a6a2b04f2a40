package options_test

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// Package volume imports options, so that its rule is written down here again.
func FuzzSourcesAreNamedAsVolumesAre(f *testing.F) {
	for _, name := range []string{"a", "A.b-c_9", "", ".a", "-a", "a b", "a/b", "..", "é", "a\x00", strings.Repeat("x", 100), strings.Repeat("x", 101), strings.Repeat("x", 200), strings.Repeat("x", 201)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.Contains(name, "@") {
			return
		}
		_, err := options.Parse(map[string]string{"from": name})
		assert.Equal(t, err == nil, volume.CheckName(name) == nil, "%q: %v", name, err)
		_, err = options.Parse(map[string]string{"from": "v@" + name})
		assert.Equal(t, err == nil, volume.CheckSnapshotName(name) == nil, "v@%q: %v", name, err)
	})
}
