package restic

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// maxLine bounds one line of restic's, in bytes. A line of progress names a few files.
const maxLine = 1 << 20

// lines is a writer that cuts what restic writes. The first error of do is given to fail.
type lines struct {
	do    func(line []byte) error // nil drops all
	whole int                     // as in call
	fail  func(error)
	buf   []byte
	ended bool // with an error
}

func (l *lines) Write(p []byte) (int, error) {
	if l.do == nil || l.ended {
		return len(p), nil
	}
	if l.whole > 0 {
		if l.buf = append(l.buf, p...); len(l.buf) > l.whole {
			l.stop(fmt.Errorf("restic wrote more than %d bytes", l.whole))
		}
		return len(p), nil
	}
	l.buf = append(l.buf, p...)
	for !l.ended {
		line, rest, ok := bytes.Cut(l.buf, []byte{'\n'})
		if !ok {
			break
		}
		l.give(line)
		l.buf = append(l.buf[:0], rest...)
	}
	if len(l.buf) > maxLine {
		l.stop(fmt.Errorf("restic wrote a line of more than %d bytes", maxLine))
	}
	return len(p), nil
}

// end gives what has no newline after it.
func (l *lines) end() {
	if l.do != nil && !l.ended && len(l.buf) > 0 {
		l.give(l.buf)
	}
	l.buf = nil
}

func (l *lines) give(line []byte) {
	if l.whole == 0 {
		if line = bytes.TrimSpace(line); len(line) == 0 {
			return
		}
	}
	if err := l.do(line); err != nil {
		l.stop(err)
	}
}

func (l *lines) stop(err error) {
	l.ended, l.buf = true, nil
	l.fail(err)
}

// Bounds of what is kept of the words of restic.
const (
	maxTail     = 8
	maxTailLine = 600
)

// tail keeps the last words on the error output, and the reason that restic gives in the end.
type tail struct {
	next   func(line []byte) error // nil for none
	last   []string
	reason string
}

func (t *tail) line(line []byte) error {
	if t.next != nil {
		if err := t.next(line); err != nil {
			return err
		}
	}
	if kind := kindOf(line); kind == "exit_error" {
		var exit exitMessage
		if json.Unmarshal(line, &exit) == nil {
			t.reason = exit.Message
			return nil
		}
	} else if kind == "error" {
		var m errorMessage
		if json.Unmarshal(line, &m) == nil {
			line = []byte(m.text())
		}
	}
	text := cut(string(line), maxTailLine)
	if len(t.last) > 0 && t.last[len(t.last)-1] == text {
		return nil
	}
	if len(t.last) == maxTail {
		t.last = t.last[1:]
	}
	t.last = append(t.last, text)
	return nil
}

// text is one line: the reason, and the last that was said before, which often says more.
func (t *tail) text() string {
	parts := t.last
	if t.reason != "" {
		parts = append([]string{cut(t.reason, 4*maxTailLine)}, parts[max(0, len(parts)-3):]...)
	}
	text := strings.ReplaceAll(strings.Join(parts, "; "), "Fatal: ", "")
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func cut(text string, most int) string {
	if len(text) > most {
		return strings.ToValidUTF8(text[:most], "") + "..."
	}
	return text
}

// kindOf is the message_type of a line, "" when it is no message.
func kindOf(line []byte) string {
	if len(line) == 0 || line[0] != '{' {
		return ""
	}
	var head struct {
		Kind string `json:"message_type"`
	}
	if json.Unmarshal(line, &head) != nil {
		return ""
	}
	return head.Kind
}

type exitMessage struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// errorMessage is what backup, restore and check write for one error.
type errorMessage struct {
	Error struct {
		Message string `json:"message"`
	} `json:"error"`
	During  string `json:"during"`
	Item    string `json:"item"`
	Message string `json:"message"` // of check
}

func (m errorMessage) text() string {
	text := strings.TrimSpace(m.Error.Message + m.Message)
	if m.Item != "" && !strings.Contains(text, m.Item) {
		return m.Item + ": " + text
	}
	return text
}

// readError reads a line of the error output. What is no such message is not ok.
func readError(line []byte) (m errorMessage, ok bool, err error) {
	if kindOf(line) != "error" {
		return m, false, nil
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, false, malformed(line, err)
	}
	if m.text() == "" {
		return m, false, malformed(line, fmt.Errorf("it says no error"))
	}
	return m, true, nil
}

func malformed(line []byte, err error) error {
	return fmt.Errorf("restic wrote what is not understood: %w: %.200q", err, line)
}

// readMessage reads a line of the output: one that is no JSON object with a type is an error, one
// of another type than those in known is left alone.
func readMessage(line []byte, known map[string]any) (kind string, err error) {
	var head struct {
		Kind *string `json:"message_type"`
	}
	if err := json.Unmarshal(line, &head); err != nil {
		return "", malformed(line, err)
	}
	if head.Kind == nil || *head.Kind == "" {
		return "", malformed(line, fmt.Errorf("it has no message_type"))
	}
	into, ok := known[*head.Kind]
	if !ok {
		return "", nil
	}
	if err := json.Unmarshal(line, into); err != nil {
		return "", malformed(line, err)
	}
	return *head.Kind, nil
}

// backupStatus and backupSummary are what `restic backup` writes.
type backupStatus struct {
	FilesDone uint64 `json:"files_done"`
	BytesDone uint64 `json:"bytes_done"`
}

type backupSummary struct {
	FilesNew        *uint64 `json:"files_new"`
	FilesChanged    *uint64 `json:"files_changed"`
	FilesUnmodified *uint64 `json:"files_unmodified"`
	DirsNew         *uint64 `json:"dirs_new"`
	DirsChanged     *uint64 `json:"dirs_changed"`
	DirsUnmodified  *uint64 `json:"dirs_unmodified"`
	Added           *uint64 `json:"data_added_packed"`
	Files           *uint64 `json:"total_files_processed"`
	Bytes           *uint64 `json:"total_bytes_processed"`
	ID              string  `json:"snapshot_id"`
}

// check refuses a summary in which something is missing.
func (s *backupSummary) check() error {
	for name, n := range map[string]*uint64{
		"files_new": s.FilesNew, "files_changed": s.FilesChanged, "files_unmodified": s.FilesUnmodified,
		"dirs_new": s.DirsNew, "dirs_changed": s.DirsChanged, "dirs_unmodified": s.DirsUnmodified,
		"data_added_packed": s.Added, "total_files_processed": s.Files, "total_bytes_processed": s.Bytes,
	} {
		if n == nil {
			return fmt.Errorf("restic's summary has no %s", name)
		}
	}
	if *s.FilesNew+*s.FilesChanged+*s.FilesUnmodified != *s.Files {
		return fmt.Errorf("restic's summary contradicts itself: %d files, of which %d are new, %d changed and %d unmodified", *s.Files, *s.FilesNew, *s.FilesChanged, *s.FilesUnmodified)
	}
	return nil
}

func (s *backupSummary) dirs() uint64 { return *s.DirsNew + *s.DirsChanged + *s.DirsUnmodified }

// restoreStatus and restoreSummary are what `restic restore` writes. Files are entries of
// every kind there.
type restoreStatus struct {
	Total         uint64 `json:"total_files"`
	Restored      uint64 `json:"files_restored"`
	TotalBytes    uint64 `json:"total_bytes"`
	BytesRestored uint64 `json:"bytes_restored"`
}

// checkSummary is what `restic check` writes.
type checkSummary struct {
	Errors      int      `json:"num_errors"`
	BrokenPacks []string `json:"broken_packs"`
	RepairIndex bool     `json:"suggest_repair_index"`
	Prune       bool     `json:"suggest_prune"`
}

// tagChanged is what `restic tag` writes for a snapshot, which has another ID then.
type tagChanged struct {
	Old string `json:"old_snapshot_id"`
	New string `json:"new_snapshot_id"`
}

// snapshot is an element of what `restic snapshots` writes.
type snapshot struct {
	ID       string         `json:"id"`
	Time     time.Time      `json:"time"`
	Hostname string         `json:"hostname"`
	Tags     []string       `json:"tags"`
	Summary  *backupSummary `json:"summary"`
}

func readSnapshots(text []byte) ([]snapshot, error) {
	var list []snapshot
	decoder := json.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&list); err != nil {
		return nil, malformed(text, err)
	}
	if decoder.More() {
		return nil, malformed(text, fmt.Errorf("there is more after the list"))
	}
	for _, s := range list {
		if !fullID.MatchString(s.ID) {
			return nil, malformed(text, fmt.Errorf("ID %.80q", s.ID))
		}
	}
	return list, nil
}
