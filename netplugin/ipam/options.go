package ipam

import (
	"reflect"
	"slices"
	"time"
)

// A ProbeMode is how thoroughly an address is looked for on the LAN before it is
// given out.
type ProbeMode string

const (
	// ProbeAuto is that nobody has said: fast when the pool has a parent, else
	// off.
	ProbeAuto ProbeMode = ""
	// ProbeOff asks nobody.
	ProbeOff ProbeMode = "off"
	// ProbeFast asks for as long as nobody minds to wait.
	ProbeFast ProbeMode = "fast"
	// ProbeFull asks as RFC 5227 says, for seconds.
	ProbeFull ProbeMode = "full"
)

// A ConflictPolicy is what becomes of a request for an address that somebody on
// the LAN has.
type ConflictPolicy string

const (
	// ConflictRefuse refuses it.
	ConflictRefuse ConflictPolicy = "refuse"
	// ConflictWarn gives the address out and says so.
	ConflictWarn ConflictPolicy = "warn"
)

// DefaultQuarantine is how long a released address rests: neighbours keep an ARP
// entry about as long.
const DefaultQuarantine = time.Minute

// PoolOptions are the options of a pool (--ipam-opt). It is plain data. Without a
// Conflict policy they count as not given, and as DefaultOptions.
type PoolOptions struct {
	// Exclude are ranges that automatic addresses do not come from, sorted.
	// Those of other subnets have no effect.
	Exclude []Range
	// Quarantine is how long a released address is not given to another if it
	// can be helped; 0 is not at all.
	Quarantine time.Duration
	// Sticky gives a container the address that one of the same key had.
	Sticky bool
	// Probe is as it was asked for; see ProbeMode.
	Probe ProbeMode
	// Conflict is for requests that name an address.
	Conflict ConflictPolicy
	// Parent is the host's link to the LAN that the pool is a part of, ""
	// for a network of the host's own.
	Parent string
	// DHCP says that addresses come from the LAN's DHCP server.
	DHCP bool
}

// DefaultOptions are those of a pool for which none were given.
func DefaultOptions() PoolOptions {
	return PoolOptions{Quarantine: DefaultQuarantine, Sticky: true, Conflict: ConflictRefuse}
}

// ProbeMode is how to probe, never ProbeAuto.
func (o PoolOptions) ProbeMode() ProbeMode {
	switch {
	case o.Probe != ProbeAuto:
		return o.Probe
	case o.Parent != "":
		return ProbeFast
	}
	return ProbeOff
}

// equal compares normalized options.
func (o PoolOptions) equal(p PoolOptions) bool {
	same := slices.Equal(o.Exclude, p.Exclude)
	o.Exclude, p.Exclude = nil, nil
	return same && reflect.DeepEqual(o, p)
}

func (o PoolOptions) normalized() PoolOptions {
	if o.Conflict == "" {
		parent := o.Parent
		o = DefaultOptions()
		o.Parent = parent
	}
	o.Exclude = slices.Clone(o.Exclude)
	return o
}
