package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// median of at least one time.
func median(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// table renders medians in milliseconds, and how many times Docker's one Berth's is.
func table(results []*result) string {
	var b strings.Builder
	b.WriteString("| Work | Berth, ms | Docker, ms | Ratio |\n|---|---:|---:|---:|\n")
	for _, r := range results {
		berth, docker := median(r.times[0]), median(r.times[1])
		fmt.Fprintf(&b, "| `%s` | %.1f | %.1f | %.2f |\n", r.work, ms(berth), ms(docker), float64(berth)/float64(docker))
	}
	return b.String()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
