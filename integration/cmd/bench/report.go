package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A report is what one part measured in one engine.
type report struct {
	Part       string
	Engine     string
	Began      time.Time
	Seconds    float64
	Processors int
	Tables     []*grid
	// Notes are sentences to print below the tables.
	Notes []string `json:",omitempty"`

	// texts replace the tables' usual form.
	texts map[*grid]string
}

// A grid is one table: kinds of work down, drivers across.
type grid struct {
	Title string
	// Columns name the drivers. Behind the second is a column for the ratio of the
	// first to the second.
	Columns []string
	Lines   []*line

	// plain has no ratios: the columns are not drivers.
	plain bool
}

// A line is one kind of work.
type line struct {
	Work string
	Unit unit
	// Values are the measurements, by column; a column may have none.
	Values [][]float64
}

// A unit is what numbers are, and how they are printed.
type unit string

// Units of the values.
const (
	inSeconds unit = "s"
	inBytes   unit = "B"
	inPieces  unit = ""
	inBits    unit = "bit/s"
	inRate    unit = "/s"
	asRatio   unit = "x"
)

// line returns that of the work, which it adds if it is new.
func (g *grid) line(work string, u unit) *line {
	for _, l := range g.Lines {
		if l.Work == work {
			return l
		}
	}
	l := &line{Work: work, Unit: u, Values: make([][]float64, len(g.Columns))}
	g.Lines = append(g.Lines, l)
	return l
}

// add notes a measurement.
func (g *grid) add(work string, u unit, column int, value float64) {
	l := g.line(work, u)
	l.Values[column] = append(l.Values[column], value)
}

// markdown is the report as docs/benchmarks.md holds it.
func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "### Engine %s: %s\n\n", r.Engine, r.Part)
	for _, g := range r.Tables {
		if len(g.Lines) == 0 {
			continue
		}
		if g.Title != "" {
			fmt.Fprintf(&b, "%s\n\n", g.Title)
		}
		text, ok := r.texts[g]
		if !ok {
			text = g.markdown()
		}
		b.WriteString(text)
		b.WriteString("\n")
	}
	for _, note := range r.Notes {
		fmt.Fprintf(&b, "- %s\n", note)
	}
	if len(r.Notes) > 0 {
		b.WriteString("\n")
	}
	return b.String()
}

// markdown renders the medians, and the ratio of the first two.
func (g *grid) markdown() string {
	var b strings.Builder
	head := slices.Clone(g.Columns)
	ratios := len(head) >= 2 && !g.plain
	if ratios {
		head = slices.Insert(head, 2, "Ratio")
	}
	fmt.Fprintf(&b, "| Work | %s |\n|---|%s\n", strings.Join(head, " | "), strings.Repeat("---:|", len(head)))
	for _, l := range g.Lines {
		var cells []string
		for _, values := range l.Values {
			cells = append(cells, l.Unit.format(middle(values)))
		}
		if ratios {
			cells = slices.Insert(cells, 2, asRatio.format(ratio(middle(l.Values[0]), middle(l.Values[1]))))
		}
		fmt.Fprintf(&b, "| %s | %s |\n", l.Work, strings.Join(cells, " | "))
	}
	return b.String()
}

// middle is the median of the values, NaN of none.
func middle(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// ratio is NaN when it says nothing: when one of the two is unknown, or is not a
// positive number, as the memory added by next to nothing may be.
func ratio(a, b float64) float64 {
	if !(a > 0 && b > 0) {
		return math.NaN()
	}
	return a / b
}

// less subtracts a number from each value.
func less(values []float64, by float64) []float64 {
	out := make([]float64, len(values))
	for i, v := range values {
		out[i] = v - by
	}
	return out
}

// paired subtracts the values of one column from those of another, round by round.
func paired(values, from []float64) []float64 {
	out := make([]float64, min(len(values), len(from)))
	for i := range out {
		out[i] = values[i] - from[i]
	}
	return out
}

// format prints a value with its unit; NaN is a dash.
func (u unit) format(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	switch u {
	case inSeconds:
		return formatSeconds(v)
	case inBytes:
		// Rounded first: there is no -0.0.
		return fmt.Sprintf("%.1f MB", math.Round(v/1e5)/10+0)
	case inBits:
		return fmt.Sprintf("%.2f Gbit/s", v/1e9)
	case inRate:
		return fmt.Sprintf("%.0f/s", v)
	case asRatio:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

func formatSeconds(v float64) string {
	switch abs := math.Abs(v); {
	case abs < 1e-3:
		return fmt.Sprintf("%.1f µs", v*1e6)
	case abs < 10:
		return fmt.Sprintf("%.1f ms", v*1e3)
	default:
		return fmt.Sprintf("%.1f s", v)
	}
}

// find returns the line of the work, nil without one.
func (g *grid) find(work string) *line {
	for _, l := range g.Lines {
		if l.Work == work {
			return l
		}
	}
	return nil
}
