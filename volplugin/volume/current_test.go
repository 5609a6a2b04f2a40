package volume

import (
	"maps"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/options"
)

func TestCurrentOptionsMakeTheVolumeAsItIs(t *testing.T) {
	hour := Span(time.Hour)
	for name, c := range map[string]struct {
		given  map[string]string
		change func(*Record)
		want   map[string]string
	}{
		"unchanged": {
			given:  map[string]string{"size": "1G", "snapshot.keep": "7d", "label.tier": "gold", "protect": "1", "mode": "0750"},
			change: func(*Record) {},
			want:   map[string]string{"size": "1G", "snapshot.keep": "7d", "label.tier": "gold", "protect": "1", "mode": "0750"},
		},
		"set later": {
			given: map[string]string{"label.tier": "gold"},
			change: func(r *Record) {
				r.Schedule, r.Keep, r.BackupSchedule, r.BackupTarget, r.BackupKeep = "@hourly", "24h", "@daily", "nas", "7d"
				r.Size, r.Protect, r.TrashKeep, r.Labels = 2<<30, true, &hour, map[string]string{"tier": "silver", "team": "a"}
			},
			want: map[string]string{
				"snapshot.schedule": "@hourly", "snapshot.keep": "24h", "backup.schedule": "@daily", "backup.target": "nas", "backup.keep": "7d",
				"size": "2147483648", "protect": "true", "trash.keep": "1h0m0s", "label.tier": "silver", "label.team": "a",
			},
		},
		"taken away": {
			given: map[string]string{
				"backup.schedule": "@daily", "backup.target": "nas", "snapshot.schedule": "@hourly", "protect": "true",
				"trash.keep": "2d", "label.tier": "gold", "ro": "true",
			},
			change: func(r *Record) {
				r.BackupSchedule, r.BackupTarget, r.Schedule, r.Protect, r.TrashKeep, r.Labels = "", "", "", false, nil, nil
			},
			want: map[string]string{"ro": "true"},
		},
		"not into the trash any more": {
			given:  map[string]string{"trash.keep": "2d"},
			change: func(r *Record) { r.OnRemove = options.Purge },
			want:   map[string]string{"on-remove": "purge"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := options.Parse(maps.Clone(c.given))
			assert.NilError(t, err)
			rec := newRecord("db", "host", spec, false, time.Now())
			c.change(&rec)
			now := rec.CurrentOptions()
			assert.DeepEqual(t, now, c.want)
			spec, err = options.Parse(now)
			assert.NilError(t, err)
			again := newRecord("db", "host", spec, false, rec.CreatedAt)
			assert.DeepEqual(t, again.CurrentOptions(), c.want)
			if rec.OnRemove != options.Trash {
				rec.TrashKeep = nil
			}
			again.UUID, again.Options, rec.Options = rec.UUID, nil, nil
			assert.DeepEqual(t, again, rec)
		})
	}
}
