package devmapper

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// answerOf turns the form of a question into that of an answer, where places are
// counted from the beginning.
func answerOf(t *testing.T, table []Target) []byte {
	t.Helper()
	data, err := encodeTable(table)
	assert.NilError(t, err)
	for at := 0; at < len(data); {
		next := at + int(binary.NativeEndian.Uint32(data[at+20:]))
		binary.NativeEndian.PutUint32(data[at+20:], uint32(next))
		at = next
	}
	return data
}

func TestTablesAreReadAsTheyAreWritten(t *testing.T) {
	table := []Target{
		Linear(100, Number{7, 3}, 2048),
		{Start: 100, Length: 1 << 40, Kind: "thin", Params: "253:0 16777215"},
		{Start: 100 + 1<<40, Length: 8, Kind: "error"},
	}
	got, err := decodeTable(answerOf(t, table), len(table))
	assert.NilError(t, err)
	assert.DeepEqual(t, got, table)
}

func TestTargets(t *testing.T) {
	for want, target := range map[string]Target{
		"7:3 2048":                           Linear(8, Number{7, 3}, 2048),
		"253:4 5":                            Thin(8, Number{253, 4}, 5),
		"7:0 7:1 128 10 1 error_if_no_space": ThinPool(8, Number{7, 0}, Number{7, 1}, PoolOptions{BlockSectors: 128, LowWater: 10}),
		"7:0 7:1 256 0 2 error_if_no_space no_discard_passdown": ThinPool(8, Number{7, 0}, Number{7, 1},
			PoolOptions{BlockSectors: 256, KeepDiscarded: true}),
	} {
		assert.Equal(t, target.Params, want)
	}
}

func TestTargetsThatAreNoneAreRefused(t *testing.T) {
	for _, target := range []Target{{}, {Length: 1}, {Kind: "thin"}, {Length: 1, Kind: "sixteen-letters!"}} {
		_, err := encodeTable([]Target{target})
		assert.ErrorContains(t, err, "no target")
	}
}

func TestCutOffAnswersAreErrors(t *testing.T) {
	table := []Target{{Length: 1, Kind: "error"}, {Start: 1, Length: 1, Kind: "error"}}
	data := answerOf(t, table)
	for end := range unix.SizeofDmTargetSpec + len(data)/2 {
		_, err := decodeTable(data[:end], len(table))
		assert.Assert(t, errors.Is(err, errShort), "%d bytes: %v", end, err)
	}
}

func TestNames(t *testing.T) {
	var data []byte
	entry := func(dev uint64, next uint32, name string) {
		data = binary.NativeEndian.AppendUint64(data, dev)
		data = binary.NativeEndian.AppendUint32(data, next)
		data = append(data, name...)
	}
	entry(unix.Mkdev(253, 0), 24, "one\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	entry(unix.Mkdev(253, 300), 0, "two\x00 event number and flags")
	got, err := decodeNames(data)
	assert.NilError(t, err)
	assert.DeepEqual(t, got, map[string]Number{"one": {253, 0}, "two": {253, 300}})

	got, err = decodeNames(make([]byte, 16))
	assert.NilError(t, err)
	assert.Equal(t, len(got), 0)
}

func TestNamesThatAreNone(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "control", "a\x00", string(make([]byte, 128))} {
		assert.ErrorContains(t, checkName(name), "no device name")
	}
	assert.NilError(t, checkName("berth-1a2b-pool"))
}

func FuzzDecode(f *testing.F) {
	table, err := encodeTable([]Target{{Length: 1, Kind: "error"}, Thin(8, Number{253, 4}, 5)})
	assert.NilError(f, err)
	f.Add(table, 2)
	f.Add(make([]byte, 64), 1)
	f.Fuzz(func(t *testing.T, data []byte, count int) {
		if targets, err := decodeTable(data, count); err == nil && count >= 0 && len(targets) != count {
			t.Errorf("%d targets, want %d", len(targets), count)
		}
		_, _ = decodeNames(data)
		_, _ = decodeVersions(data)
	})
}
