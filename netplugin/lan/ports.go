package lan

import (
	"context"

	"github.com/berth-plugin/berth/netplugin/options"
)

// ReservePorts publishes nothing: containers on a LAN are reached by their own
// addresses. As with Docker's macvlan that is no error, since Compose files name ports;
// it is logged.
func (m *Mode) ReservePorts(_ context.Context, n options.Network, ep options.Endpoint, want []options.PortRequest) ([]options.PublishedPort, error) {
	if len(want) > 0 {
		m.log.WithField("network", n.ID).WithField("endpoint", ep.ID).
			Warnf("ports are not published: a container of a %s network is reached by its own address (-o publish=gwbridge has Docker publish them)", n.Mode)
	}
	return nil, nil
}

// EnsurePorts has nothing to do.
func (m *Mode) EnsurePorts(context.Context, options.Network, options.Endpoint) error { return nil }

// RemovePorts has nothing to do.
func (m *Mode) RemovePorts(context.Context, options.Network, options.Endpoint) error { return nil }
