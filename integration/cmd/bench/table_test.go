package main

import (
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

func TestMedianOfOddAndEvenNumbers(t *testing.T) {
	assert.Equal(t, median([]time.Duration{7}), time.Duration(7))
	assert.Equal(t, median([]time.Duration{9, 1, 5}), time.Duration(5))
	assert.Equal(t, median([]time.Duration{8, 2, 4, 100}), time.Duration(6))
}

func TestMedianLeavesItsArgumentAlone(t *testing.T) {
	times := []time.Duration{3, 1, 2}
	median(times)
	assert.DeepEqual(t, times, []time.Duration{3, 1, 2})
}

func TestTableShowsHowManyTimesDockersTimeBerthTakes(t *testing.T) {
	got := table([]*result{{work: "network rm", times: [2][]time.Duration{
		{30 * time.Millisecond, 31 * time.Millisecond, 90 * time.Millisecond},
		{20 * time.Millisecond, 20 * time.Millisecond, 20 * time.Millisecond},
	}}})
	assert.Equal(t, got, "| Work | Berth, ms | Docker, ms | Ratio |\n|---|---:|---:|---:|\n| `network rm` | 31.0 | 20.0 | 1.55 |\n")
}
