package netplugin

import (
	"encoding/json"
	"testing"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/pluginapi"
)

// Any two bodies, one to each method after the other, on a host with a network
// and a container: no panic, nothing half done, and the state can be read again.
func FuzzRequests(f *testing.F) {
	for _, s := range []string{
		`{}`,
		`{"NetworkID":"` + id("net") + `","EndpointID":"` + id("c") + `"}`,
		`{"NetworkID":"new","Options":{"com.docker.network.generic":{"mtu":"1400"}},"IPv4Data":[{"AddressSpace":"berth-local","Pool":"10.9.0.0/24","Gateway":"10.9.0.1/24"}]}`,
		`{"NetworkID":"new","IPv4Data":[{"AddressSpace":"berth-local","Pool":"10.1.0.0/24"}]}`,
		`{"NetworkID":"` + id("net") + `","EndpointID":"e2","Interface":{"Address":"10.1.0.9/24","MacAddress":""}}`,
		`{"NetworkID":"` + id("net") + `","EndpointID":"e2","Interface":{"Address":"10.1.0.2/24"},"Options":{"mac":"02:00:00:00:00:01"}}`,
		`{"AddressSpace":"berth-local","Pool":"10.3.0.0/24","SubPool":"10.3.0.0/25","V6":false}`,
		`{"AddressSpace":"berth-local","V6":true,"Options":null}`,
		`{"PoolID":"POOL","Address":"10.1.0.77"}`,
		`{"PoolID":"POOL","Address":"10.1.0.2","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"PoolID":"POOL"}`,
	} {
		for method := range byte(12) {
			f.Add(method, []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, method byte, body []byte) {
		e := newEnv(t)
		n := mustNetwork(t, e, "net", "10.1.0.0/24")
		mustRun(t, e, n, "c", "")
		call(t, e, n, method, body)
		assert.DeepEqual(t, e.problems(), []string(nil))
		e.restart()
		assert.DeepEqual(t, e.problems(), []string(nil))
	})
}

// call decodes the body as the method's request and sends it. Errors are fine.
func call(t *testing.T, e *testEnv, n *dockerNet, method byte, body []byte) {
	ctx := t.Context()
	is := func(req any) bool { return json.Unmarshal(body, req) == nil }
	poolID := func(id string) string {
		if id == "POOL" {
			return n.poolID
		}
		return id
	}
	var err error
	switch method % 12 {
	case 0:
		if req := new(network.CreateNetworkRequest); is(req) {
			err = e.net.CreateNetwork(ctx, req)
		}
	case 1:
		if req := new(network.DeleteNetworkRequest); is(req) {
			err = e.net.DeleteNetwork(ctx, req)
		}
	case 2:
		if req := new(network.CreateEndpointRequest); is(req) {
			_, err = e.net.CreateEndpoint(ctx, req)
		}
	case 3:
		if req := new(network.DeleteEndpointRequest); is(req) {
			err = e.net.DeleteEndpoint(ctx, req)
		}
	case 4:
		if req := new(network.JoinRequest); is(req) {
			_, err = e.net.Join(ctx, req)
		}
	case 5:
		if req := new(network.LeaveRequest); is(req) {
			err = e.net.Leave(ctx, req)
		}
	case 6:
		if req := new(network.ProgramExternalConnectivityRequest); is(req) {
			err = e.net.ProgramExternalConnectivity(ctx, req)
		}
	case 7:
		if req := new(pluginapi.GwAllocCheckRequest); is(req) {
			_, err = e.net.GwAllocCheck(ctx, req)
		}
	case 8:
		if req := new(ipam.RequestPoolRequest); is(req) {
			_, err = e.ipam.RequestPool(ctx, req)
		}
	case 9:
		if req := new(ipam.ReleasePoolRequest); is(req) {
			err = e.ipam.ReleasePool(ctx, &ipam.ReleasePoolRequest{PoolID: poolID(req.PoolID) + "?"})
		}
	case 10:
		if req := new(ipam.RequestAddressRequest); is(req) {
			req.PoolID = poolID(req.PoolID)
			_, err = e.ipam.RequestAddress(ctx, req)
		}
	case 11:
		if req := new(ipam.ReleaseAddressRequest); is(req) {
			req.PoolID = poolID(req.PoolID)
			err = e.ipam.ReleaseAddress(ctx, req)
		}
	}
	if err != nil {
		assert.Assert(t, err.Error() != "")
	}
}
