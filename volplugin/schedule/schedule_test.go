package schedule_test

import (
	"fmt"
	"slices"
	"testing"
	"time"
	_ "time/tzdata" // for the zones in this test, on any machine

	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/volplugin/schedule"
)

func parse(t testing.TB, text string) schedule.Schedule {
	t.Helper()
	s, err := schedule.Parse(text)
	assert.NilError(t, err)
	return s
}

func at(t testing.TB, text string) time.Time {
	t.Helper()
	at, err := time.Parse("2006-01-02 15:04:05", text)
	assert.NilError(t, err)
	return at
}

func TestNext(t *testing.T) {
	for _, tc := range []struct{ schedule, after, want string }{
		{"@hourly", "2026-11-28 12:00:00", "2026-11-28 13:00:00"},
		{"@daily", "2026-11-28 23:59:59", "2026-11-29 00:00:00"},
		{"@midnight", "2026-11-28 23:59:59", "2026-11-29 00:00:00"},
		{"@weekly", "2026-11-28 12:00:00", "2026-11-29 00:00:00"},
		{"@monthly", "2026-11-28 12:00:00", "2026-12-01 00:00:00"},
		{"@yearly", "2026-11-28 12:00:00", "2027-01-01 00:00:00"},
		{"@every 6h", "2026-11-28 12:00:00", "2026-11-28 18:00:00"},
		{"@every 6h", "2026-11-28 11:59:59", "2026-11-28 12:00:00"},
		{"@every 1d", "2026-11-28 12:00:00", "2026-11-29 00:00:00"},
		{"@every 90m", "1969-12-31 23:00:00", "1970-01-01 00:00:00"},
		{"@every 90m", "1960-01-01 00:00:00", "1960-01-01 01:30:00"},
		{"30 3 * * *", "2026-11-28 12:00:00", "2026-11-29 03:30:00"},
		{"*/15 8-9 * * mon-fri", "2026-11-27 09:45:00", "2026-11-30 08:00:00"},
		{"0 0 29 2 *", "2026-11-28 12:00:00", "2028-02-29 00:00:00"},
	} {
		next := parse(t, tc.schedule).Next(at(t, tc.after))
		assert.Equal(t, next.Format("2006-01-02 15:04:05"), tc.want, tc.schedule)
		assert.Equal(t, next.Location(), time.UTC)
	}
	assert.Assert(t, schedule.Schedule{}.Next(time.Now()).IsZero())
	assert.Assert(t, schedule.Schedule{}.NextFor("x", time.Now()).IsZero())
	assert.Assert(t, schedule.Schedule{}.LastFor("x", time.Now()).IsZero())
	assert.Assert(t, schedule.Schedule{}.IsZero())
}

func TestWhatIsNoSchedule(t *testing.T) {
	for text, want := range map[string]string{
		"": "is empty", "  ": "is empty", "hourly": "want @hourly", "@hour": "want @hourly", "@reboot": "want @hourly", "@every": "want an interval", "@every 6 h": "want an interval",
		"@every 59s": "1m to 10 years", "@every 11000d": "1m to 10 years", "@every -6h": "want a duration", "* * * *": "exactly 5 fields", "0 * * * * *": "exactly 5 fields",
		"60 * * * *": "above maximum", "* 24 * * *": "above maximum", "0 0 31 4 *": "no such date", "*/0 * * * *": "step", "TZ=UTC 0 0 * * *": "times are UTC", "CRON_TZ=UTC": "times are UTC", "TZ=": "times are UTC",
	} {
		_, err := schedule.Parse(text)
		assert.ErrorContains(t, err, want, "%q", text)
	}
	assert.Equal(t, parse(t, " 0  0 * * * ").String(), "0 0 * * *")
}

// When clocks are set forward no hour is missing, when back none comes twice,
// whatever zone the caller's time is in.
func TestDaylightSavingChangesNothing(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	assert.NilError(t, err)
	for _, text := range []string{"@hourly", "30 2 * * *", "30 1 * * *", "@daily", "@every 1h", "*/30 * * * *"} {
		s := parse(t, text)
		for _, begin := range []string{"2026-03-28 00:00:00", "2026-10-24 00:00:00"} {
			utc := at(t, begin)
			local := utc.In(berlin)
			end := utc.Add(72 * time.Hour)
			n := 0
			for ; utc.Before(end); n++ {
				utc, local = s.NextFor("x", utc), s.NextFor("x", local.In(berlin))
				assert.Assert(t, utc.Equal(local), "%s: %s and %s", text, utc, local)
			}
			per := map[string]int{"@hourly": 72, "@every 1h": 72, "*/30 * * * *": 144, "30 2 * * *": 3, "30 1 * * *": 3, "@daily": 3}[text]
			assert.Assert(t, n == per || n == per+1, "%s ran %d times in three days", text, n)
		}
	}
}

var texts = []string{"@hourly", "@daily", "@weekly", "@monthly", "@every 1m", "@every 6h", "@every 7h1m", "* * * * *", "*/7 3,9 * * *", "0 12 1 1 *", "59 23 * * sun"}

func TestSpreadKeepsOrderAndBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.SampledFrom(texts).Draw(t, "schedule")
		s, err := schedule.Parse(text)
		assert.NilError(t, err)
		uuid := rapid.StringMatching(`[0-9a-f]{8}`).Draw(t, "uuid")
		after := time.Unix(rapid.Int64Range(0, 4_000_000_000).Draw(t, "after"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns"))

		next := s.NextFor(uuid, after)
		assert.Assert(t, next.After(after))
		assert.Equal(t, s.NextFor(uuid, next.Add(-1)), next, "the moment after which it is asked changes the moment")
		assert.Equal(t, s.LastFor(uuid, next), next)
		last := s.LastFor(uuid, after)
		assert.Assert(t, !last.After(after))
		assert.Equal(t, s.NextFor(uuid, last), next)

		following := s.NextFor(uuid, next)
		assert.Assert(t, following.After(next))
		if s.Next(next.Add(-1)).Equal(next) {
			return
		}
		// It is put off from a point in the schedule by no more than the bounds.
		if text[:2] != "@e" {
			base := s.Next(next.Add(-5*time.Minute - time.Second))
			for s.Next(base).Before(next) {
				base = s.Next(base)
			}
			assert.Assert(t, next.Sub(base) <= min(5*time.Minute, s.Next(base).Sub(base)/10), "put off by %s", next.Sub(base))
		}
	})
}

// A thousand volumes do not all start at once.
func TestSpreadIsEven(t *testing.T) {
	noon := at(t, "2026-11-28 12:29:59")
	for text, stretch := range map[string]time.Duration{"@daily": 5 * time.Minute, "@hourly": 5 * time.Minute, "@every 6h": 6 * time.Hour, "*/10 * * * *": time.Minute} {
		s := parse(t, text)
		var tenths [10]int
		for i := range 1000 {
			uuid := fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
			next := s.NextFor(uuid, noon)
			put := next.Sub(s.Next(noon))
			if text == "@every 6h" {
				put = next.Sub(noon)
			}
			assert.Assert(t, put >= 0 && put <= stretch, "%s: %s", text, put)
			tenths[min(int(10*put/stretch), 9)]++
		}
		assert.Assert(t, slices.Min(tenths[:]) > 50, "%s: %v", text, tenths)
	}
}

func TestParseInterval(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90m": 90 * time.Minute, "7d": 168 * time.Hour, "2w": 336 * time.Hour, "1w1d1h1m1s": 193*time.Hour + time.Minute + time.Second, "0": 0, "0d": 0, "1d12h": 36 * time.Hour, "1.5h": 90 * time.Minute, "36500d": 876000 * time.Hour,
	} {
		got, err := schedule.ParseInterval(text)
		assert.NilError(t, err)
		assert.Equal(t, got, want, text)
	}
	for _, text := range []string{"", "7", "d", "7 d", "1d1w", "-1d", "+1d", "1d-1h", "1d+1h", "1.5d", "36501d", "36500d1h", "36500d5214w", "999999999999999999999d", "9999999h", "1dd", "1w2w", "x"} {
		_, err := schedule.ParseInterval(text)
		assert.ErrorContains(t, err, "want a duration", "%q", text)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range append([]string{"", "TZ=", "@every", "@every 1.5d", "0 0 30 2 *", "? ? ? ? ?", "*/7-3 * * * *", "1-2-3 * * * *"}, texts...) {
		f.Add(text)
	}
	after := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := schedule.Parse(text)
		if err != nil {
			return
		}
		again, err := schedule.Parse(s.String())
		assert.NilError(t, err)
		next := s.NextFor("x", after)
		assert.Assert(t, next.After(after))
		assert.Assert(t, again.NextFor("x", after).Equal(next))
	})
}

func FuzzParseInterval(f *testing.F) {
	for _, text := range []string{"1w2d3h", "7d", "", "0", "1d-1h", "99999999999999999999w"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if d, err := schedule.ParseInterval(text); err == nil {
			assert.Assert(t, d >= 0 && d <= 100*365*24*time.Hour)
		}
	})
}
