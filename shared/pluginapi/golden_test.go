package pluginapi

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/docker/go-plugins-helpers/volume"
	"gotest.tools/v3/assert"
)

// requests has the wire type of every call that has parameters.
var requests = map[string]func([]byte) (any, error){
	"NetworkDriver.GwAllocCheck":                decodeAny[GwAllocCheckRequest],
	"NetworkDriver.AllocateNetwork":             decodeAny[network.AllocateNetworkRequest],
	"NetworkDriver.FreeNetwork":                 decodeAny[network.FreeNetworkRequest],
	"NetworkDriver.CreateNetwork":               decodeAny[network.CreateNetworkRequest],
	"NetworkDriver.DeleteNetwork":               decodeAny[network.DeleteNetworkRequest],
	"NetworkDriver.CreateEndpoint":              decodeAny[network.CreateEndpointRequest],
	"NetworkDriver.DeleteEndpoint":              decodeAny[network.DeleteEndpointRequest],
	"NetworkDriver.EndpointOperInfo":            decodeAny[network.InfoRequest],
	"NetworkDriver.Join":                        decodeAny[network.JoinRequest],
	"NetworkDriver.Leave":                       decodeAny[network.LeaveRequest],
	"NetworkDriver.ProgramExternalConnectivity": decodeAny[network.ProgramExternalConnectivityRequest],
	"NetworkDriver.RevokeExternalConnectivity":  decodeAny[network.RevokeExternalConnectivityRequest],
	"NetworkDriver.DiscoverNew":                 decodeAny[network.DiscoveryNotification],
	"NetworkDriver.DiscoverDelete":              decodeAny[network.DiscoveryNotification],
	"IpamDriver.RequestPool":                    decodeAny[ipam.RequestPoolRequest],
	"IpamDriver.ReleasePool":                    decodeAny[ipam.ReleasePoolRequest],
	"IpamDriver.RequestAddress":                 decodeAny[ipam.RequestAddressRequest],
	"IpamDriver.ReleaseAddress":                 decodeAny[ipam.ReleaseAddressRequest],
	"VolumeDriver.Create":                       decodeAny[volume.CreateRequest],
	"VolumeDriver.Remove":                       decodeAny[volume.RemoveRequest],
	"VolumeDriver.Mount":                        decodeAny[volume.MountRequest],
	"VolumeDriver.Unmount":                      decodeAny[volume.UnmountRequest],
	"VolumeDriver.Path":                         decodeAny[volume.PathRequest],
	"VolumeDriver.Get":                          decodeAny[volume.GetRequest],
}

// bare are the calls whose body is not looked at.
var bare = map[string]bool{
	"Plugin.Activate": true, "NetworkDriver.GetCapabilities": true, "IpamDriver.GetCapabilities": true,
	"IpamDriver.GetDefaultAddressSpaces": true, "VolumeDriver.Capabilities": true, "VolumeDriver.List": true,
}

func decodeAny[Req any](body []byte) (any, error) { return decodeBody[Req](body) }

// Each file under testdata/calls is what one engine sent while a network and a
// volume were made, used in every way, and removed: a line for each distinct
// call, the method and the body. They are recorded by `go run ./integration/cmd/record-calls`.
//
// A body must decode, and nothing that the engine said may be lost on the way
// into the wire type.
func TestRecordedCallsLoseNothing(t *testing.T) {
	files, err := filepath.Glob("testdata/calls/*.txt")
	assert.NilError(t, err)
	assert.Assert(t, len(files) >= 3, "recordings of three engines are due, have %v", files)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			assert.NilError(t, err)
			seen := map[string]int{}
			for line := range strings.Lines(string(text)) {
				method, body, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
				assert.Assert(t, ok, "line %q", line)
				seen[method]++
				if bare[method] {
					continue
				}
				decode, ok := requests[method]
				assert.Assert(t, ok, "no wire type for %s", method)
				typed, err := decode([]byte(body))
				assert.NilError(t, err, "%s %s", method, body)
				kept, err := json.Marshal(typed)
				assert.NilError(t, err)
				var said, have any
				assert.NilError(t, json.Unmarshal([]byte(body), &said))
				assert.NilError(t, json.Unmarshal(kept, &have))
				assert.NilError(t, contains(have, said, method))
			}
			for _, method := range []string{
				"NetworkDriver.CreateNetwork", "NetworkDriver.DeleteNetwork", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join",
				"NetworkDriver.ProgramExternalConnectivity", "NetworkDriver.RevokeExternalConnectivity", "NetworkDriver.Leave",
				"NetworkDriver.DeleteEndpoint", "NetworkDriver.EndpointOperInfo",
				"IpamDriver.RequestPool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress", "IpamDriver.ReleasePool",
				"VolumeDriver.Create", "VolumeDriver.Get", "VolumeDriver.List", "VolumeDriver.Mount", "VolumeDriver.Unmount", "VolumeDriver.Remove",
			} {
				assert.Check(t, seen[method] > 0, "%s was not recorded", method)
			}
		})
	}
}

// contains says whether have holds all that said does. Empty values may be
// missing: null, "", {} and [] mean the same to the drivers.
func contains(have, said any, at string) error {
	switch said := said.(type) {
	case map[string]any:
		object, ok := have.(map[string]any)
		if !ok && len(said) > 0 {
			return fmt.Errorf("%s: an object became %v", at, have)
		}
		for name, value := range said {
			if err := contains(object[name], value, at+"."+name); err != nil {
				return err
			}
		}
		return nil
	case []any:
		list, _ := have.([]any)
		if len(list) != len(said) {
			return fmt.Errorf("%s: %v became %v", at, said, have)
		}
		for i := range said {
			if err := contains(list[i], said[i], fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
		return nil
	case nil:
		return nil
	case string:
		if said == "" && have == nil {
			return nil
		}
	}
	if !reflect.DeepEqual(have, said) {
		return fmt.Errorf("%s: %v became %v", at, said, have)
	}
	return nil
}

func FuzzDecodeBody(f *testing.F) {
	f.Add([]byte(``))
	f.Add([]byte(`null`))
	f.Add([]byte(`{"NetworkID":"n1","Options":{"com.docker.network.generic":{"mode":"bridge"}},"IPv4Data":[{"Pool":"10.0.0.0/24","AuxAddresses":{"a":"10.0.0.9/24"}}]}`))
	f.Add([]byte(`{"Name":"db","Opts":null}`))
	f.Add([]byte(`{"PoolID":"p","Address":"10.0.0.1","Options":{"RequestAddressType":"com.docker.network.gateway"}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for method, decode := range requests {
			typed, err := decode(body)
			if err != nil {
				continue
			}
			if typed == nil || reflect.ValueOf(typed).IsNil() {
				t.Errorf("%s: %q became no request and no error", method, body)
			}
		}
	})
}
