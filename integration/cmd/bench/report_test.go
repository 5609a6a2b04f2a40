package main

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
)

func TestMiddleOfOddAndEvenNumbers(t *testing.T) {
	assert.Equal(t, middle([]float64{7}), 7.0)
	assert.Equal(t, middle([]float64{9, 1, 5}), 5.0)
	assert.Equal(t, middle([]float64{8, 2, 4, 100}), 6.0)
	assert.Assert(t, math.IsNaN(middle(nil)))
}

func TestMiddleLeavesItsArgumentAlone(t *testing.T) {
	values := []float64{3, 1, 2}
	middle(values)
	assert.DeepEqual(t, values, []float64{3, 1, 2})
}

func TestRatioOfWhatCannotBeCompared(t *testing.T) {
	assert.Equal(t, ratio(30, 20), 1.5)
	for _, c := range [][2]float64{{1, 0}, {0, 1}, {-1, 2}, {2, -1}, {math.NaN(), 1}, {1, math.NaN()}} {
		assert.Assert(t, math.IsNaN(ratio(c[0], c[1])), "%v", c)
	}
}

func TestPairedSubtractsRoundByRound(t *testing.T) {
	// The medians differ by 10, the rounds by 1.
	assert.DeepEqual(t, paired([]float64{101, 201, 111}, []float64{100, 200, 110}), []float64{1, 1, 1})
	assert.DeepEqual(t, paired([]float64{5, 6}, []float64{1}), []float64{4})
	assert.Equal(t, len(paired(nil, []float64{1})), 0)
}

func TestLessSubtractsFromEach(t *testing.T) {
	values := []float64{5, 7}
	assert.DeepEqual(t, less(values, 2), []float64{3, 5})
	assert.DeepEqual(t, values, []float64{5, 7})
}

func TestUnitsAreReadable(t *testing.T) {
	for _, c := range []struct {
		unit  unit
		value float64
		want  string
	}{
		{inSeconds, 0.0000481, "48.1 µs"},
		{inSeconds, 0.2345, "234.5 ms"},
		{inSeconds, -0.0023, "-2.3 ms"},
		{inSeconds, 9.9994, "9999.4 ms"},
		{inSeconds, 72.04, "72.0 s"},
		{inSeconds, 0, "0.0 µs"},
		{inBytes, 5.4e6, "5.4 MB"},
		{inBytes, -40000, "0.0 MB"},
		{inBytes, -1.26e6, "-1.3 MB"},
		{inPieces, 2001, "2001"},
		{inBits, 2.3456e10, "23.46 Gbit/s"},
		{inRate, 9834.7, "9835/s"},
		{asRatio, 0.988, "0.99"},
		{inSeconds, math.NaN(), "–"},
		{asRatio, math.NaN(), "–"},
	} {
		assert.Equal(t, c.unit.format(c.value), c.want)
	}
}

func TestTableShowsHowManyTimesTheSecondTheFirstIs(t *testing.T) {
	g := &grid{Columns: []string{"Berth", "Docker"}}
	for _, v := range []float64{0.030, 0.031, 0.090} {
		g.add("`network rm`", inSeconds, 0, v)
	}
	for _, v := range []float64{0.020, 0.020, 0.020} {
		g.add("`network rm`", inSeconds, 1, v)
	}
	g.add("start, 20000 ports", inSeconds, 0, 2)
	assert.Equal(t, g.markdown(), "| Work | Berth | Docker | Ratio |\n|---|---:|---:|---:|\n"+
		"| `network rm` | 31.0 ms | 20.0 ms | 1.55 |\n"+
		"| start, 20000 ports | 2000.0 ms | – | – |\n")
}

func TestTableOfThreeComparesTheFirstTwo(t *testing.T) {
	g := &grid{Columns: []string{"Berth", "Docker", "Empty"}}
	for column, v := range []float64{1, 2, 4} {
		g.add("x", inPieces, column, v)
	}
	assert.Equal(t, g.markdown(), "| Work | Berth | Docker | Ratio | Empty |\n|---|---:|---:|---:|---:|\n| x | 1 | 2 | 0.50 | 4 |\n")
}

func TestTableOfOneHasNoRatio(t *testing.T) {
	g := &grid{Columns: []string{"Berth"}}
	g.add("x", inPieces, 0, 4)
	assert.Equal(t, g.markdown(), "| Work | Berth |\n|---|---:|\n| x | 4 |\n")
}

func TestRunsAreComparedWithFloorAndDocker(t *testing.T) {
	g := runGrid{&grid{Columns: []string{"Berth", "Docker", "Empty, Docker's", "Empty", "None"}}}
	for _, base := range []float64{0.100, 0.300, 0.110} {
		for column, more := range []float64{0.050, 0.060, 0.041, 0.040, 0} {
			g.add(netRun, inSeconds, column, base+more)
		}
	}
	want := "| Network | Time | More than the empty driver with its own addresses | Of Docker's bridge |\n|---|---:|---:|---:|\n" +
		"| Berth | 160.0 ms | 10.0 ms | 0.94 |\n" +
		"| Docker | 170.0 ms | 20.0 ms | 1.00 |\n" +
		"| Empty, Docker's | 151.0 ms | 1.0 ms | 0.89 |\n" +
		"| Empty | 150.0 ms | 0.0 µs | 0.88 |\n" +
		"| None | 110.0 ms | -40.0 ms | 0.65 |\n"
	assert.Equal(t, g.markdown(), want)
}

func TestReportHasAHeadingAndEveryTable(t *testing.T) {
	first, second := &grid{Columns: []string{"A", "B"}}, &grid{Title: "Second:", Columns: []string{"A"}}
	first.add("x", inPieces, 0, 4)
	second.add("y", inPieces, 0, 5)
	r := &report{Engine: "28.5.2", Part: "ports", Notes: []string{"A note."},
		Tables: []*grid{first, {Title: "Nothing was measured:", Columns: []string{"A"}}, second}}
	r.texts = map[*grid]string{second: "| own |\n"}
	assert.Equal(t, r.markdown(), "### Engine 28.5.2: ports\n\n| Work | A | B | Ratio |\n|---|---:|---:|---:|\n| x | 4 | – | – |\n\nSecond:\n\n| own |\n\n- A note.\n\n")
}

func TestAllNumbersAreAppendedAsJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "raw.json")
	g := &grid{Columns: []string{"Berth", "Docker"}}
	g.add("x", inSeconds, 0, 0.25)
	for range 2 {
		assert.NilError(t, (&report{Part: "ports", Tables: []*grid{g}}).appendTo(file))
	}
	f, err := os.Open(file)
	assert.NilError(t, err)
	defer f.Close()
	d := json.NewDecoder(f)
	for range 2 {
		var r report
		assert.NilError(t, d.Decode(&r))
		assert.Equal(t, r.Part, "ports")
		assert.DeepEqual(t, r.Tables[0].Lines[0].Values, [][]float64{{0.25}, nil})
	}
}
