package doctor

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	"github.com/berth-plugin/berth/shared/control"
)

const (
	forwarding4 = "ipv4/ip_forward"
	forwarding6 = "ipv6/conf/all/forwarding"
)

// sysctlCommand sets a sysctl as a shell command.
func sysctlCommand(path, value string) string {
	return "sysctl -w net." + strings.ReplaceAll(path, "/", ".") + "=" + value
}

// forwarding asks whether the host is a router.
func forwarding(_ context.Context, in Input) ([]control.Finding, error) {
	paths := []string{forwarding4}
	if in.IPv6 {
		paths = append(paths, forwarding6)
	}
	var out []control.Finding
	for _, path := range paths {
		value, err := in.Links.Sysctl(path)
		if err != nil {
			return out, err
		}
		switch {
		case value != "0":
			out = append(out, ok("sysctl net/%s is %s", path, value))
		case len(in.Bridges) == 0:
			out = append(out, ok("sysctl net/%s is 0; Berth turns it on with the first container", path))
		default:
			out = append(out, fail("Containers reach nothing outside their network. Berth turns it on when a container is connected.",
				sysctlCommand(path, "1"), "sysctl net/%s is 0", path))
		}
	}
	return out, nil
}

// writable asks whether Berth can change sysctls: in a managed plugin only through
// a mount.
func writable(_ context.Context, in Input) ([]control.Finding, error) {
	value, err := in.Links.Sysctl(forwarding4)
	if err != nil {
		return nil, err
	}
	other := "1"
	if value == "1" {
		other = "0"
	}
	if err := in.Links.CheckSysctl(forwarding4, other); err != nil {
		return one(fail("Berth cannot turn on forwarding, decide about IPv6 on its bridges or publish ports on 127.0.0.1.", sysctlCommand(forwarding4, "1"),
			"the network sysctls cannot be written: %v", errors.Unwrap(err)))
	}
	return one(ok("the network sysctls can be written"))
}

// ipv6 asks whether the kernel has it, if a network needs it.
func ipv6(_ context.Context, in Input) ([]control.Finding, error) {
	value, err := in.Links.Sysctl("ipv6/conf/all/disable_ipv6")
	switch {
	case errors.Is(err, fs.ErrNotExist) && in.IPv6:
		return one(fail("Networks with IPv6 subnets cannot be made.", "", "the kernel runs without IPv6"))
	case errors.Is(err, fs.ErrNotExist):
		return one(ok("the kernel runs without IPv6, and no network needs it"))
	case err != nil:
		return nil, err
	case value == "1" && in.IPv6:
		return one(warn("New links start without IPv6; Berth turns it on for its own bridges, but the host has no way out by IPv6.",
			sysctlCommand("ipv6/conf/all/disable_ipv6", "0"), "IPv6 is turned off on this host"))
	}
	return one(ok("the kernel has IPv6"))
}

// sctp asks for connection tracking of SCTP, without which its ports cannot be
// published.
func sctp(_ context.Context, in Input) ([]control.Finding, error) {
	_, err := in.Links.Sysctl("netfilter/nf_conntrack_sctp_timeout_established")
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := in.Links.Sysctl("netfilter/nf_conntrack_max"); errors.Is(err, fs.ErrNotExist) {
			return one(ok("connection tracking is not in use yet"))
		}
		return one(warn("SCTP ports cannot be published.", "modprobe nf_conntrack_proto_sctp", "the kernel does not track SCTP connections"))
	}
	if err != nil {
		return nil, err
	}
	return one(ok("the kernel tracks SCTP connections"))
}

// bridgeNetfilter tells whether bridged packets pass the rules for routed ones.
func bridgeNetfilter(_ context.Context, in Input) ([]control.Finding, error) {
	value, err := in.Links.Sysctl("bridge/bridge-nf-call-iptables")
	if errors.Is(err, fs.ErrNotExist) {
		return one(ok("br_netfilter is not loaded: packets within a network are not filtered"))
	}
	if err != nil {
		return nil, err
	}
	six, err := in.Links.Sysctl("bridge/bridge-nf-call-ip6tables")
	if err != nil {
		return nil, err
	}
	return one(ok("sysctl net/bridge/bridge-nf-call-iptables is %s and -ip6tables is %s: Berth works with either", value, six))
}

// reversePath asks whether answers that take another way than the kernel expects
// are thrown away.
func reversePath(_ context.Context, in Input) ([]control.Finding, error) {
	routes, err := in.Links.Routes()
	if err != nil {
		return nil, err
	}
	uplinks := map[int]bool{}
	for _, r := range routes {
		if r.Link != 0 && r.Dst.Bits() == 0 && r.Dst.Addr().Is4() {
			uplinks[r.Link] = true
		}
	}
	if len(uplinks) < 2 {
		return one(ok("there is one way out at most, which reverse path filtering does not mind"))
	}
	links, err := in.Links.List()
	if err != nil {
		return nil, err
	}
	general, err := in.Links.Sysctl("ipv4/conf/all/rp_filter")
	if err != nil {
		return nil, err
	}
	var out []control.Finding
	for _, l := range links {
		if !uplinks[l.Index] {
			continue
		}
		path := "ipv4/conf/" + l.Name + "/rp_filter"
		// The stricter of both holds: 2 is loose, and wins over 1.
		value, err := in.Links.Sysctl(path)
		if err == nil && max(value, general) == "1" {
			out = append(out, warn("The host has default routes over several links: packets from outside to published ports that come by another link than the answer takes are dropped.",
				sysctlCommand(path, "2"), "reverse path filtering of link %q is strict", l.Name))
		}
	}
	if len(out) == 0 {
		out = append(out, ok("reverse path filtering of the links to outside is not strict"))
	}
	return out, nil
}
