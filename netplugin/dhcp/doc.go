// Package dhcp takes addresses for containers from the DHCP servers of a LAN, and
// keeps them: DHCPv4 as in RFC 2131, spoken by berthd for clients that are not
// there yet.
//
// An address is taken while dockerd waits for RequestAddress, before there is a
// container, a link or even a MAC address. The client that the server sees is
// therefore an Identity that Berth makes up and gives to the endpoint later.
//
// All frames are sent and received on the parent link, by one packet socket for
// each parent, which exists only while something is under way. The socket is bound to
// all protocols (ETH_P_ALL): the kernel shows it a frame before the frame goes to a
// macvlan, an ipvlan or a bridge above the parent, so that it also hears what
// servers send to the address of a container that runs. Frames carry the MAC
// address of the identity as their source, since switches with DHCP snooping drop
// others. Whoever serves DHCP on the host itself, on the parent or in a container
// above it, is not reached: these frames leave by the wire, as those of a macvlan
// do.
//
// How a lease is renewed was chosen by trying dnsmasq and Kea:
//
//   - From T1 on it is the RENEWING state of the RFC: a request with ciaddr, sent to
//     the server alone, from the container's MAC and IP address to the MAC address
//     that the last ACK came from (the server or its relay). The container itself
//     answers the server's ARP request, and the ACK for it is seen on the parent. Its
//     kernel sees it too and may answer that the port is closed, which servers
//     ignore. Requests with the broadcast flag but without ciaddr, which would be
//     answered by broadcast, are for clients that boot: some servers log, ping or
//     refuse then.
//   - From T2 on, REBINDING by broadcast, to any server. Every second try is a
//     request like that of a client that boots (INIT-REBOOT: no ciaddr, broadcast
//     flag), since the answer to the other one is lost when the container does not
//     answer ARP, as one that is not up yet.
//
// Addresses of IPv6 are not supported, see IPv6Supported.
package dhcp

// IPv6Supported says whether leases can be had for IPv6 pools (DHCPv6). They cannot;
// and a container that is to have a stable address does not use SLAAC, whose
// addresses dockerd would never learn.
const IPv6Supported = false
