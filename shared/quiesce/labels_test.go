package quiesce

import (
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

func TestLabels(t *testing.T) {
	for name, c := range map[string]struct {
		labels map[string]string
		want   wishes
		err    string
	}{
		"none":           {want: wishes{timeout: defaultTimeout}},
		"others":         {labels: map[string]string{"app": "x"}, want: wishes{timeout: defaultTimeout}},
		"hooks":          {labels: map[string]string{LabelPre: "a", LabelPost: "b", LabelTimeout: "90s"}, want: wishes{pre: "a", post: "b", timeout: 90 * time.Second}},
		"this volume":    {labels: map[string]string{LabelPause: "true", LabelVolumes: "w, v"}, want: wishes{pause: true, timeout: defaultTimeout}},
		"another volume": {labels: map[string]string{LabelPause: "true", LabelVolumes: "w,vv"}},
		"not a bool":     {labels: map[string]string{LabelStop: "yes"}, err: `label berth.backup.stop="yes": want true or false`},
		"no time":        {labels: map[string]string{LabelTimeout: "30"}, err: `label berth.backup.timeout="30": want a time from 1s to 1h0m0s`},
		"too long":       {labels: map[string]string{LabelTimeout: "2h"}, err: "want a time from 1s to 1h0m0s"},
		"unknown":        {labels: map[string]string{"berth.backup.per": "x"}, err: "label berth.backup.per: there is no such label"},
		"both":           {labels: map[string]string{LabelStop: "true", LabelPause: "true"}, err: "want only one of them"},
	} {
		got, err := parseLabels(c.labels, "v")
		if c.err != "" {
			assert.ErrorContains(t, err, c.err, name)
			continue
		}
		assert.NilError(t, err, name)
		assert.Assert(t, got == c.want, "%s: %+v", name, got)
	}
}
