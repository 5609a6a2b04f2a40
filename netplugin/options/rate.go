package options

import (
	"strconv"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// Range of a rate in bits per second: below, a full packet takes longer than a TCP
// sender waits for its answer; above, no link is that fast.
const (
	minRate = 8_000
	maxRate = 100_000_000_000
)

// parseRate reads bits per second, as 512kbit, 10mbit, 1gbit or a plain number. The
// units are powers of ten.
func parseRate(g given) (int64, error) {
	digits, unit := strings.ToLower(g.value), int64(1)
	for _, u := range []struct {
		name  string
		value int64
	}{{"kbit", 1_000}, {"mbit", 1_000_000}, {"gbit", 1_000_000_000}, {"bit", 1}} {
		if rest, ok := strings.CutSuffix(digits, u.name); ok {
			digits, unit = rest, u.value
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > maxRate/uint64(unit) || int64(n)*unit < minRate {
		return 0, fault.Invalid("option %s=%s: want bits per second from 8kbit to 100gbit, as 512kbit, 10mbit or 1gbit", g.key, shown(g.value))
	}
	return int64(n) * unit, nil
}
