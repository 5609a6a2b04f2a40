// Package schedule says when work that is done over and over is due, and does it.
// It knows no volumes but their UUIDs, and not what the work is: a Runner calls
// what it is given, and keeps when it ran last through a Store.
//
// All schedules are in UTC. The plugin's container has no time zone, hosts that
// share a root may have different ones, and in UTC no hour of the year is missing
// or comes twice.
package schedule

import (
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

const (
	// shortest is the least interval of "@every", as that of cron.
	shortest = time.Minute
	// longest keeps durations far from overflow.
	longest = 10 * 365 * 24 * time.Hour
	// spreadMost is the most by which a run is put off so that not all volumes have
	// theirs at once. The other bound is a tenth of the interval.
	spreadMost = 5 * time.Minute
	spreadPart = 10
)

// A Schedule is a sequence of points in time. The zero Schedule has
// none.
type Schedule struct {
	text  string
	cron  cron.Schedule // nil for "@every"
	every time.Duration
}

// Parse reads "@hourly", "@daily" (or "@midnight"), "@weekly", "@monthly",
// "@yearly" (or "@annually"), "@every 6h" with an interval as ParseInterval
// reads it from 1m to 10 years, or the five fields of a crontab: minute, hour,
// day of month, month, day of week.
func Parse(text string) (Schedule, error) {
	fields := strings.Fields(text)
	s := Schedule{text: strings.Join(fields, " ")}
	if len(fields) == 0 {
		return Schedule{}, errors.New("is empty: want " + wanted)
	}
	if strings.Contains(fields[0], "TZ=") {
		return Schedule{}, errors.New("time zones are not supported, times are UTC")
	}
	if fields[0] == "@every" {
		if len(fields) != 2 {
			return Schedule{}, errors.New("want an interval after @every, as @every 6h")
		}
		every, err := ParseInterval(fields[1])
		if err != nil {
			return Schedule{}, err
		}
		if every < shortest || every > longest {
			return Schedule{}, fmt.Errorf("interval %s: want 1m to 10 years", fields[1])
		}
		s.every = every.Truncate(time.Second)
		return s, nil
	}
	var err error
	s.cron, err = cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor).Parse(s.text)
	if err != nil {
		return Schedule{}, fmt.Errorf("%w: want %s", err, wanted)
	}
	// A year that is followed by every kind of date within the parser's search.
	if s.cron.Next(time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		return Schedule{}, errors.New("there is no such date")
	}
	return s, nil
}

const wanted = "@hourly, @daily, @weekly, @monthly, @every 6h or the five fields of a crontab, as 30 3 * * *"

// String is what was parsed, with single spaces.
func (s Schedule) String() string { return s.text }

// IsZero tells whether there is no schedule.
func (s Schedule) IsZero() bool { return s.text == "" }

// Next is the first point after the given one, in UTC, without the spread of
// NextFor; the zero time for the zero Schedule and when there is none in the next
// five years, as of a 29th of February around 2100. Intervals of "@every" are counted
// from 1970-01-01 00:00, so that runs are never put off by those before.
func (s Schedule) Next(after time.Time) time.Time {
	switch {
	case s.cron != nil:
		return s.cron.Next(after.UTC())
	case s.every != 0:
		return s.nextEvery(after, 0)
	}
	return time.Time{}
}

// NextFor is Next for one volume. Each has moments of its own, always the same, so
// that they do not all run at the full hour: "@every" begins anywhere in its
// interval, and all else is put off by at most a tenth of the time to the run that
// follows, and five minutes.
func (s Schedule) NextFor(uuid string, after time.Time) time.Time {
	share := fraction(uuid)
	switch {
	case s.every != 0:
		return s.nextEvery(after, time.Duration(share*float64(s.every)))
	case s.cron == nil:
		return time.Time{}
	}
	// A run from before after may be put off until later than that.
	at := s.cron.Next(after.UTC().Add(-spreadMost - time.Second))
	for !at.IsZero() {
		following := s.cron.Next(at)
		put := time.Duration(share * float64(spreadMost))
		if !following.IsZero() {
			put = time.Duration(share * float64(min(following.Sub(at)/spreadPart, spreadMost)))
		}
		if due := at.Add(put.Truncate(time.Second)); due.After(after) {
			return due
		}
		at = following
	}
	return time.Time{}
}

// LastFor is the last point of NextFor up to and including the given one, the zero
// time when there was none in a century.
func (s Schedule) LastFor(uuid string, notAfter time.Time) time.Time {
	if s.IsZero() {
		return time.Time{}
	}
	const most = 100 * 365 * 24 * time.Hour
	for back := time.Minute; back < most; back *= 2 {
		at := s.NextFor(uuid, notAfter.Add(-back))
		if at.IsZero() || at.After(notAfter) {
			continue
		}
		// Few: half of this stretch of time had none.
		for {
			next := s.NextFor(uuid, at)
			if next.IsZero() || next.After(notAfter) {
				return at
			}
			at = next
		}
	}
	return time.Time{}
}

// nextEvery is the first multiple of the interval, plus offset, after the given
// time. In seconds: a Duration is too short for times far from 1970.
func (s Schedule) nextEvery(after time.Time, offset time.Duration) time.Time {
	every, first := int64(s.every/time.Second), int64(offset/time.Second)
	since := after.Unix() - first
	n := since / every
	if since%every < 0 {
		n--
	}
	return time.Unix(first+(n+1)*every, 0).UTC()
}

// fraction is from 0 up to, not including, 1, the same always for one text.
func fraction(text string) float64 {
	hash := fnv.New64a()
	_, _ = hash.Write([]byte(text)) // never fails
	// FNV's upper bits hardly differ for texts that differ at their ends.
	mixed := hash.Sum64()
	mixed ^= mixed >> 32
	mixed *= 0x9e3779b97f4a7c15
	return float64(mixed>>11) / (1 << 53)
}

// ParseInterval reads a duration as time.ParseDuration does, and before it weeks
// and days, as whole numbers: "7d", "2w", "1d12h", "90m". A day has 24 hours. It is
// not negative, and at most 100 years.
func ParseInterval(text string) (time.Duration, error) {
	const day = 24 * time.Hour
	const most = 100 * 365 * day
	fail := fmt.Errorf("%.40q: want a duration such as 90m, 6h, 7d or 2w", text)
	rest, total := text, time.Duration(0)
	for _, unit := range []struct {
		name string
		is   time.Duration
	}{{"w", 7 * day}, {"d", day}} {
		number, after, ok := strings.Cut(rest, unit.name)
		if !ok {
			continue
		}
		n := 0
		for _, digit := range []byte(number) {
			if digit < '0' || digit > '9' || n > int(most/day) {
				return 0, fail
			}
			n = 10*n + int(digit-'0')
		}
		if number == "" || n > int(most/unit.is) {
			return 0, fail
		}
		total, rest = total+time.Duration(n)*unit.is, after
		if total > most {
			return 0, fail
		}
	}
	if rest != "" || total == 0 && text == "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 || d > most || strings.HasPrefix(rest, "+") || strings.HasPrefix(rest, "-") {
			return 0, fail
		}
		total += d
	}
	if total > most {
		return 0, fail
	}
	return total, nil
}
