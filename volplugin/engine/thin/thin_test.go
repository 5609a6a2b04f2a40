package thin

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

const testUUID = "7f0a1a5e-56b5-4d9c-9d6c-0a6a3a1f9b11"

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	for want, s := range map[string]Settings{
		"both are needed":   {Data: "/dev/sdb"},
		"data and metadata": {Data: "/dev/sdb", Metadata: "/dev/sdb"},
		"block size 100000": {BlockSize: 100000},
		"block size 32768":  {BlockSize: 32 << 10},
		"at most 1 GiB":     {BlockSize: 2 << 30},
	} {
		_, err := New(s)
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
	}
	e, err := New(Settings{})
	assert.NilError(t, err)
	assert.Equal(t, e.settings.BlockSize, uint64(DefaultBlockSize))
	assert.Equal(t, e.settings.DefaultSize, uint64(DefaultSize))
}

func TestSettingsAreReadFromText(t *testing.T) {
	for text, want := range map[string]Settings{
		"":                                      {},
		" data=/dev/sdb  metadata=/dev/vg/meta": {Data: "/dev/sdb", Metadata: "/dev/vg/meta"},
		"size=2T sparse=true volume-size=20GiB block-size=256K": {DataSize: 2 << 40, Sparse: true, DefaultSize: 20 << 30, BlockSize: 256 << 10},
	} {
		got, err := ParseSettings(text)
		assert.NilError(t, err, text)
		assert.Equal(t, got, want)
	}
	for text, want := range map[string]string{
		"data=/dev/sdb":                       "both are needed",
		"data=/dev/sdb metadata=/dev/sdb":     "cannot hold data and metadata",
		"data=sdb metadata=/dev/sdc":          `data="sdb": want a block device`,
		"data=/dev/../x metadata=/dev/sdc":    "want a block device",
		"data=/dev/a data=/dev/b":             "data is given twice",
		"size=big":                            `size="big": want a size, as 20G`,
		"sparse=perhaps":                      `sparse="perhaps": want true or false`,
		"block-size=100K":                     "want a multiple of 64 KiB",
		"/dev/sdb":                            `"/dev/sdb": want data=, metadata=`,
		"data=/dev/a metadata=/dev/b size=1G": "size and sparse are of a pool on files",
	} {
		_, err := ParseSettings(text)
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), text)
	}
}

func somePointer() pointer {
	return pointer{
		Schema: schema, Kind: pointerKind, Pool: testUUID, Volume: testUUID, Device: 7, FS: filesystem.XFS, Size: 1 << 30,
		Rollback: &rollback{Snapshot: "s", Keep: "k", Pending: true, Device: 5, Size: 1 << 30},
	}
}

func TestPointersAreReadAsTheyAreWritten(t *testing.T) {
	want := somePointer()
	data, err := encode(want)
	assert.NilError(t, err)
	got, err := decodePointer(data)
	assert.NilError(t, err)
	assert.DeepEqual(t, got, want)
}

func TestPointersThatLeadAstrayAreRefused(t *testing.T) {
	for name, change := range map[string]func(*pointer){
		"a newer one":                 func(p *pointer) { p.Schema = schema + 1 },
		"no schema":                   func(p *pointer) { p.Schema = 0 },
		"no pool":                     func(p *pointer) { p.Pool = "../x" },
		"a number too large":          func(p *pointer) { p.Device = maxDevice + 1 },
		"no size":                     func(p *pointer) { p.Size = 0 },
		"an odd size":                 func(p *pointer) { p.Size = 1<<30 + 1 },
		"an unknown file system":      func(p *pointer) { p.FS = "ntfs" },
		"a rollback to itself":        func(p *pointer) { p.Rollback.Device = p.Device },
		"a rollback out of the place": func(p *pointer) { p.Rollback.Keep = "../x" },
	} {
		ptr := somePointer()
		change(&ptr)
		data, err := encode(ptr)
		assert.NilError(t, err)
		_, err = decodePointer(data)
		assert.Assert(t, err != nil, name)
		assert.Assert(t, !errors.Is(err, errForeign), name)
	}
	for _, text := range []string{"", "{}", `{"schema":1}`, "null", "[]", `{"uuid":"x"}`} {
		_, err := decodePointer([]byte(text))
		assert.ErrorIs(t, err, errForeign)
	}
}

func TestClaimNames(t *testing.T) {
	for file, want := range map[string]struct {
		id    uint32
		phase string
	}{
		"1": {1, ""}, "77.making": {77, making}, "16777215.deleting": {16777215, deleting},
	} {
		id, phase, ok := parseClaimName(file)
		assert.Assert(t, ok, file)
		assert.Equal(t, id, want.id)
		assert.Equal(t, phase, want.phase)
	}
	for _, file := range []string{"", "x", "01", "-1", "+1", "16777216", "1.making.making", "1.json", ".making"} {
		_, _, ok := parseClaimName(file)
		assert.Assert(t, !ok, file)
	}
}

func TestNumbersGoRound(t *testing.T) {
	o := &opened{}
	for _, at := range []uint64{0, 1, maxDevice - 1, maxDevice, maxDevice + 1, 5<<counterBits | 9<<24, 5<<counterBits | 1<<counterBits - 1} {
		status := devmapper.PoolStatus{Transaction: at}
		for _, ahead := range []uint32{1, 2, 1000} {
			count := uint32(at) + ahead
			assert.Equal(t, o.counted(status, count&maxDevice), count, "%d + %d", at, ahead)
		}
	}
}

func TestSizes(t *testing.T) {
	size, err := checkSize(300<<20+1, filesystem.XFS)
	assert.NilError(t, err)
	assert.Equal(t, size, uint64(301<<20))
	for _, bad := range []uint64{1, 299 << 20, maxSize + 1, 1<<64 - 1} {
		_, err := checkSize(bad, filesystem.XFS)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%d: %v", bad, err)
	}
	assert.Equal(t, metadataSize(1<<30, 128<<10), uint64(minMetadata))
	assert.Equal(t, metadataSize(1<<40, 128<<10), uint64(1<<30))
	assert.Equal(t, metadataSize(1<<50, 64<<10), uint64(maxMetadata))
}

func TestProblemsInWords(t *testing.T) {
	well := devmapper.PoolStatus{Mode: devmapper.PoolWritable, MetadataUsed: 10, MetadataTotal: 1000, DataUsed: 10, DataTotal: 1000}
	assert.Equal(t, problem(well), "")
	for want, change := range map[string]func(*devmapper.PoolStatus){
		"has failed":              func(s *devmapper.PoolStatus) { s.Mode = devmapper.PoolFailed },
		"metadata is full":        func(s *devmapper.PoolStatus) { s.Mode, s.MetadataUsed = devmapper.PoolReadOnly, 1000 },
		"clear-needs-check-flag":  func(s *devmapper.PoolStatus) { s.NeedsCheck = true },
		"can only be read":        func(s *devmapper.PoolStatus) { s.Mode = devmapper.PoolReadOnly },
		"is full, and writes":     func(s *devmapper.PoolStatus) { s.Mode = devmapper.PoolNoData },
		"pool is nearly full":     func(s *devmapper.PoolStatus) { s.DataUsed = 960 },
		"metadata is nearly full": func(s *devmapper.PoolStatus) { s.MetadataUsed = 960 },
	} {
		status := well
		change(&status)
		assert.Assert(t, strings.Contains(problem(status), want), "%q: want %q", problem(status), want)
	}
}

func TestSuperblocks(t *testing.T) {
	head := make([]byte, superSize)
	_, err := parseSuper(head)
	assert.ErrorIs(t, err, errEmpty)
	binary.LittleEndian.PutUint64(head[transactionPlace:], 7<<counterBits|3)
	_, err = parseSuper(head)
	assert.ErrorIs(t, err, errNoSuper)
	binary.LittleEndian.PutUint64(head[superMagicPlace:], superMagic)
	transaction, err := parseSuper(head)
	assert.NilError(t, err)
	assert.Equal(t, transaction, uint64(7<<counterBits|3))
	_, err = parseSuper(head[:100])
	assert.ErrorIs(t, err, errNoSuper)
}

func FuzzDecode(f *testing.F) {
	data, err := encode(somePointer())
	assert.NilError(f, err)
	f.Add(data, "1.making")
	data, err = encode(claim{Schema: schema, Pool: testUUID, Volume: testUUID, Name: "web", Count: 1})
	assert.NilError(f, err)
	f.Add(data, "7")
	data, err = encode(poolFile{Schema: schema, UUID: testUUID, Mark: 1, Ready: true, BlockSize: 128 << 10})
	assert.NilError(f, err)
	f.Add(data, "x")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		if ptr, err := decodePointer(data); err == nil {
			again, err := encode(ptr)
			assert.NilError(t, err)
			_, err = decodePointer(again)
			assert.NilError(t, err)
		}
		if c, err := decodeClaim(data); err == nil {
			assert.NilError(t, checkEntry(c.Volume))
		}
		if f, err := decodePoolFile(data); err == nil {
			_, err := uuid.Parse(f.UUID)
			assert.NilError(t, err)
		}
		_, _ = parseSuper(data)
		if id, phase, ok := parseClaimName(name); ok {
			assert.Equal(t, claimName(id)+phase, name)
		}
	})
}
