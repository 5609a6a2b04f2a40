package volume

import (
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/berth-plugin/berth/volplugin/options"
)

// labelOption begins the options that are labels.
const labelOption = "label."

// CurrentOptions are the options that make a volume like this one is now. Options are
// those of its creation, and Update and Resize have changed what they say.
func (r Record) CurrentOptions() map[string]string {
	now := map[string]string{}
	for name, value := range r.Options {
		if !strings.HasPrefix(name, labelOption) {
			now[name] = value
		}
	}
	for key, value := range r.Labels {
		now[labelOption+key] = value
	}
	set := func(name, value string) {
		if now[name] = value; value == "" {
			delete(now, name)
		}
	}
	// What was given stays in the words that it was given in, where it still says the same.
	spec, err := options.Parse(maps.Clone(r.Options))
	was := newRecord(r.Name, "", spec, r.Adopted, time.Time{})
	if err != nil { // options of an older version
		was = Record{}
	}
	for _, text := range []struct{ name, was, is string }{
		{"snapshot.schedule", was.Schedule, r.Schedule},
		{"snapshot.keep", was.Keep, r.Keep},
		{"backup.schedule", was.BackupSchedule, r.BackupSchedule},
		{"backup.target", was.BackupTarget, r.BackupTarget},
		{"backup.keep", was.BackupKeep, r.BackupKeep},
		{"protect", given(was.Protect), given(r.Protect)},
		{"size", bytesOf(was.Size), bytesOf(r.Size)},
		{"trash.keep", spanOf(was.TrashKeep), spanOf(r.TrashKeep)},
		{"on-remove", string(was.OnRemove), string(r.OnRemove)},
	} {
		if text.was != text.is {
			set(text.name, text.is)
		}
	}
	if r.OnRemove != options.Trash {
		delete(now, "trash.keep") // the two contradict each other
	}
	return now
}

func given(yes bool) string {
	if yes {
		return "true"
	}
	return ""
}

func bytesOf(size uint64) string {
	if size == 0 {
		return ""
	}
	return strconv.FormatUint(size, 10)
}

func spanOf(span *Span) string {
	if span == nil {
		return ""
	}
	return time.Duration(*span).String()
}
