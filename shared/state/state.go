// Package state keeps Berth's records in a bbolt file: typed buckets of JSON
// values, a schema version, numbered migrations. One process holds the file.
//
// It never starts over: a file that is damaged, or was written by a newer Berth,
// is refused and left as it is. It knows nothing of networks or volumes; their
// records and keys are defined beside their drivers.
package state

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/berth-plugin/berth/shared/fault"
)

// lockWait is how long Open waits for a process that is about to end, as a
// predecessor that dockerd has just replaced.
const lockWait = 3 * time.Second

var (
	metaBucket = []byte("meta")
	versionKey = []byte("schema-version")
)

// A Migration changes the records of version N to those of version N+1. It works
// on raw buckets, because the types of old versions no longer exist.
type Migration func(*bolt.Tx) error

// Options describe the file to Open.
type Options struct {
	// Version of the records this program writes, from 1.
	Version int
	// Migrations has one entry for each version below Version: Migrations[0]
	// leads from version 1 to 2.
	Migrations []Migration
	// NoSync leaves it to the kernel when what Update has done gets to the disk. The file
	// is whole when the process is killed, and is not when the machine crashes: it
	// must not be opened after a reboot.
	NoSync bool
}

// A DB is an open state file. All methods may be called concurrently; Update
// transactions run one at a time, so nothing that can hang belongs in one.
type DB struct {
	bolt *bolt.DB
}

// A Tx is one transaction.
type Tx struct {
	bolt *bolt.Tx
}

// Open opens or makes the file at path, with mode 0600 in directories of mode
// 0700. The error is a conflict when another process holds the file, and
// unavailable when the file is damaged or was written by a newer version; the
// file is unchanged then.
func Open(path string, opts Options) (*DB, error) {
	if opts.Version < 1 || len(opts.Migrations) != opts.Version-1 {
		return nil, fmt.Errorf("open state: version %d needs %d migrations, have %d", opts.Version, opts.Version-1, len(opts.Migrations))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if err := checkHeaders(path); err != nil {
		return nil, err
	}
	var db *bolt.DB
	err := catch(func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, NoSync: opts.NoSync, NoGrowSync: opts.NoSync})
		return err
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fault.Conflict("state file %s is in use by another Berth daemon; stop that one or give this one another --state", path)
	}
	if err != nil {
		return nil, damaged(path, err)
	}
	if err := prepare(db, path, opts); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &DB{bolt: db}, nil
}

// prepare checks the whole file, then its version, then brings it up to date.
func prepare(db *bolt.DB, path string, opts Options) error {
	if err := verify(db); err != nil {
		return damaged(path, err)
	}
	return db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket(metaBucket)
		if meta == nil {
			meta, err := tx.CreateBucket(metaBucket)
			if err != nil {
				return err
			}
			return putVersion(meta, opts.Version)
		}
		version, err := strconv.Atoi(string(meta.Get(versionKey)))
		if err != nil || version < 1 {
			return damaged(path, fmt.Errorf("schema version %q", meta.Get(versionKey)))
		}
		if version > opts.Version {
			return fault.Unavailable("state file %s has schema version %d and this Berth knows versions up to %d; upgrade Berth, nothing has been changed", path, version, opts.Version)
		}
		for ; version < opts.Version; version++ {
			if err := opts.Migrations[version-1](tx); err != nil {
				return fmt.Errorf("migrate state file %s from version %d: %w", path, version, err)
			}
		}
		return putVersion(meta, opts.Version)
	})
}

func putVersion(meta *bolt.Bucket, version int) error {
	want := strconv.Itoa(version)
	if string(meta.Get(versionKey)) == want {
		return nil
	}
	return meta.Put(versionKey, []byte(want))
}

// verify reads every record, and through them every page that holds one.
func verify(db *bolt.DB) error {
	return catch(func() error {
		return db.View(func(tx *bolt.Tx) error {
			return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
				return b.ForEach(func(key, value []byte) error {
					if !json.Valid(value) {
						return fmt.Errorf("record %s/%s is not JSON", name, key)
					}
					return nil
				})
			})
		})
	})
}

// catch turns a panic of fn into an error. bbolt panics on a damaged page, and a
// page beyond the end of the file is a fault of the memory map.
func catch(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return fn()
}

// checkHeaders reads the file's two header pages before bbolt does.
//
// bbolt takes the older header when the newer one is damaged, which silently
// loses the last transaction, and in a young file all of them; a header is 64
// bytes in one disk sector, so a power cut does not tear it and damage is damage.
// bbolt also maps the file and would fault on the first page that is missing.
func checkHeaders(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open state: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open state: %w", err)
	}
	// An empty file is one that Open made and never wrote to.
	if info.Size() == 0 {
		return nil
	}
	first, err := readHeader(f, 0)
	if err != nil {
		return damaged(path, err)
	}
	second, err := readHeader(f, first.pageSize)
	if err != nil {
		return damaged(path, err)
	}
	pages := max(first.pages, second.pages)
	if pages < 0 || info.Size()/first.pageSize < pages {
		return damaged(path, fmt.Errorf("%d bytes where %d pages of %d bytes are due", info.Size(), pages, first.pageSize))
	}
	return nil
}

// header is what Open needs of bbolt's meta page.
type header struct {
	pageSize, pages int64
}

// readHeader reads a meta page: a page header of 16 bytes, then magic, format
// version, page size, flags (4 bytes each), root bucket (16), free list page,
// page count, transaction, FNV-1a checksum of all before it (8 each), in the
// byte order of the machine.
func readHeader(f io.ReaderAt, offset int64) (header, error) {
	const pageHeader, metaSize, checksumAt = 16, 64, 56
	const magic = 0xED0CDAED
	meta := make([]byte, metaSize)
	if _, err := f.ReadAt(meta, offset+pageHeader); err != nil {
		return header{}, fmt.Errorf("read header at byte %d: %w", offset, err)
	}
	sum := fnv.New64a()
	_, _ = sum.Write(meta[:checksumAt]) // a hash takes everything
	if binary.NativeEndian.Uint32(meta) != magic || binary.NativeEndian.Uint64(meta[checksumAt:]) != sum.Sum64() {
		return header{}, fmt.Errorf("no valid header at byte %d", offset)
	}
	h := header{
		pageSize: int64(binary.NativeEndian.Uint32(meta[8:])),
		pages:    int64(binary.NativeEndian.Uint64(meta[40:])),
	}
	if h.pageSize < metaSize {
		return header{}, fmt.Errorf("page size %d in the header at byte %d", h.pageSize, offset)
	}
	return h, nil
}

func damaged(path string, err error) error {
	return fault.Unavailable("state file %s is damaged (%w); restore it from a backup or move it away, nothing has been changed", path, err)
}

// Close lets another process open the file. It waits for open transactions.
func (db *DB) Close() error { return db.bolt.Close() }

// Path of the file.
func (db *DB) Path() string { return db.bolt.Path() }

// View runs fn in a transaction that sees one moment of the file.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(tx *bolt.Tx) error { return fn(&Tx{bolt: tx}) })
}

// Update runs fn in a transaction that is on disk (fsync, unless Options.NoSync) when
// Update returns nil, and has not happened when it returns an error.
func (db *DB) Update(fn func(*Tx) error) error {
	return db.bolt.Update(func(tx *bolt.Tx) error { return fn(&Tx{bolt: tx}) })
}

// A Bucket is a named set of records of one type, sorted by key.
type Bucket[T any] struct {
	name []byte
}

// NewBucket names a bucket. It is made in the file at the first Put.
func NewBucket[T any](name string) Bucket[T] {
	return Bucket[T]{name: []byte(name)}
}

// Get returns the record of key, and whether there is one.
func (b Bucket[T]) Get(tx *Tx, key string) (record T, ok bool, err error) {
	bucket := tx.bolt.Bucket(b.name)
	if bucket == nil {
		return record, false, nil
	}
	value := bucket.Get([]byte(key))
	if value == nil {
		return record, false, nil
	}
	if err := json.Unmarshal(value, &record); err != nil {
		return record, false, b.undecodable(key, err)
	}
	return record, true, nil
}

// Put stores the record of key, replacing an earlier one. The key is not empty.
func (b Bucket[T]) Put(tx *Tx, key string, record T) error {
	value, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode record %s/%s: %w", b.name, key, err)
	}
	bucket, err := tx.bolt.CreateBucketIfNotExists(b.name)
	if err != nil {
		return fmt.Errorf("store record %s/%s: %w", b.name, key, err)
	}
	if err := bucket.Put([]byte(key), value); err != nil {
		return fmt.Errorf("store record %s/%s: %w", b.name, key, err)
	}
	return nil
}

// Delete removes the record of key; there need not be one.
func (b Bucket[T]) Delete(tx *Tx, key string) error {
	bucket := tx.bolt.Bucket(b.name)
	if bucket == nil {
		return nil
	}
	if err := bucket.Delete([]byte(key)); err != nil {
		return fmt.Errorf("delete record %s/%s: %w", b.name, key, err)
	}
	return nil
}

// Each calls fn for every record in the order of keys and stops at the first
// error. fn must not change the bucket.
func (b Bucket[T]) Each(tx *Tx, fn func(key string, record T) error) error {
	bucket := tx.bolt.Bucket(b.name)
	if bucket == nil {
		return nil
	}
	return bucket.ForEach(func(key, value []byte) error {
		var record T
		if err := json.Unmarshal(value, &record); err != nil {
			return b.undecodable(string(key), err)
		}
		return fn(string(key), record)
	})
}

func (b Bucket[T]) undecodable(key string, err error) error {
	return fault.Unavailable("state record %s/%s is damaged: %w", b.name, key, err)
}
