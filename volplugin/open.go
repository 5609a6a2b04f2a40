package volplugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"github.com/berth-plugin/berth/shared/state"
)

// schemaVersion is that of the buckets in ledger.go: the names of the fields of
// their record types, and of the types in them.
const schemaVersion = 3

// OpenState opens this host's cache, one file for each host. The errors are those of
// state.Open.
func OpenState(path string) (*state.DB, error) {
	return state.Open(path, state.Options{Version: schemaVersion, Migrations: []state.Migration{toStores, toCounts}})
}

// countsVersion is that of the mounts' bucket in ledger.go.
const countsVersion = 1

// OpenCounts opens the counts of mounts in the directory dir. They are void after a
// reboot, so they have a file for each boot, which is not synced: a Mount need not
// wait for the disk. Files of earlier boots are removed. The errors are those of
// state.Open.
func OpenCounts(dir string) (*state.DB, error) {
	boot, err := kernelBootID()
	if err != nil {
		return nil, fmt.Errorf("boot ID: %w", err)
	}
	path := filepath.Join(dir, "mounts-"+boot+".db")
	old, err := filepath.Glob(filepath.Join(dir, "mounts-*.db"))
	if err != nil {
		return nil, err
	}
	for _, file := range old {
		if file == path {
			continue
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return state.Open(path, state.Options{Version: countsVersion, NoSync: true})
}

// toCounts marks files without counts of mounts, which earlier versions would miss.
// openLedger moves those that are there.
func toCounts(*bolt.Tx) error { return nil }

// toStores puts what was of the only root, in version 1, under the key of the
// default one.
func toStores(tx *bolt.Tx) error {
	const store = "default"
	volumes, err := readAll(tx, "volumes")
	if err != nil {
		return err
	}
	if volumes != nil {
		if err := tx.DeleteBucket([]byte("volumes")); err != nil {
			return err
		}
	}
	cache, owners := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	for name, v := range volumes {
		cache[store+"/"+name] = v
		owners[name] = json.RawMessage(`"` + store + `"`)
	}
	root, err := readAll(tx, "volume-root")
	if err != nil {
		return err
	}
	stores := map[string]json.RawMessage{}
	if state, ok := root["this"]; ok {
		stores[store] = state
	}
	if root != nil {
		if err := tx.DeleteBucket([]byte("volume-root")); err != nil {
			return err
		}
	}
	mounts, err := readAll(tx, "volume-mounts")
	if err != nil {
		return err
	}
	for name, m := range mounts {
		var fields map[string]any
		if err := json.Unmarshal(m, &fields); err != nil {
			return err
		}
		fields["Store"] = store
		if mounts[name], err = json.Marshal(fields); err != nil {
			return err
		}
	}
	for bucket, records := range map[string]map[string]json.RawMessage{
		"volumes": cache, "volume-owners": owners, "volume-stores": stores, "volume-mounts": mounts,
	} {
		if err := writeAll(tx, bucket, records); err != nil {
			return err
		}
	}
	return nil
}

// readAll copies a bucket; nil is one that does not exist.
func readAll(tx *bolt.Tx, bucket string) (map[string]json.RawMessage, error) {
	b := tx.Bucket([]byte(bucket))
	if b == nil {
		return nil, nil
	}
	records := map[string]json.RawMessage{}
	err := b.ForEach(func(key, value []byte) error {
		records[string(key)] = append(json.RawMessage(nil), value...)
		return nil
	})
	return records, err
}

func writeAll(tx *bolt.Tx, bucket string, records map[string]json.RawMessage) error {
	if len(records) == 0 {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists([]byte(bucket))
	if err != nil {
		return err
	}
	for key, value := range records {
		if err := b.Put([]byte(key), value); err != nil {
			return err
		}
	}
	return nil
}
