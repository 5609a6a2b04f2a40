package state

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"gotest.tools/v3/assert"
)

type pool struct {
	Prefix string
}

var pools = NewBucket[pool]("pools")

func open(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(path, Options{Version: 1})
	assert.NilError(t, err)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// filled makes a state file of several pages and returns its path.
func filled(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net", "state.db")
	db := open(t, path)
	assert.NilError(t, db.Update(func(tx *Tx) error {
		for i := range 200 {
			if err := pools.Put(tx, fmt.Sprintf("pool-%03d", i), pool{Prefix: strings.Repeat("x", 100)}); err != nil {
				return err
			}
		}
		return nil
	}))
	assert.NilError(t, db.Close())
	return path
}

func TestRecordsSurviveClosing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open(t, path)
	assert.NilError(t, db.Update(func(tx *Tx) error { return pools.Put(tx, "a", pool{Prefix: "10.0.0.0/24"}) }))
	assert.NilError(t, db.Close())

	db = open(t, path)
	assert.NilError(t, db.View(func(tx *Tx) error {
		got, ok, err := pools.Get(tx, "a")
		assert.NilError(t, err)
		assert.Assert(t, ok)
		assert.Equal(t, got.Prefix, "10.0.0.0/24")
		_, ok, err = pools.Get(tx, "b")
		assert.NilError(t, err)
		assert.Assert(t, !ok)
		return nil
	}))
	assert.NilError(t, db.Update(func(tx *Tx) error { return pools.Delete(tx, "a") }))
	assert.NilError(t, db.Update(func(tx *Tx) error { return pools.Delete(tx, "a") }), "deleting the unknown succeeds")
	assert.NilError(t, db.View(func(tx *Tx) error {
		return pools.Each(tx, func(key string, _ pool) error { return fmt.Errorf("%s is still there", key) })
	}))
}

func TestFailedUpdateChangesNothing(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"))
	want := fmt.Errorf("stop")
	err := db.Update(func(tx *Tx) error {
		assert.NilError(t, pools.Put(tx, "a", pool{}))
		return want
	})
	assert.ErrorIs(t, err, want)
	assert.NilError(t, db.View(func(tx *Tx) error {
		_, ok, err := pools.Get(tx, "a")
		assert.NilError(t, err)
		assert.Assert(t, !ok)
		return nil
	}))
}

func TestSecondProcessIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	open(t, path)
	_, err := Open(path, Options{Version: 1})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, path)
	assert.ErrorContains(t, err, "in use by another Berth daemon")
}

func TestNewerVersionIsRefusedAndKept(t *testing.T) {
	path := filled(t)
	db, err := Open(path, Options{Version: 2, Migrations: []Migration{func(*bolt.Tx) error { return nil }}})
	assert.NilError(t, err)
	assert.NilError(t, db.Close())
	before, err := os.ReadFile(path)
	assert.NilError(t, err)

	_, err = Open(path, Options{Version: 1})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "schema version 2")
	after, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Assert(t, bytes.Equal(before, after))
}

func TestMigrationsRunOnceAndInOrder(t *testing.T) {
	path := filled(t)
	var ran []int
	opts := Options{Version: 3, Migrations: []Migration{
		func(*bolt.Tx) error { ran = append(ran, 1); return nil },
		func(*bolt.Tx) error { ran = append(ran, 2); return nil },
	}}
	for range 2 {
		db, err := Open(path, opts)
		assert.NilError(t, err)
		assert.NilError(t, db.Close())
	}
	assert.DeepEqual(t, ran, []int{1, 2})
}

func TestFailedMigrationLeavesTheOldVersion(t *testing.T) {
	path := filled(t)
	_, err := Open(path, Options{Version: 2, Migrations: []Migration{func(tx *bolt.Tx) error {
		assert.NilError(t, tx.DeleteBucket([]byte("pools")))
		return fmt.Errorf("no")
	}}})
	assert.ErrorContains(t, err, "from version 1")
	db := open(t, path)
	assert.NilError(t, db.View(func(tx *Tx) error {
		_, ok, err := pools.Get(tx, "pool-000")
		assert.NilError(t, err)
		assert.Assert(t, ok)
		return nil
	}))
}

// Damage of any kind gives an error in words or a whole file, never a panic and
// never an empty start.
func TestDamageIsRefused(t *testing.T) {
	whole, err := os.ReadFile(filled(t))
	assert.NilError(t, err)
	pageSize := os.Getpagesize()
	check := func(t *testing.T, content []byte) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "state.db")
		assert.NilError(t, os.WriteFile(path, content, 0o600))
		db, err := Open(path, Options{Version: 1})
		if err != nil {
			assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
			assert.ErrorContains(t, err, path)
			after, err := os.ReadFile(path)
			assert.NilError(t, err)
			assert.Assert(t, bytes.Equal(content, after), "a refused file was changed")
			return
		}
		defer func() { assert.NilError(t, db.Close()) }()
		count := 0
		assert.NilError(t, db.View(func(tx *Tx) error {
			return pools.Each(tx, func(string, pool) error { count++; return nil })
		}))
		assert.Equal(t, count, 200, "records were lost in silence")
	}
	for cut := pageSize / 2; cut < len(whole); cut += pageSize / 2 {
		t.Run(fmt.Sprintf("cut at %d", cut), func(t *testing.T) { check(t, whole[:cut]) })
	}
	for page := 0; page*pageSize < len(whole); page++ {
		t.Run(fmt.Sprintf("page %d zeroed", page), func(t *testing.T) {
			content := bytes.Clone(whole)
			clear(content[page*pageSize : (page+1)*pageSize])
			check(t, content)
		})
		t.Run(fmt.Sprintf("page %d overwritten", page), func(t *testing.T) {
			content := bytes.Clone(whole)
			copy(content[page*pageSize:(page+1)*pageSize], bytes.Repeat([]byte{0xa5}, pageSize))
			check(t, content)
		})
	}
	t.Run("a text file", func(t *testing.T) { check(t, []byte(strings.Repeat("hello\n", 2000))) })
}
