package netplugin

import (
	"context"
	"errors"
	"maps"

	"github.com/berth-plugin/berth/netplugin/options"
)

// mode returns what makes the network.
func (d *Driver) mode(n options.Network) Mode {
	if n.IsLAN() {
		return d.lan
	}
	return d.bridge
}

// restore tells each mode of its networks and endpoints, in the order of their age.
func (d *Driver) restore(ctx context.Context, networks []options.Network, endpoints []options.Endpoint) error {
	onLAN := make(map[string]bool, len(networks))
	for _, n := range networks {
		onLAN[n.ID] = n.IsLAN()
	}
	var errs []error
	for _, lan := range []bool{false, true} {
		var (
			ns  []options.Network
			eps []options.Endpoint
		)
		for _, n := range networks {
			if n.IsLAN() == lan {
				ns = append(ns, n)
			}
		}
		for _, ep := range endpoints {
			if onLAN[ep.NetworkID] == lan {
				eps = append(eps, ep)
			}
		}
		mode := d.bridge
		if lan {
			mode = d.lan
		}
		errs = append(errs, mode.Restore(ctx, ns, eps))
	}
	return errors.Join(errs...)
}

// driftOf asks each mode what of its networks is not as it should be.
func (d *Driver) driftOf(networks []options.Network) (map[string]string, error) {
	byMode := make(map[Mode][]options.Network)
	for _, n := range networks {
		byMode[d.mode(n)] = append(byMode[d.mode(n)], n)
	}
	found := make(map[string]string)
	var errs []error
	for mode, ns := range byMode {
		f, err := mode.Drift(ns)
		maps.Copy(found, f)
		errs = append(errs, err)
	}
	return found, errors.Join(errs...)
}
