package ipam

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Supernet is where automatic pools are taken from.
type Supernet struct {
	// Prefix is the whole, masked.
	Prefix netip.Prefix
	// Size is the prefix length of each pool, at least Prefix.Bits().
	Size int
}

// String is the form that ParseSupernets reads.
func (s Supernet) String() string { return fmt.Sprintf("%s:%d", s.Prefix, s.Size) }

// ParseSupernets reads the setting BERTH_POOLS: PREFIX:SIZE, separated by commas,
// as in
//
//	10.208.0.0/12:24,fd00:1234:5678::/48:64
//
// where SIZE is the prefix length of each pool. Spaces around the commas are
// ignored, "" is no supernet. Pools are taken in the order of the list. The error
// is invalid and names the entry.
func ParseSupernets(s string) ([]Supernet, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	var list []Supernet
	for entry := range strings.SplitSeq(s, ",") {
		supernet, err := parseSupernet(strings.TrimSpace(entry))
		if err != nil {
			return nil, err
		}
		for _, other := range list {
			if other.Prefix.Overlaps(supernet.Prefix) {
				return nil, fault.Invalid("address pools %s and %s overlap", other, supernet)
			}
		}
		list = append(list, supernet)
	}
	return list, nil
}

func parseSupernet(entry string) (Supernet, error) {
	wrong := func() (Supernet, error) {
		return Supernet{}, fault.Invalid("address pools %q: want PREFIX:SIZE, as 10.208.0.0/12:24 or fd00:1::/48:64", entry)
	}
	at := strings.LastIndexByte(entry, ':')
	if at < 0 {
		return wrong()
	}
	prefix, err := netip.ParsePrefix(entry[:at])
	if err != nil {
		return wrong()
	}
	size, err := strconv.Atoi(entry[at+1:])
	if err != nil {
		return wrong()
	}
	if prefix != prefix.Masked() {
		return Supernet{}, fault.Invalid("address pools %q: %s has bits beyond its length, want %s", entry, prefix, prefix.Masked())
	}
	if err := CheckSubnet(prefix); err != nil {
		return Supernet{}, fmt.Errorf("address pools %q: %w", entry, err)
	}
	// A smaller pool has no room for a gateway and a container.
	if low, high := prefix.Bits(), prefix.Addr().BitLen()-2; size < low || size > high {
		return Supernet{}, fault.Invalid("address pools %q: want a size from %d to %d", entry, low, high)
	}
	return Supernet{Prefix: prefix, Size: size}, nil
}

// DefaultSupernets completes a list with the defaults of each family that it does
// not name: 10.208.0.0/12 in 4096 pools of /24, away from 172.16.0.0/12 and
// 192.168.0.0/16 where Docker's own pools are, and the host's own ULA prefix in
// 65536 pools of /64.
func DefaultSupernets(list []Supernet, ula netip.Prefix) []Supernet {
	named := func(is4 bool) bool {
		return slices.ContainsFunc(list, func(s Supernet) bool { return s.Prefix.Addr().Is4() == is4 })
	}
	out := slices.Clone(list)
	if !named(true) {
		out = append(out, Supernet{netip.MustParsePrefix("10.208.0.0/12"), 24})
	}
	if !named(false) && ula.IsValid() {
		out = append(out, Supernet{ula, 64})
	}
	return out
}

// NewULA makes a random unique local prefix of 48 bits (RFC 4193, section 3.2).
// A host keeps the one it made first, so that its networks do not collide with
// other hosts' when they are routed to each other.
func NewULA(random io.Reader) (netip.Prefix, error) {
	var b [16]byte
	b[0] = 0xfd
	if _, err := io.ReadFull(random, b[1:6]); err != nil {
		return netip.Prefix{}, fmt.Errorf("make an IPv6 prefix for this host: %w", err)
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), 48), nil
}
