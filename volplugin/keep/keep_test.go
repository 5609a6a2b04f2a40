package keep_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/volplugin/keep"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]keep.Policy{
		"24h:7d:4w:12m":        {Hourly: 24, Daily: 7, Weekly: 4, Monthly: 12},
		"10":                   {Last: 10},
		"n=10":                 {Last: 10},
		"2y:1h":                {Hourly: 1, Yearly: 2},
		"3:1h:1d:1w:1m:36525y": {Last: 3, Hourly: 1, Daily: 1, Weekly: 1, Monthly: 1, Yearly: 36525},
	} {
		got, err := keep.Parse(text)
		assert.NilError(t, err)
		assert.Equal(t, got, want)
		again, err := keep.Parse(got.String())
		assert.NilError(t, err)
		assert.Equal(t, again, want)
	}
	assert.Equal(t, keep.Policy{Last: 10, Hourly: 24, Daily: 7, Weekly: 4, Monthly: 12, Yearly: 2}.String(), "n=10:24h:7d:4w:12m:2y")
	assert.Equal(t, keep.Policy{}.String(), "")
	assert.Assert(t, keep.Policy{}.IsZero() && !keep.Policy{Yearly: 1}.IsZero())
	for text, want := range map[string]string{
		"": "want a number", "0": "from 1 to 36525", "0h": "from 1", "36526": "from 1", "h": "want", "1H": "want", "1s": "want", "-1": "want", "+1h": "want",
		"1h:": "want", ":1h": "want", "1h::1d": "want", "1h,1d": "want", "1h 1d": "want", "1.5h": "want", "n=": "want", "n=1h": "want", "h=1": "want",
		"1:n=2": "there is such a part already", "1h:7d:2h": `"2h": there is such a part already`, "24h7d": "want",
	} {
		_, err := keep.Parse(text)
		assert.ErrorContains(t, err, want, "%q", text)
	}
}

// select gives what is kept of times that are written as in the table.
func selected(t *testing.T, policy, now string, times ...string) (kept, dropped []string) {
	t.Helper()
	parse := func(s string) time.Time {
		at, err := time.Parse("2006-01-02 15:04 -0700", s)
		if err != nil {
			at, err = time.Parse("2006-01-02 15:04", s)
		}
		assert.NilError(t, err)
		return at
	}
	p, err := keep.Parse(policy)
	assert.NilError(t, err)
	var at []time.Time
	for _, s := range times {
		at = append(at, parse(s))
	}
	k, d := p.Select(at, parse(now))
	assert.Equal(t, len(k)+len(d), len(times))
	assert.Assert(t, slices.IsSorted(k) && slices.IsSorted(d))
	for _, i := range k {
		kept = append(kept, times[i])
	}
	for _, i := range d {
		dropped = append(dropped, times[i])
	}
	return kept, dropped
}

func TestSelect(t *testing.T) {
	const now = "2026-11-28 12:00"
	for _, tc := range []struct {
		name, policy string
		times, kept  []string
	}{
		{"the last ones", "2", []string{"2026-11-01 00:00", "2026-11-03 00:00", "2026-11-02 00:00"}, []string{"2026-11-03 00:00", "2026-11-02 00:00"}},
		{"the newest of each hour", "2h",
			[]string{"2026-11-28 09:00", "2026-11-28 10:00", "2026-11-28 10:59", "2026-11-28 11:00", "2026-11-28 11:30"},
			[]string{"2026-11-28 10:59", "2026-11-28 11:30"}},
		{"hours of different days are different", "2h", []string{"2026-11-27 11:00", "2026-11-28 11:00"}, []string{"2026-11-27 11:00", "2026-11-28 11:00"}},
		{"periods without any count for nothing", "3d", []string{"2024-02-28 23:59", "2024-02-29 00:00", "2025-02-28 10:00", "2026-11-28 10:00"}, []string{"2024-02-29 00:00", "2025-02-28 10:00", "2026-11-28 10:00"}},
		{"weeks begin on Monday", "2w", []string{"2026-11-15 23:59", "2026-11-16 00:00", "2026-11-22 23:59", "2026-11-23 00:00"}, []string{"2026-11-22 23:59", "2026-11-23 00:00"}},
		{"a week may lie in two years", "2w", []string{"2025-12-28 12:00", "2025-12-29 12:00", "2026-01-01 12:00"}, []string{"2025-12-28 12:00", "2026-01-01 12:00"}},
		{"months of different years are different", "2m", []string{"2025-11-30 00:00", "2026-11-01 00:00"}, []string{"2025-11-30 00:00", "2026-11-01 00:00"}},
		{"years", "2y", []string{"2024-12-31 23:59", "2025-01-01 00:00", "2025-12-31 23:59", "2026-01-01 00:00"}, []string{"2025-12-31 23:59", "2026-01-01 00:00"}},
		{"rules are added", "1:2d:1m",
			[]string{"2026-10-31 12:00", "2026-11-26 12:00", "2026-11-27 11:00", "2026-11-27 12:00", "2026-11-28 11:00"},
			[]string{"2026-11-27 12:00", "2026-11-28 11:00"}},
		{"the newest stays whatever the rule", "1y", []string{"2026-11-28 11:00", "2026-11-28 11:59"}, []string{"2026-11-28 11:59"}},
		{"of equal times the later in the list", "1", []string{"2026-11-28 11:00", "2026-11-28 11:00"}, []string{"2026-11-28 11:00"}},
		{"what is not due yet is kept and takes no place", "1", []string{"2026-11-28 11:00", "2026-11-28 12:01", "2026-11-28 11:59", "2027-01-01 00:00"}, []string{"2026-11-28 12:01", "2026-11-28 11:59", "2027-01-01 00:00"}},
		{"a day is one of UTC", "2d", []string{"2026-11-27 23:30 -0500", "2026-11-28 01:00 +0000", "2026-11-27 23:00 +0000"}, []string{"2026-11-27 23:30 -0500", "2026-11-27 23:00 +0000"}},
		{"nothing", "7d", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kept, _ := selected(t, tc.policy, now, tc.times...)
			assert.DeepEqual(t, kept, tc.kept)
		})
	}
	p := keep.Policy{Last: 1}
	at := time.Date(2026, 11, 28, 11, 0, 0, 0, time.UTC)
	k, d := p.Select([]time.Time{at, at}, at)
	assert.DeepEqual(t, k, []int{1})
	assert.DeepEqual(t, d, []int{0})
	k, d = keep.Policy{}.Select([]time.Time{at, at.Add(-time.Hour)}, at)
	assert.DeepEqual(t, k, []int{0, 1}) // the zero policy drops nothing
	assert.Assert(t, d == nil)
}

// A year of hourly snapshots, dropped each hour, as the runner does.
func TestAYear(t *testing.T) {
	p, err := keep.Parse("24h:7d:4w:12m")
	assert.NilError(t, err)
	var times []time.Time
	at := time.Date(2025, 11, 28, 12, 10, 0, 0, time.UTC)
	for range 366 * 24 {
		times = append(times, at)
		kept, _ := p.Select(times, at)
		times = pick(times, kept)
		at = at.Add(time.Hour)
	}
	var text []string
	for _, at := range times {
		text = append(text, at.Format("01-02 15"))
	}
	assert.Equal(t, strings.Join(text[:15], ", "),
		"12-31 23, 01-31 23, 02-28 23, 03-31 23, 04-30 23, 05-31 23, 06-30 23, 07-31 23, 08-31 23, 09-30 23, 10-31 23, 11-08 23, 11-15 23, 11-22 23, 11-23 23")
	assert.Equal(t, len(times), 11+3+5+24, fmt.Sprint(text))
}

func pick(times []time.Time, indexes []int) []time.Time {
	out := make([]time.Time, 0, len(indexes))
	for _, i := range indexes {
		out = append(out, times[i])
	}
	return out
}

func anyPolicy() *rapid.Generator[keep.Policy] {
	return rapid.Custom(func(t *rapid.T) keep.Policy {
		n := func(label string) int { return rapid.IntRange(0, 5).Draw(t, label) }
		return keep.Policy{Last: n("last"), Hourly: n("h"), Daily: n("d"), Weekly: n("w"), Monthly: n("m"), Yearly: n("y")}
	})
}

var origin = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// anyTimes are near the bounds of periods more often than by chance, and some are
// after now.
func anyTimes() *rapid.Generator[[]time.Time] {
	return rapid.Custom(func(t *rapid.T) []time.Time {
		unit := rapid.SampledFrom([]time.Duration{time.Minute, 20 * time.Minute, 5 * time.Hour, 12 * time.Hour, 5 * 24 * time.Hour}).Draw(t, "unit")
		var times []time.Time
		for _, n := range rapid.SliceOfN(rapid.IntRange(-200, 5), 0, 60).Draw(t, "times") {
			times = append(times, origin.Add(time.Duration(n)*unit))
		}
		return times
	})
}

func TestSelectKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, times := anyPolicy().Draw(t, "policy"), anyTimes().Draw(t, "times")
		kept, dropped := p.Select(times, origin)

		all := slices.Concat(kept, dropped)
		slices.Sort(all)
		for i, index := range all {
			assert.Equal(t, i, index, "each snapshot is kept or dropped")
		}
		var newest time.Time
		for _, at := range times {
			if !at.After(origin) && at.After(newest) {
				newest = at
			}
		}
		for _, i := range dropped {
			assert.Assert(t, !times[i].After(origin), "dropped what is not due")
		}
		assert.Assert(t, newest.IsZero() || slices.ContainsFunc(kept, func(i int) bool { return times[i].Equal(newest) }), "dropped the newest")

		_, again := p.Select(pick(times, kept), origin)
		assert.Equal(t, len(again), 0, "what was kept is kept again")

		// More rules and higher numbers keep more.
		more := p
		for _, n := range []*int{&more.Last, &more.Hourly, &more.Daily, &more.Weekly, &more.Monthly, &more.Yearly} {
			*n += rapid.IntRange(0, 3).Draw(t, "more")
		}
		if !p.IsZero() {
			keptMore, _ := more.Select(times, origin)
			for _, i := range kept {
				assert.Assert(t, slices.Contains(keptMore, i), "a larger policy drops what a smaller one keeps")
			}
		}

		// No more than the numbers say, apart from what is not due and the newest.
		due := 0
		for _, i := range kept {
			if !times[i].After(origin) {
				due++
			}
		}
		if sum := p.Last + p.Hourly + p.Daily + p.Weekly + p.Monthly + p.Yearly; sum > 0 {
			assert.Assert(t, due <= sum, "%d kept", due)
		}
	})
}

// It does not matter whether a policy is applied after each snapshot or once.
func TestSelectOftenIsSelectOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, times := anyPolicy().Draw(t, "policy"), anyTimes().Draw(t, "times")
		slices.SortFunc(times, time.Time.Compare)
		if len(times) == 0 {
			return
		}
		var often []time.Time
		for _, at := range times {
			often = append(often, at)
			kept, _ := p.Select(often, at)
			often = pick(often, kept)
		}
		once, _ := p.Select(times, times[len(times)-1])
		assert.DeepEqual(t, often, pick(times, once))
	})
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"24h:7d:4w:12m", "10", "n=10", "1:1h:1d:1w:1m:1y", "", ":", "n=", "999999999999h"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := keep.Parse(text)
		if err != nil {
			assert.Assert(t, len(err.Error()) < 500)
			return
		}
		assert.Assert(t, !p.IsZero())
		again, err := keep.Parse(p.String())
		assert.NilError(t, err)
		assert.Equal(t, again, p)
	})
}
