package options

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
)

// maxQuarantine is long enough for any neighbour, and no pool should be out of use
// for longer because of a number that was mistyped.
const maxQuarantine = 24 * time.Hour

// poolOptions are the options of a pool by name. An option that is not given keeps
// the default.
func poolOptions() map[string]func(*ipam.PoolOptions, given) error {
	return map[string]func(*ipam.PoolOptions, given) error{
		"exclude":    setExclude,
		"quarantine": setQuarantine,
		"sticky": func(o *ipam.PoolOptions, g given) (err error) {
			o.Sticky, err = wordOf(g, map[string]bool{"on": true, "off": false})
			return err
		},
		"probe": func(o *ipam.PoolOptions, g given) (err error) {
			o.Probe, err = wordOf(g, map[string]ipam.ProbeMode{"off": ipam.ProbeOff, "fast": ipam.ProbeFast, "full": ipam.ProbeFull})
			return err
		},
		"conflict": func(o *ipam.PoolOptions, g given) (err error) {
			o.Conflict, err = wordOf(g, map[string]ipam.ConflictPolicy{"refuse": ipam.ConflictRefuse, "warn": ipam.ConflictWarn})
			return err
		},
		"parent": func(o *ipam.PoolOptions, g given) (err error) {
			o.Parent, err = parseLinkName(g.key, g.value, maxLinkName)
			return err
		},
		"dhcp": func(o *ipam.PoolOptions, g given) (err error) {
			o.DHCP, err = parseBool(g.key, g.value)
			return err
		},
	}
}

// ParsePool reads the options of RequestPool (--ipam-opt). Warnings are one line
// each, for the log. The error is invalid and names the option, its value and what
// is allowed.
func ParsePool(opts map[string]string) (ipam.PoolOptions, []string, error) {
	o := ipam.DefaultOptions()
	known := poolOptions()
	var warnings []string
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		set, ok := known[key]
		switch {
		case ok:
			if err := set(&o, given{key, opts[key]}); err != nil {
				return ipam.PoolOptions{}, nil, fmt.Errorf("IPAM %w", err)
			}
		case strings.HasPrefix(key, dockerPrefix):
			warnings = append(warnings, fmt.Sprintf("IPAM option %s is not known to Berth and has no effect", shown(key)))
		default:
			return ipam.PoolOptions{}, nil, unknownPoolOption(key, slices.Sorted(maps.Keys(known)))
		}
	}
	if err := checkDHCP(o, opts); err != nil {
		return ipam.PoolOptions{}, nil, err
	}
	return o, warnings, nil
}

// checkDHCP refuses what is for addresses that Berth chooses.
func checkDHCP(o ipam.PoolOptions, opts map[string]string) error {
	if !o.DHCP {
		return nil
	}
	if o.Parent == "" {
		return fault.Invalid("IPAM option dhcp=true: it needs the link to the LAN, as parent=eth1")
	}
	for _, key := range []string{"exclude", "quarantine", "sticky"} {
		if value, ok := opts[key]; ok {
			return fault.Invalid("IPAM options dhcp=true and %s=%s: the DHCP server chooses the addresses, leave one of them out", key, shown(value))
		}
	}
	return nil
}

func unknownPoolOption(key string, known []string) error {
	if near := nearest(key, known); len(near) > 0 {
		return fault.Invalid("unknown IPAM option %s: did you mean %s?", shown(key), strings.Join(near, " or "))
	}
	return fault.Invalid("unknown IPAM option %s: Berth has %s", shown(key), ownNames(known))
}

// wordOf reads one of the words.
func wordOf[T any](g given, words map[string]T) (T, error) {
	value, ok := words[g.value]
	if !ok {
		list := slices.Sorted(maps.Keys(words))
		last := len(list) - 1
		want := strings.Join(list[:last], ", ") + " or " + list[last]
		return value, fault.Invalid("option %s=%s: want %s", g.key, shown(g.value), want)
	}
	return value, nil
}

func setExclude(o *ipam.PoolOptions, g given) (err error) {
	if o.Exclude, err = ipam.ParseRanges(g.value); err != nil {
		err = fault.Invalid("option %s=%s: %w", g.key, shown(g.value), err)
	}
	return err
}

// setQuarantine reads a duration as Go writes it, or a number of seconds.
func setQuarantine(o *ipam.PoolOptions, g given) error {
	d, err := time.ParseDuration(g.value)
	if n, numErr := strconv.ParseUint(g.value, 10, 32); numErr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < 0 || d > maxQuarantine {
		return fault.Invalid("option %s=%s: want a time from 0 to 24h, as 90s or 5m", g.key, shown(g.value))
	}
	o.Quarantine = d
	return nil
}
