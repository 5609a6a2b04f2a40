package netplugin

import (
	dockeripam "github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"

	"github.com/berth-plugin/berth/shared/pluginapi"
)

// Capabilities answers NetworkDriver.GetCapabilities: each host's networks are its
// own. GwAllocCheck is wanted for being the first call of `docker network create`,
// so that wrong options are refused before any address is taken.
func Capabilities() pluginapi.NetworkCapabilities {
	return pluginapi.NetworkCapabilities{
		CapabilitiesResponse: network.CapabilitiesResponse{Scope: network.LocalScope, ConnectivityScope: network.LocalScope},
		GwAllocChecker:       true,
	}
}

// IPAMCapabilities answers IpamDriver.GetCapabilities: Berth keeps its own records
// and needs nothing repeated. With keyByMAC dockerd sends the MAC address with each
// request for a container's address; where the user gave none, it makes one up, new
// at each start.
func IPAMCapabilities(keyByMAC bool) pluginapi.IPAMCapabilities {
	caps := pluginapi.IPAMCapabilities{}
	caps.RequiresMACAddress = keyByMAC
	return caps
}

// AddressSpaces answers IpamDriver.GetDefaultAddressSpaces.
func AddressSpaces() dockeripam.AddressSpacesResponse {
	return dockeripam.AddressSpacesResponse{LocalDefaultAddressSpace: localSpace, GlobalDefaultAddressSpace: globalSpace}
}
