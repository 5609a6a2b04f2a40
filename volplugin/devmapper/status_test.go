package devmapper

import (
	"testing"

	"gotest.tools/v3/assert"
)

// The lines are what kernels from 3.10 to 6.x say.
func TestPoolStates(t *testing.T) {
	for line, want := range map[string]PoolStatus{
		"0 13/4096 0/2048 - rw discard_passdown queue_if_no_space - 1024 ": {
			Mode: PoolWritable, MetadataUsed: 13, MetadataTotal: 4096, DataTotal: 2048, Queues: true},
		"8589934593 20/4096 2048/2048 - out_of_data_space discard_passdown error_if_no_space - 1024": {
			Mode: PoolNoData, Transaction: 1<<33 + 1, MetadataUsed: 20, MetadataTotal: 4096, DataUsed: 2048, DataTotal: 2048},
		"1 4096/4096 7/2048 - ro no_discard_passdown error_if_no_space needs_check 1024": {
			Mode: PoolReadOnly, Transaction: 1, MetadataUsed: 4096, MetadataTotal: 4096, DataUsed: 7, DataTotal: 2048, NeedsCheck: true},
		"1 10/4096 7/2048 77 rw": {Mode: PoolWritable, Transaction: 1, MetadataUsed: 10, MetadataTotal: 4096, DataUsed: 7, DataTotal: 2048},
		"Fail":                   {Mode: PoolFailed},
		"Error":                  {Mode: PoolFailed},
	} {
		got, err := ParsePool(line)
		assert.NilError(t, err)
		assert.DeepEqual(t, got, want)
	}
	for _, line := range []string{"", "x", "1 2 3 4", "1 2/3 4/x -", "-1 2/3 4/5 -", "1 2/3 4/5"} {
		_, err := ParsePool(line)
		assert.ErrorContains(t, err, "state of a thin pool")
	}
}

func TestThinStates(t *testing.T) {
	mapped, failed, err := ParseThin("2048 20479")
	assert.NilError(t, err)
	assert.Assert(t, !failed)
	assert.Equal(t, mapped, uint64(2048))

	mapped, _, err = ParseThin("0 -")
	assert.NilError(t, err)
	assert.Equal(t, mapped, uint64(0))

	_, failed, err = ParseThin("Fail")
	assert.NilError(t, err)
	assert.Assert(t, failed)

	for _, line := range []string{"", "x 1", "1", "1 2 3"} {
		_, _, err := ParseThin(line)
		assert.ErrorContains(t, err, "state of a thin device")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0 13/4096 0/2048 - rw discard_passdown queue_if_no_space - 1024")
	f.Add("2048 20479")
	f.Fuzz(func(t *testing.T, line string) {
		if s, err := ParsePool(line); err == nil && s.Mode == "" {
			t.Errorf("%q has no mode", line)
		}
		_, _, _ = ParseThin(line)
	})
}
