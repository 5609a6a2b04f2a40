package restic

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

func TestVersions(t *testing.T) {
	for line, ok := range map[string]bool{
		"restic 0.19.1 compiled with go1.26": true, "restic 0.17.0 x": true, "restic 1.0.0 x": true, "restic 0.100.0": true,
		"restic 0.16.5 x": false, "restic 0.9.6 x": false, "rustic 0.19.1": false, "": false,
	} {
		assert.Equal(t, tooOld("/usr/bin/restic", line) == nil, ok, "%q", line)
	}
}

func TestLinesAreWhole(t *testing.T) {
	var got []string
	l := &lines{do: func(line []byte) error { got = append(got, string(line)); return nil }, fail: func(err error) { t.Error(err) }}
	for _, part := range []string{"a", "b\nc", "\n\n", "d\r\ne", ""} {
		_, err := l.Write([]byte(part))
		assert.NilError(t, err)
	}
	l.end()
	assert.DeepEqual(t, got, []string{"ab", "c", "d", "e"})

	var failed error
	l = &lines{do: func([]byte) error { return nil }, fail: func(err error) { failed = err }}
	for range 3 {
		_, err := l.Write([]byte(strings.Repeat("x", maxLine/2)))
		assert.NilError(t, err)
	}
	assert.ErrorContains(t, failed, "a line of more than")
}

func TestPruneSteps(t *testing.T) {
	for line, want := range map[string]string{
		"[0:05] 10.00%  1 / 10 packs repacked": "10.00% 1 / 10 packs repacked", "loading all snapshots...": "loading all snapshots",
		"to delete:            5 blobs / 3.2 MiB": "", "": "",
	} {
		got, _ := pruneStep(line)
		assert.Equal(t, got, want)
	}
}

const summaryLine = `{"message_type":"summary","files_new":4,"files_changed":0,"files_unmodified":0,"dirs_new":2,"dirs_changed":0,"dirs_unmodified":0,"data_blobs":3,"tree_blobs":3,"data_added":527550,"data_added_packed":1328,"total_files_processed":4,"total_bytes_processed":5242899,"snapshot_id":"8751a9e7be30103ecda51fad2ebc416b0591c2f5056685bbf514fdf4ead4a0aa"}`

func TestASummaryThatIsNotWholeIsRefused(t *testing.T) {
	read := func(line string) error {
		var s backupSummary
		if _, err := readMessage([]byte(line), map[string]any{"summary": &s}); err != nil {
			return err
		}
		return s.check()
	}
	assert.NilError(t, read(summaryLine))
	for old, changed := range map[string]string{
		`"files_new":4`: `"files_new":3`, `"dirs_new":2,`: ``, `"total_bytes_processed":5242899`: `"total_bytes_processed":"5242899"`,
		`"message_type":"summary"`: `"message_type":"later"`, `{"message_type":"summary",`: `{`, `}`: ``, `"files_changed":0`: `"files_changed":-1`,
	} {
		assert.Assert(t, read(strings.Replace(summaryLine, old, changed, 1)) != nil, "%s", changed)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add([]byte(summaryLine))
	f.Add([]byte(`{"message_type":"status","percent_done":0,"files_done":4,"bytes_done":5242899}`))
	f.Add([]byte(`{"message_type":"error","error":{"message":"read x: input/output error"},"during":"archival","item":"/b/data/x"}`))
	f.Add([]byte(`{"message_type":"summary","files_new":-1}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		run := &backing{progress: told(nil), seen: map[string]bool{}}
		if run.message(line) == nil && run.done && run.summary.check() == nil {
			if have, err := run.summary.stored(0); err == nil && have.Files+1 != *run.summary.Files {
				t.Errorf("%+v", have)
			}
		}
		if m, ok, err := readError(line); ok && (err != nil || m.text() == "") {
			t.Errorf("%+v %v", m, err)
		}
		restore := &restoring{progress: told(nil)}
		if restore.message(line) != nil && restore.done {
			t.Error("a summary that is not understood counts")
		}
		last := &tail{}
		if err := last.line(line); err != nil || strings.ContainsAny(last.text(), "\n\r") {
			t.Errorf("%v %q", err, last.text())
		}
	})
}

func FuzzSnapshots(f *testing.F) {
	f.Add([]byte(`[{"time":"2026-01-02T03:04:05Z","tree":"7a","paths":["/a"],"hostname":"h","tags":["berth","volume=v","holds=3/2/10/4"],"summary":` + summaryLine + `,"id":"8751a9e7be30103ecda51fad2ebc416b0591c2f5056685bbf514fdf4ead4a0aa"}]`))
	f.Add([]byte(`[]`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := readSnapshots(text)
		if err != nil {
			return
		}
		for _, s := range list {
			b, _ := s.backup()
			if !fullID.MatchString(b.ID) {
				t.Errorf("ID %q", b.ID)
			}
		}
	})
}

func FuzzHolds(f *testing.F) {
	f.Add("holds=1/2/3/4")
	f.Add("holds=01/2/3/4 ")
	f.Fuzz(func(t *testing.T, tag string) {
		if c, ok := readHolds(tag); ok && c.tag() != tag {
			t.Errorf("%q is %q", tag, c.tag())
		}
	})
}
