// Package emptydriver is the least that a network plugin can be: a veth pair for
// each endpoint, addresses counted upwards, and an answer to everything else.
// Nothing is stored, checked or filtered, and no container reaches anything. What a
// container's start costs with it is what the plugin protocol itself costs.
package emptydriver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
)

// pool is where every network of the driver's own address management has its
// addresses. Networks may share it: they are not connected to anything.
var pool = netip.MustParsePrefix("10.213.0.0/16")

// A Driver answers NetworkDriver and IpamDriver calls. It may serve any number of
// them at once.
type Driver struct {
	mu sync.Mutex
	// gateways of the networks, by ID. Guarded by mu.
	gateways map[string]string
	// last is the address given out last. Guarded by mu.
	last netip.Addr
}

// New makes a driver without networks.
func New() *Driver {
	return &Driver{gateways: make(map[string]string), last: pool.Addr().Next()}
}

// Serve answers dockerd on the listener until that is closed.
func (d *Driver) Serve(l net.Listener) error {
	err := http.Serve(l, d)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// call has the fields of all requests that the driver looks at.
type call struct {
	NetworkID, EndpointID string
	IPv4Data              []struct{ Gateway string }
	Address               string
}

// ServeHTTP answers one call. An error goes back in the field Err, which dockerd
// shows to the user.
func (d *Driver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var c call
	// Calls without parameters have no body.
	_ = json.NewDecoder(r.Body).Decode(&c)
	answer, err := d.answer(r.URL.Path, c)
	if err != nil {
		answer = map[string]any{"Err": err.Error()}
	}
	w.Header().Set("Content-Type", "application/vnd.docker.plugins.v1.2+json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		// The connection has ended; dockerd repeats the call.
		return
	}
}

func (d *Driver) answer(method string, c call) (map[string]any, error) {
	switch method {
	case "/Plugin.Activate":
		return map[string]any{"Implements": []string{"NetworkDriver", "IpamDriver"}}, nil
	case "/NetworkDriver.GetCapabilities":
		return map[string]any{"Scope": "local", "ConnectivityScope": "local"}, nil
	case "/NetworkDriver.CreateNetwork":
		return map[string]any{}, d.createNetwork(c)
	case "/NetworkDriver.CreateEndpoint":
		return map[string]any{"Interface": map[string]any{}}, createLink(c.EndpointID)
	case "/NetworkDriver.DeleteEndpoint":
		return map[string]any{}, deleteLink(c.EndpointID)
	case "/NetworkDriver.EndpointOperInfo":
		return map[string]any{"Value": map[string]any{}}, nil
	case "/NetworkDriver.Join":
		return d.join(c), nil
	case "/IpamDriver.GetDefaultAddressSpaces":
		return map[string]any{"LocalDefaultAddressSpace": "empty", "GlobalDefaultAddressSpace": "empty"}, nil
	case "/IpamDriver.RequestPool":
		return map[string]any{"PoolID": "empty", "Pool": pool.String()}, nil
	case "/IpamDriver.RequestAddress":
		return map[string]any{"Address": d.address(c.Address)}, nil
	}
	return map[string]any{}, nil
}

func (d *Driver) createNetwork(c call) error {
	if len(c.IPv4Data) == 0 {
		return errors.New("a network has an IPv4 subnet")
	}
	gateway, err := netip.ParsePrefix(c.IPv4Data[0].Gateway)
	if err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gateways[c.NetworkID] = gateway.Addr().String()
	return nil
}

// join names the container's end of the pair. There is a default route, as in every
// network that leads somewhere; without it dockerd would also attach the container
// to a bridge of its own.
func (d *Driver) join(c call) map[string]any {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, inside := linkNames(c.EndpointID)
	return map[string]any{
		"InterfaceName": map[string]any{"SrcName": inside, "DstPrefix": "eth"},
		"Gateway":       d.gateways[c.NetworkID],
	}
}

// address is the wanted one, or the next.
func (d *Driver) address(wanted string) string {
	if addr, err := netip.ParseAddr(wanted); err == nil {
		return netip.PrefixFrom(addr, pool.Bits()).String()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = d.last.Next()
	if !pool.Contains(d.last.Next()) {
		d.last = pool.Addr().Next().Next()
	}
	return netip.PrefixFrom(d.last, pool.Bits()).String()
}

// linkNames are those of the two ends of an endpoint's pair.
func linkNames(endpoint string) (outside, inside string) {
	const n = 11
	id := endpoint[:min(n, len(endpoint))]
	return "vo" + id, "vi" + id
}

func createLink(endpoint string) error {
	outside, inside := linkNames(endpoint)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = outside
	attrs.Flags |= net.FlagUp
	return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: inside})
}

// deleteLink removes the pair; that it is gone already is fine.
func deleteLink(endpoint string) error {
	outside, _ := linkNames(endpoint)
	found, err := netlink.LinkByName(outside)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(found)
}
