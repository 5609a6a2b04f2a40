package netplugin

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

// An engine is what a version of dockerd sends for the address of a container.
type engine struct {
	name string
	// options are those of its request, %s is the container's name.
	options string
	// keyByMAC is the setting; keys says that a container is known again.
	keyByMAC, keys bool
}

func engines() []engine {
	return []engine{
		{name: "20.10", options: `null`},
		{name: "28.5", options: `{}`},
		{name: "29", options: `{"com.docker.network.endpoint.name":"%s"}`, keys: true},
		{name: "28.5 with MAC addresses", options: `{"com.docker.network.endpoint.macaddress":"02:42:00:00:00:%s"}`, keyByMAC: true, keys: true},
		{
			name: "29 with MAC addresses", keyByMAC: true, keys: true,
			options: `{"com.docker.network.endpoint.name":"any","com.docker.network.endpoint.macaddress":"02:42:00:00:00:%s"}`,
		},
	}
}

// send sends a request as it comes over the socket.
func (e *testEnv) send(n *dockerNet, addr, opts string) (netip.Prefix, error) {
	e.t.Helper()
	body, err := json.Marshal(map[string]any{"PoolID": n.poolID, "Address": addr, "Options": json.RawMessage(opts)})
	assert.NilError(e.t, err)
	req := new(ipam.RequestAddressRequest)
	assert.NilError(e.t, json.Unmarshal(body, req))
	got, err := e.ipam.RequestAddress(e.t.Context(), req)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.MustParsePrefix(got.Address), nil
}

func (e *testEnv) mustSend(n *dockerNet, addr, opts string) netip.Prefix {
	e.t.Helper()
	got, err := e.send(n, addr, opts)
	assert.NilError(e.t, err)
	return got
}

const gatewayOptions = `{"RequestAddressType":"com.docker.network.gateway"}`

// The addresses of a network and its containers, as each engine asks for them.
func TestAddressesAsEnginesAskForThem(t *testing.T) {
	for _, engine := range engines() {
		t.Run(engine.name, func(t *testing.T) {
			e := newEnv(t)
			e.with = func(cfg *Config) { cfg.KeyByMAC = engine.keyByMAC }
			e.restart()
			of := func(container string) string { return strings.ReplaceAll(engine.options, "%s", container) }
			pool, err := e.ipam.RequestPool(t.Context(), &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.0/28"})
			assert.NilError(t, err)
			n := &dockerNet{id: id("net"), poolID: pool.PoolID, pool: pool.Pool, gateway: "10.1.0.1/24"}
			assert.Equal(t, e.mustSend(n, "", gatewayOptions).String(), n.gateway)
			// Auxiliary addresses may lie outside the range.
			assert.Equal(t, e.mustSend(n, "10.1.0.3", `null`).String(), "10.1.0.3/24")
			assert.Equal(t, e.mustSend(n, "10.1.0.200", `null`).String(), "10.1.0.200/24")
			assert.NilError(t, e.net.CreateNetwork(t.Context(), n.request(nil)))

			assert.Equal(t, e.mustSend(n, "", of("0a")).String(), "10.1.0.2/24")
			assert.Equal(t, e.mustSend(n, "", of("0b")).String(), "10.1.0.4/24")
			assert.Equal(t, e.mustSend(n, "10.1.0.9", of("0c")).String(), "10.1.0.9/24", "--ip")
			assert.Equal(t, e.mustSend(n, "10.1.0.77", of("0d")).String(), "10.1.0.77/24", "--ip outside the range")
			states := make(map[string]control.LeaseState)
			keys := make(map[string]string)
			for addr, l := range e.leases() {
				states[addr], keys[addr] = l.State, l.Key
				assert.Equal(t, l.Pinned, addr != "10.1.0.1" && addr != "10.1.0.2" && addr != "10.1.0.4", addr)
			}
			assert.DeepEqual(t, states, map[string]control.LeaseState{
				"10.1.0.1": control.LeaseGateway, "10.1.0.3": control.LeaseAux, "10.1.0.200": control.LeaseAux,
				"10.1.0.2": control.LeasePending, "10.1.0.4": control.LeasePending, "10.1.0.9": control.LeasePending, "10.1.0.77": control.LeasePending,
			})
			switch {
			case engine.keyByMAC:
				assert.Equal(t, keys["10.1.0.2"], "02:42:00:00:00:0a")
			case engine.keys:
				assert.Equal(t, keys["10.1.0.2"], "0a")
			default:
				assert.Equal(t, keys["10.1.0.2"], "")
			}

			// Containers that come again, the other way round and after a restart.
			for _, addr := range []string{"10.1.0.2", "10.1.0.4", "10.1.0.9"} {
				assert.NilError(t, e.giveBack(n, netip.MustParseAddr(addr)))
			}
			e.restart()
			b, a := e.mustSend(n, "", of("0b")), e.mustSend(n, "", of("0a"))
			if engine.keys {
				assert.Equal(t, a.String(), "10.1.0.2/24")
				assert.Equal(t, b.String(), "10.1.0.4/24")
				// The user's own is kept, too, and others do not get it by chance.
				assert.Equal(t, e.mustSend(n, "", of("0c")).String(), "10.1.0.9/24")
				// Asked once more without use of the first answer.
				assert.Equal(t, e.mustSend(n, "", of("0a")), a)
			} else {
				assert.Assert(t, a != b)
				assert.Assert(t, a.String() != "10.1.0.2/24" && b.String() != "10.1.0.4/24", "given again in its quarantine")
			}
			_, err = e.send(n, a.Addr().String(), of("0e"))
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
			assert.ErrorContains(t, err, "address "+a.Addr().String()+" of subnet 10.1.0.0/24 is already in use by a container")
			e.healthy()
		})
	}
}

// A key is what the setting says, and nothing where the engine does not send it.
func TestKeysOfContainers(t *testing.T) {
	for _, tc := range []struct {
		name     string
		keyByMAC bool
		opts     string
		want     string
	}{
		{"name", false, `{"com.docker.network.endpoint.name":"web","com.docker.network.endpoint.macaddress":"02:42:00:00:00:01"}`, "web"},
		{"no name", false, `{"com.docker.network.endpoint.macaddress":"02:42:00:00:00:01"}`, ""},
		{"MAC address", true, `{"com.docker.network.endpoint.macaddress":"02:42:00:00:00:01"}`, "02:42:00:00:00:01"},
		{"MAC address in another form", true, `{"com.docker.network.endpoint.macaddress":"02-42-00-00-00-0A"}`, "02:42:00:00:00:0a"},
		{"no MAC address", true, `{"com.docker.network.endpoint.name":"web"}`, ""},
		{"not a MAC address", true, `{"com.docker.network.endpoint.macaddress":"web"}`, ""},
		{"unknown options", false, `{"com.docker.network.ipam.serial":"true","RequestAddressType":"other"}`, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newEnv(t)
			e.with = func(cfg *Config) { cfg.KeyByMAC = tc.keyByMAC }
			e.restart()
			n := mustNetwork(t, e, "net", "10.1.0.0/24")
			got := e.mustSend(n, "", tc.opts)
			assert.Equal(t, e.leases()[got.Addr().String()].Key, tc.want)
		})
	}
	assert.Assert(t, IPAMCapabilities(true).RequiresMACAddress)
	assert.Assert(t, !IPAMCapabilities(false).RequiresMACAddress)
}

// Requests that cannot be answered say what was wrong, and change nothing.
func TestAddressesThatAreRefused(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	web := e.mustSend(n, "", `{"com.docker.network.endpoint.name":"web"}`)
	running := mustRun(t, e, n, "running", "")
	before := e.leases()
	unknown := &dockerNet{poolID: "10.9.0.0/24#77"}
	for _, tc := range []struct {
		n          *dockerNet
		addr, opts string
		kind       func(error) bool
		want       string
	}{
		{n, "10.2.0.1", `null`, errdefs.IsInvalidArgument, "address 10.2.0.1: want one of subnet 10.1.0.0/24"},
		{n, "fd00::1", `null`, errdefs.IsInvalidArgument, "address fd00::1: want one of subnet 10.1.0.0/24"},
		{n, "10.1.0.255", `null`, errdefs.IsInvalidArgument, "address 10.1.0.255: it is the network or broadcast address of subnet 10.1.0.0/24"},
		{n, "10.1.0.0", gatewayOptions, errdefs.IsInvalidArgument, "address 10.1.0.0: it is the network or broadcast address of subnet 10.1.0.0/24"},
		{n, "web", `null`, errdefs.IsInvalidArgument, `address "web": want an IP address, as 10.1.0.2`},
		{n, "fe80::1%eth0", `null`, errdefs.IsInvalidArgument, `address "fe80::1%eth0": want an IP address, as 10.1.0.2`},
		{n, "10.1.0.1", `null`, errdefs.IsConflict, "address 10.1.0.1 of subnet 10.1.0.0/24 is already in use as the gateway"},
		{n, web.Addr().String(), `null`, errdefs.IsConflict, "address 10.1.0.2 of subnet 10.1.0.0/24 is already in use by a container of container web"},
		{n, running.ip().String(), `null`, errdefs.IsConflict, "address 10.1.0.3 of subnet 10.1.0.0/24 is already in use by endpoint " + short(running.endpoint)},
		{n, running.ip().String(), gatewayOptions, errdefs.IsConflict, "address 10.1.0.3 of subnet 10.1.0.0/24 is already in use by endpoint " + short(running.endpoint)},
		{unknown, "", `null`, errdefs.IsNotFound, "10.9.0.0/24#77"},
		{unknown, "10.9.0.1", `null`, errdefs.IsNotFound, "10.9.0.0/24#77"},
		{&dockerNet{}, "", `null`, errdefs.IsNotFound, `""`},
	} {
		_, err := e.send(tc.n, tc.addr, tc.opts)
		assert.Assert(t, tc.kind(err), "%q %s: %v", tc.addr, tc.opts, err)
		assert.ErrorContains(t, err, tc.want)
		assert.DeepEqual(t, e.leases(), before, cmpopts.EquateComparable(netip.Addr{}))
	}
	e.healthy()
}

// The gateway of a network that takes what somebody has fails, and says who.
func TestAGatewayThatIsTaken(t *testing.T) {
	e := newEnv(t)
	pool, err := e.ipam.RequestPool(t.Context(), &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/24"})
	assert.NilError(t, err)
	n := &dockerNet{poolID: pool.PoolID}
	e.mustSend(n, "10.1.0.1", `null`)
	_, err = e.send(n, "10.1.0.1", gatewayOptions)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "address 10.1.0.1 of subnet 10.1.0.0/24 is already in use as a reserved address (--aux-address)")
	assert.Equal(t, e.mustSend(n, "", gatewayOptions).String(), "10.1.0.2/24")
}

// Whatever dockerd gives back, and how often: it is told that it is done, and nobody
// else loses an address.
func TestReleasesOfAllKinds(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	web := e.mustSend(n, "", `{"com.docker.network.endpoint.name":"web"}`).Addr()
	running := mustRun(t, e, n, "running", "")
	release := func(pool, addr string) error {
		return e.ipam.ReleaseAddress(t.Context(), &ipam.ReleaseAddressRequest{PoolID: pool, Address: addr})
	}
	before := e.leases()
	for _, addr := range []string{"10.1.0.99", "10.2.0.1", "fd00::1", "10.1.0.0"} {
		assert.NilError(t, release(n.poolID, addr))
		assert.NilError(t, release("no such", addr))
	}
	assert.DeepEqual(t, e.leases(), before, cmpopts.EquateComparable(netip.Addr{}))
	for _, addr := range []string{"", "web", "10.1.0.2.3", "::1%eth0", strings.Repeat("1", 1000)} {
		err := release(n.poolID, addr)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.Assert(t, len(err.Error()) < 200)
	}

	for range 2 {
		assert.NilError(t, release(n.poolID, web.String()))
		lease := e.leases()[web.String()]
		assert.Equal(t, lease.State, control.LeaseQuarantined)
		assert.Equal(t, lease.Key, "web")
		e.restart()
	}
	// A message that comes late does not take the address of an endpoint.
	assert.NilError(t, release(n.poolID, running.ip().String()))
	assert.Equal(t, e.leases()[running.ip().String()].State, control.LeaseActive)
	_, err := e.ask(n, "other", running.ip().String())
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	// It is free with its endpoint then.
	e.restart()
	assert.NilError(t, e.stop(running))
	assert.Equal(t, e.leases()[running.ip().String()].State, control.LeaseQuarantined)

	// After the quarantine what has no key is simply free, and what has is kept.
	e.later(2 * time.Minute)
	_, shown := e.leases()[running.ip().String()]
	assert.Assert(t, !shown)
	assert.Equal(t, e.leases()[web.String()].State, control.LeaseReleased)
	e.healthy()
}
