package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/berth-plugin/berth/volplugin/backup"
)

// recordSchema is the version of the records this program writes.
const recordSchema = 1

// maxRecord bounds a record, in bytes. A file without access may have a path of 64 KiB, and
// a hundred of them are named.
const maxRecord = 16 << 20

// A record says what an archive holds.
type record struct {
	Schema int       `json:"schema"`
	ID     string    `json:"id"`
	Volume string    `json:"volume"`
	UUID   string    `json:"uuid"`
	Host   string    `json:"host"`
	Time   time.Time `json:"time"`
	Tags   []string  `json:"tags,omitempty"`
	// Files, Dirs and Bytes are the Result's.
	Files uint64 `json:"files"`
	Dirs  uint64 `json:"dirs"`
	Bytes uint64 `json:"bytes"`
	// Size and SHA256 are those of the archive.
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// Missing is the Result's.
	Missing      []string `json:"missing,omitempty"`
	MissingCount uint64   `json:"missing-count,omitempty"`
}

var (
	ids     = regexp.MustCompile(`^[0-9a-f]{32}$`)
	sums    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	volumes = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}$`)
)

func (r record) encode() ([]byte, error) {
	r.Schema = recordSchema
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

// decodeRecord reads the record of a volume's backup. One that says it is another's is
// refused.
func decodeRecord(text []byte, volume, id string) (record, error) {
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return record{}, err
	}
	switch {
	case r.Schema < 1 || r.Schema > recordSchema:
		return record{}, fmt.Errorf("schema %d: this Berth knows up to %d", r.Schema, recordSchema)
	case r.Volume != volume || r.ID != id:
		return record{}, fmt.Errorf("it is that of backup %.80q of volume %.80q", r.ID, r.Volume)
	case r.Size < 0 || !sums.MatchString(r.SHA256):
		return record{}, errors.New("it has no valid size and sum")
	}
	return r, nil
}

func (r record) backup() backup.Backup {
	return backup.Backup{
		ID: r.ID, Volume: r.Volume, UUID: r.UUID, Host: r.Host, Time: r.Time, Tags: r.Tags,
		Files: r.Files, Bytes: r.Bytes, Added: uint64(r.Size), Incomplete: r.MissingCount > 0,
	}
}

// matches tells whether a filter lets the record through.
func (r record) matches(f backup.Filter) bool {
	return (f.Volume == "" || f.Volume == r.Volume) && (f.UUID == "" || f.UUID == r.UUID)
}
