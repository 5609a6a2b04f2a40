// Package netplugin is Berth's network and IPAM driver: one method for each call
// of dockerd, each of which reads a request, locks the network, writes down what
// it is about to do, does it, writes down that it is done, and answers.
//
// The life of a container on a Berth network, as dockerd tells it:
//
//	RequestPool, RequestAddress (gateway, aux)   docker network create
//	CreateNetwork                                the bridge is made
//	RequestAddress                               docker run
//	CreateEndpoint                               the link is made
//	Join                                         dockerd moves it into the container
//	ProgramExternalConnectivity
//	RevokeExternalConnectivity, Leave            the container stops
//	DeleteEndpoint                               the link is removed
//	ReleaseAddress
//	ReleaseAddress, ReleasePool, DeleteNetwork   docker network rm
//
// Any of these may be missing, come twice, or come when what it speaks of is
// gone. dockerd never repeats CreateNetwork, not even after a reboot of the host,
// so Recover builds everything again from the records.
//
// The package touches neither links nor firewall: that is the Mode's, as
// netplugin/bridge. It never calls Docker: dockerd may be waiting for the answer
// while it holds the locks that the call would need.
package netplugin
