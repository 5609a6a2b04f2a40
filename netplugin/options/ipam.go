package options

import (
	"maps"
	"slices"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
)

// ipamPrefix makes an option of a pool one of the network: Docker Compose has no way
// to say --ipam-opt.
const ipamPrefix = "ipam."

// setPoolOption checks the value of an option of pools and keeps it for them.
func setPoolOption(name string) func(*Network, given) error {
	set := poolOptions()[name]
	return func(n *Network, g given) error {
		if err := set(&ipam.PoolOptions{}, g); err != nil {
			return err
		}
		if n.IPAM == nil {
			n.IPAM = make(map[string]string)
		}
		n.IPAM[name] = g.value
		return nil
	}
}

// PoolOptions are the options that a pool has for the network: those it was requested
// with, the network's parent if it has none, and in place of them what was given with
// the network. The error is invalid and names the option.
func (n Network) PoolOptions(of ipam.PoolOptions) (ipam.PoolOptions, error) {
	if of.Parent == "" {
		of.Parent = n.Segment()
	}
	if len(n.IPAM) == 0 {
		return of, nil
	}
	known, opts := poolOptions(), make(map[string]string)
	for _, name := range slices.Sorted(maps.Keys(n.IPAM)) {
		set, ok := known[name]
		if !ok {
			return of, fault.Invalid("unknown option %s%s", ipamPrefix, name)
		}
		if err := set(&of, given{ipamPrefix + name, n.IPAM[name]}); err != nil {
			return of, err
		}
		opts[name] = n.IPAM[name]
	}
	return of, checkDHCP(of, opts)
}
