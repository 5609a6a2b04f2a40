package journal

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"gotest.tools/v3/assert"
)

// sample makes a log of a snapshot with three records and twelve appends of two.
// It returns the records.
func sample(t testing.TB) (path string, records []string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	records = []string{"snapshot-1", "snapshot-2", ""}
	replace(t, j.Snapshot(), records...)
	for i := 1; i <= 12; i++ {
		pair := []string{fmt.Sprintf("record-%da", i), fmt.Sprintf("record-%db", i)}
		put(t, j, pair...)
		records = append(records, pair...)
	}
	assert.NilError(t, j.Close())
	return path, records
}

// image returns the bytes of a sample, with few zeros at the end, and where its
// frames end.
func image(t testing.TB) (data []byte, records []string, ends []int64) {
	t.Helper()
	path, records := sample(t)
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	s := scanFile(data)
	assert.Equal(t, s.damage, Intact)
	assert.Equal(t, len(s.frames), 13)
	ends = []int64{firstFrame}
	for _, f := range s.frames {
		ends = append(ends, ends[len(ends)-1]+int64(len(f.bytes)))
	}
	return data[:s.end+frameHead], records, ends
}

// want returns how many records the frames hold that end up to offset.
func want(ends []int64, offset int64) int {
	n := 0
	for i, end := range ends[1:] {
		if end <= offset {
			n = 3 + 2*i
		}
	}
	return n
}

func (s scan) strings(t testing.TB) (out []string) {
	t.Helper()
	assert.NilError(t, s.replay(func(r []byte) error { out = append(out, string(r)); return nil }))
	return out
}

func TestCutAtEveryByte(t *testing.T) {
	data, records, ends := image(t)
	for n := range data {
		s := scanFile(data[:n:n])
		got := s.strings(t)
		assert.Assert(t, slices.Equal(got, records[:want(ends, int64(n))]), "cut at %d: %q", n, got)
		if n < firstFrame {
			assert.Equal(t, s.damage, Unreadable, "cut at %d", n)
			assert.Equal(t, s.dropped, int64(n))
		} else {
			assert.Equal(t, s.damage, Cut, "cut at %d", n)
			assert.Assert(t, s.dropped <= int64(n)-s.end)
		}
	}
}

func TestEveryFlippedBit(t *testing.T) {
	data, records, ends := image(t)
	for at := range data {
		for bit := range 8 {
			flipped := slices.Clone(data)
			flipped[at] ^= 1 << bit
			s := scanFile(flipped)
			got := s.strings(t)
			what := fmt.Sprintf("bit %d of byte %d: %s", bit, at, s.damage)
			inHeader := at < headerSize || at >= headerCopy && at < headerCopy+headerSize
			switch {
			case inHeader:
				assert.Equal(t, s.damage, HeaderCopy, what)
				assert.Assert(t, slices.Equal(got, records), what)
			case at < firstFrame: // unused
				assert.Equal(t, s.damage, Intact, what)
				assert.Assert(t, slices.Equal(got, records), what)
			case int64(at) >= ends[13]:
				assert.Equal(t, s.damage, Cut, what) // fewer zeros than there must be
				assert.Assert(t, slices.Equal(got, records), what)
			default:
				n := want(ends, int64(at))
				assert.Assert(t, slices.Equal(got, records[:n]), "%s: %q", what, got)
				if int64(at) >= ends[12] {
					assert.Equal(t, s.damage, Torn, what)
					assert.Equal(t, s.highest, s.records)
				} else {
					assert.Equal(t, s.damage, Middle, what)
					assert.Equal(t, s.highest, uint64(len(records)), what)
					lost := 2
					if n == 0 {
						lost = 3
					}
					assert.Equal(t, s.intact, uint64(len(records)-n-lost), what)
				}
				assert.Equal(t, s.dropped, int64(len(bytes.TrimRight(flipped, "\x00")))-s.end, what)
			}
		}
	}
}

// A power cut during a write leaves any choice of the sectors written.
func TestTornWriteIsAllOrNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	put(t, j, "first")
	before, err := os.ReadFile(path)
	assert.NilError(t, err)
	var long []string
	for range 60 {
		b := make([]byte, 100)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		long = append(long, string(b))
	}
	put(t, j, long...)
	assert.NilError(t, j.Close())
	after, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, len(before), len(after), "grown before the write")
	const sector = 512
	torn, writes := 0, 2000
	if testing.Short() {
		writes = 500
	}
	for range writes {
		data := slices.Clone(before)
		for at := 0; at < len(data); at += sector {
			if rand.IntN(2) == 0 {
				copy(data[at:at+sector], after[at:])
			}
		}
		s := scanFile(data)
		got := s.strings(t)
		if !bytes.Equal(data, after) {
			assert.DeepEqual(t, got, []string{"first"})
			assert.Assert(t, s.damage == Torn || bytes.Equal(data, before))
			torn++
		}
	}
	assert.Assert(t, torn > writes/2)
}

func TestStaleFramesAreNotTakenForRecords(t *testing.T) {
	data, records, ends := image(t)
	other, _, otherEnds := image(t)
	assert.Equal(t, len(data), len(other))
	// The same records at the same place, of another file.
	mixed := slices.Clone(data)
	copy(mixed[ends[6]:], other[otherEnds[6]:])
	s := scanFile(mixed)
	assert.DeepEqual(t, s.strings(t), records[:13])
	assert.Equal(t, s.intact, uint64(0))
	// A frame of this file, elsewhere.
	mixed = slices.Clone(data)
	copy(mixed[ends[6]:ends[7]], data[ends[5]:ends[6]])
	assert.DeepEqual(t, scanFile(mixed).strings(t), records[:13])
}

func TestDamagedFilesAreKeptAndReplaced(t *testing.T) {
	data, records, ends := image(t)
	for name, test := range map[string]struct {
		damage func([]byte) []byte
		kind   Damage
		left   int
		kept   bool
		text   string
	}{
		"header":     {func(b []byte) []byte { b[20] ^= 1; return b }, HeaderCopy, 27, false, "damaged header was replaced"},
		"both":       {func(b []byte) []byte { b[20] ^= 1; b[headerCopy+20] ^= 1; return b }, Unreadable, 0, true, "no header"},
		"empty":      {func(b []byte) []byte { return b[:0] }, Unreadable, 0, true, "no header"},
		"last frame": {func(b []byte) []byte { b[ends[13]-1] ^= 1; return b }, Torn, 25, true, "incomplete write"},
		"cut":        {func(b []byte) []byte { return b[:ends[5]] }, Cut, 11, true, "end of the file is missing"},
		"middle":     {func(b []byte) []byte { b[ends[5]+3] ^= 1; return b }, Middle, 11, true, "at least 16 behind it"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			damaged := test.damage(slices.Clone(data))
			assert.NilError(t, os.WriteFile(path, damaged, 0o600))
			j, rec, got := read(t, path)
			assert.Equal(t, rec.Damage, test.kind)
			assert.Assert(t, slices.Equal(got, records[:test.left]))
			assert.Equal(t, rec.Lossy(), test.kind != Torn && test.kind != HeaderCopy)
			assert.Assert(t, bytes.Contains([]byte(rec.String()), []byte(test.text)), "%s", rec)
			assert.Equal(t, rec.KeptAs != "", test.kept)
			if test.kept {
				assertFile(t, rec.KeptAs, damaged)
			}
			put(t, j, "after")
			assert.NilError(t, j.Close())
			rec, got = contents(t, path)
			assert.Equal(t, rec.Damage, Intact)
			assert.Assert(t, slices.Equal(got, append(slices.Clone(records[:test.left]), "after")))
		})
	}
}

// A crash between the second name of the damaged file and its replacement.
func TestKeepingAsideTwiceGivesOneFile(t *testing.T) {
	data, _, ends := image(t)
	path := filepath.Join(t.TempDir(), "log")
	assert.NilError(t, os.WriteFile(path, data[:ends[3]], 0o600))
	f, err := os.Open(path)
	assert.NilError(t, err)
	defer f.Close()
	first, err := keepAside(path, f)
	assert.NilError(t, err)
	rec, _ := contents(t, path)
	assert.Equal(t, rec.KeptAs, first)

	assert.NilError(t, os.WriteFile(path, data[:ends[2]], 0o600))
	info, err := f.Stat()
	assert.NilError(t, err)
	assert.NilError(t, os.Chtimes(path, info.ModTime(), info.ModTime()))
	rec, _ = contents(t, path)
	assert.Equal(t, rec.KeptAs, first+"-2", "another file of the same second")
}

func FuzzScan(f *testing.F) {
	data, _, ends := image(f)
	f.Add(data)
	f.Add(data[:ends[4]])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		s := scanFile(data)
		assert.Assert(t, s.end <= int64(len(data)) && s.intact <= s.highest)
		if s.header.version == version && s.damage != Unreadable {
			assert.Equal(t, len(s.strings(t)), int(s.records))
		}
		// What is intact has no bytes that nobody has looked at, and only what was read.
		if s.damage == Intact && s.header.version == version {
			assert.Equal(t, s.dropped, int64(0))
			assert.Equal(t, s.highest, s.records)
		}
	})
}
