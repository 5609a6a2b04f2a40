package backup

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/berth-plugin/berth/volplugin/engine"
)

// manifestSchema is the version of the manifests this program writes.
const manifestSchema = 1

// maxManifest bounds a manifest, in bytes.
const maxManifest = 256 << 10

// A Manifest is stored in each backup, so that its volume can be made anew on a host
// that knows nothing of it.
type Manifest struct {
	Schema int `json:"schema"`
	// Berth is the version that made the backup.
	Berth string `json:"berth"`
	// Volume and UUID are those of the volume, Options what it was made with.
	Volume  string            `json:"volume"`
	UUID    string            `json:"uuid"`
	Options map[string]string `json:"options,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Engine and FileSystem kept the data; Size is the limit in bytes, 0 for none.
	Engine     string `json:"engine"`
	FileSystem string `json:"file-system,omitempty"`
	Size       uint64 `json:"size,omitempty"`
	// Snapshot is the name of the snapshot that was backed up, and SnapshotKept says
	// that it was there before and stays.
	Snapshot     string    `json:"snapshot"`
	SnapshotKept bool      `json:"snapshot-kept,omitempty"`
	Time         time.Time `json:"time"`
	// Consistency of the snapshot. Unstable counts files that changed while they were
	// copied into it.
	Consistency engine.Consistency `json:"consistency"`
	Unstable    uint64             `json:"unstable,omitempty"`
	Host        string             `json:"host"`
}

// Encode gives the stored form.
func (m Manifest) Encode() ([]byte, error) {
	m.Schema = manifestSchema
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the manifest of volume %s: %w", m.Volume, err)
	}
	return append(text, '\n'), nil
}

// DecodeManifest reads what Encode, of this version or of an earlier one, has made. Its
// content is not to be trusted.
func DecodeManifest(text []byte) (Manifest, error) {
	var m Manifest
	if len(text) > maxManifest {
		return m, fmt.Errorf("the manifest has %d bytes: at most %d are read", len(text), maxManifest)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return Manifest{}, fmt.Errorf("the manifest is damaged: %w", err)
	}
	if m.Schema < 1 || m.Schema > manifestSchema {
		return Manifest{}, fmt.Errorf("the manifest has schema %d, and this Berth knows up to %d", m.Schema, manifestSchema)
	}
	return m, nil
}

// Fields are the manifest as an object of JSON.
func (m Manifest) Fields() (map[string]any, error) {
	text, err := m.Encode()
	if err != nil {
		return nil, err
	}
	fields := map[string]any{}
	return fields, json.Unmarshal(text, &fields)
}
