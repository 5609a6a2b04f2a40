// Package keep decides which snapshots of a volume stay and which go. It is pure:
// it is given points in time and answers which of them a policy keeps. It deletes
// nothing, and knows neither volumes nor snapshots.
package keep

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Policy says how many snapshots to keep. Each field is one rule, 0 for none,
// and what any rule keeps is kept. The zero Policy has no rule and drops nothing.
//
// Last keeps that many of the newest. The others divide time into hours, days, weeks
// from Monday, months and years, and keep the newest of each of the last N periods
// that have any, as `restic forget` does: a period without a snapshot counts for
// nothing, so a host that was off for a month still has 7 days under Daily: 7.
//
// Periods are those of UTC. Hosts with different time zones that share a volume
// must not drop one another's snapshots, the plugin's container has no time zone
// of its own anyway, and in local time one hour a year would come twice.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int
}

// most bounds a rule: a century of days.
const most = 36525

// rules are the units as they are written, from the shortest.
func (p *Policy) rules() []rule {
	return []rule{
		{"n", &p.Last, nil},
		{"h", &p.Hourly, func(t time.Time) [3]int { return [3]int{t.Year(), t.YearDay(), t.Hour()} }},
		{"d", &p.Daily, func(t time.Time) [3]int { return [3]int{t.Year(), t.YearDay()} }},
		{"w", &p.Weekly, func(t time.Time) [3]int { year, week := t.ISOWeek(); return [3]int{year, week} }},
		{"m", &p.Monthly, func(t time.Time) [3]int { return [3]int{t.Year(), int(t.Month())} }},
		{"y", &p.Yearly, func(t time.Time) [3]int { return [3]int{t.Year()} }},
	}
}

type rule struct {
	unit string
	n    *int
	// period of a time in UTC; nil when each snapshot counts.
	period func(time.Time) [3]int
}

// Parse reads the form of the option snapshot.keep: parts in any order, with colons
// between, each a number and its unit: "24h:7d:4w:12m:2y" for hours, days, weeks,
// months and years, and "10" or "n=10" for the last ten. No unit comes twice, and
// numbers are from 1 to 36525.
func Parse(s string) (Policy, error) {
	var p Policy
	rules := p.rules()
	for part := range strings.SplitSeq(s, ":") {
		number, unit := part, "n"
		if last, ok := strings.CutPrefix(part, "n="); ok {
			number = last
		} else if i := len(part) - 1; i > 0 && strings.ContainsRune("hdwmy", rune(part[i])) {
			number, unit = part[:i], part[i:]
		}
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil || n < 1 || n > most {
			return Policy{}, fmt.Errorf("%.40q: want a number from 1 to %d with h, d, w, m or y for hours, days, weeks, months or years, or without for the last ones, and colons between, as 24h:7d:4w:12m or 10", part, most)
		}
		i := slices.IndexFunc(rules, func(r rule) bool { return r.unit == unit })
		if *rules[i].n != 0 {
			return Policy{}, fmt.Errorf("%.40q: there is such a part already", part)
		}
		*rules[i].n = int(n)
	}
	return p, nil
}

// String gives the form that Parse reads, the same for equal policies; "" for the
// zero one.
func (p Policy) String() string {
	var parts []string
	for _, r := range p.rules() {
		switch {
		case *r.n == 0:
		case r.period == nil:
			parts = append(parts, fmt.Sprintf("%s=%d", r.unit, *r.n))
		default:
			parts = append(parts, fmt.Sprintf("%d%s", *r.n, r.unit))
		}
	}
	return strings.Join(parts, ":")
}

// IsZero tells whether the policy has no rule.
func (p Policy) IsZero() bool { return p == Policy{} }

// Select divides snapshots made at the given times, in any order, into those that
// the policy keeps and those that it drops, as ascending indexes of times. Of
// equal times the one with the higher index counts as newer.
//
// The newest is always kept. So is what was made after now, by a host whose clock
// was wrong: it takes no other's place, and is judged when its time has come.
//
// What is kept would be kept again, and dropping now what the policy drops changes
// nothing in what it keeps later. So it does not matter how often it is applied.
func (p Policy) Select(times []time.Time, now time.Time) (keep, drop []int) {
	newest := make([]int, len(times))
	for i := range newest {
		newest[i] = i
	}
	slices.SortFunc(newest, func(a, b int) int {
		if c := times[b].Compare(times[a]); c != 0 {
			return c
		}
		return b - a
	})
	kept := make([]bool, len(times))
	past := newest
	for len(past) > 0 && times[past[0]].After(now) {
		kept[past[0]] = true
		past = past[1:]
	}
	if len(past) > 0 {
		kept[past[0]] = true
	}
	for _, r := range p.rules() {
		r.mark(times, past, kept)
	}
	for i := range times {
		if kept[i] || p.IsZero() {
			keep = append(keep, i)
		} else {
			drop = append(drop, i)
		}
	}
	return keep, drop
}

// mark notes what the rule keeps of past, which is sorted from the newest.
func (r rule) mark(times []time.Time, past []int, kept []bool) {
	left := *r.n
	var last [3]int
	for i, at := range past {
		if left == 0 {
			return
		}
		if r.period != nil {
			period := r.period(times[at].UTC())
			if i > 0 && period == last {
				continue
			}
			last = period
		}
		kept[at] = true
		left--
	}
}
