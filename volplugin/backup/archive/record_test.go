package archive

import (
	"reflect"
	"strings"
	"testing"
)

// A record that is taken is that of its name, and the same when it is written again.
func FuzzRecord(f *testing.F) {
	id := strings.Repeat("0a", 16)
	sum := strings.Repeat("f", 64)
	for _, text := range []string{
		`{"schema":1,"id":"` + id + `","volume":"vol","uuid":"u","time":"2026-01-31T12:00:00Z","tags":["a"],"files":1,"size":5,"sha256":"` + sum + `"}`,
		`{"schema":2,"id":"` + id + `","volume":"vol","size":5,"sha256":"` + sum + `"}`,
		`{"schema":1,"id":"` + id + `","volume":"other","size":5,"sha256":"` + sum + `"}`,
		`{"schema":1,"id":"` + id + `","volume":"vol","size":-5,"sha256":"` + sum + `"}`,
		`{"schema":1,"id":"` + id + `","volume":"vol","size":5,"sha256":"../` + sum + `"}`, `[]`, `null`, `{`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		rec, err := decodeRecord(text, "vol", id)
		if err != nil {
			return
		}
		if rec.ID != id || rec.Volume != "vol" || rec.Size < 0 || rec.Schema != recordSchema {
			t.Fatalf("%q was taken as %+v", text, rec)
		}
		again, err := rec.encode()
		if err != nil {
			return // a time of a year that RFC 3339 has no form for
		}
		if got, err := decodeRecord(again, "vol", id); err != nil || !reflect.DeepEqual(got.backup(), rec.backup()) && !got.Time.Equal(rec.Time) {
			t.Fatalf("%+v: %v\n%+v", rec, err, got)
		}
	})
}
