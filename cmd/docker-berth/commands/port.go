package commands

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) portCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "port [OPTIONS] [CONTAINER|NETWORK]", Short: "List published ports",
		Long: "List published ports, of all containers on Berth's networks or of one container or\n" +
			"network. The Docker command `docker port` cannot show those of a plugin's networks.",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeContainersAndNetworks,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.listPorts(cmd.Context(), args, &o) },
	}
	o.install(cmd, "Only display the ports, as `docker port` does", "proto=udp", "network", "container", "proto", "port")
	return cmd
}

func (a *app) listPorts(ctx context.Context, refs []string, o *listOptions) error {
	args, client, err := a.filtered(ctx, o, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	ports, err := client.Ports(ctx, "")
	if err != nil {
		return err
	}
	view := a.look(ctx)
	for _, ref := range refs {
		networks, err := client.Networks(ctx)
		if err != nil {
			return err
		}
		if ports, err = portsOf(ports, networks, view, ref); err != nil {
			return err
		}
	}
	ports = slices.DeleteFunc(ports, func(p control.Port) bool {
		return !matches(args, "network", p.NetworkID, view.Network(p.NetworkID)) || !args.ExactMatch("proto", p.Proto) ||
			!matches(args, "container", view.Containers[p.EndpointID].ID, view.Container(p.EndpointID)) ||
			!among(p, args.Get("port"))
	})
	slices.SortStableFunc(ports, func(x, y control.Port) int {
		if c := compareNames(view.Container(x.EndpointID), view.Container(y.EndpointID)); c != 0 {
			return c
		}
		return compareNames(view.Network(x.NetworkID), view.Network(y.NetworkID))
	})
	rows := make([]formatter.SubContext, 0, len(ports))
	for _, p := range ports {
		rows = append(rows, &portRow{p: p, c: view.Containers[p.EndpointID], network: view.Network(p.NetworkID), o: o})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Container}}\t{{.Network}}\t{{.Host}}\t{{.Target}}\t{{.Proto}}`,
		quiet: "{{.Mapping}}",
		header: formatter.SubHeaderContext{
			"Container": "CONTAINER", "ContainerID": "CONTAINER ID", "Network": "NETWORK", "NetworkID": "NETWORK ID", "EndpointID": "ENDPOINT ID",
			"Host": "HOST", "Target": "CONTAINER ADDRESS", "Proto": "PROTO", "Mapping": "PORT", "Proxied": "PROXIED",
			"HostIP": "HOST IP", "HostPort": "HOST PORT", "ContainerIP": "CONTAINER IP", "ContainerPort": "CONTAINER PORT", "Count": "COUNT",
		},
	}, rows)
}

// among reports whether p has one of the ports that clients use, or whether there
// are none to choose from.
func among(p control.Port, wanted []string) bool {
	first := int(p.HostPort)
	if !p.HostIP.IsValid() {
		first = int(p.ContainerPort)
	}
	return len(wanted) == 0 || slices.ContainsFunc(wanted, func(port string) bool {
		n, err := strconv.Atoi(port)
		return err == nil && n >= first && n < first+int(p.Count)
	})
}

// portsOf returns the ports of the container or network that ref names.
func portsOf(ports []control.Port, networks []control.Network, view engine.View, ref string) ([]control.Port, error) {
	endpoints := make(map[string]bool)
	containers := make(map[string]string)
	for endpoint, c := range view.Containers {
		if c.Name == ref || strings.HasPrefix(c.ID, ref) {
			endpoints[endpoint] = true
			containers[c.ID] = c.Name
		}
	}
	n, err := pickNetwork(networks, view, ref)
	switch {
	case len(containers) > 1:
		return nil, fault.Conflict("container %s is one of several: give more digits of the ID", ref)
	case len(containers) == 1 && err == nil:
		return nil, fault.Conflict("%s is a container and a network: say which with --filter container=%[1]s or --filter network=%[1]s", ref)
	case len(containers) == 0 && err != nil && view.Known:
		return nil, fault.NotFound("there is no running container and no Berth network %s", ref)
	case len(containers) == 0 && err != nil:
		return nil, err
	case len(containers) == 0:
		return slices.DeleteFunc(ports, func(p control.Port) bool { return p.NetworkID != n.ID }), nil
	default:
		return slices.DeleteFunc(ports, func(p control.Port) bool { return !endpoints[p.EndpointID] }), nil
	}
}

// portRow is published ports in a list. Its methods are the fields of templates.
type portRow struct {
	formatter.HeaderContext
	p       control.Port
	c       engine.Container
	network string
	o       *listOptions
}

// MarshalJSON gives all fields.
func (r *portRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Container is the container's name, or the endpoint's ID when Docker does not know it.
func (r *portRow) Container() string { return named(r.c.Name, r.p.EndpointID) }

// ContainerID is the container's ID.
func (r *portRow) ContainerID() string { return r.o.id(r.c.ID) }

// EndpointID is the endpoint's ID.
func (r *portRow) EndpointID() string { return r.o.id(r.p.EndpointID) }

// Network is the network's name, or its ID when Docker does not know it.
func (r *portRow) Network() string { return named(r.network, r.p.NetworkID) }

// NetworkID is the network's ID.
func (r *portRow) NetworkID() string { return r.o.id(r.p.NetworkID) }

// Host is the address and port on the host; "" when the container's own are reached.
func (r *portRow) Host() string {
	if !r.p.HostIP.IsValid() {
		return ""
	}
	return endpointOf(r.p.HostIP, r.p.HostPort, r.p.Count)
}

// Target is the container's address and port.
func (r *portRow) Target() string {
	return endpointOf(r.p.ContainerIP, r.p.ContainerPort, r.p.Count)
}

// Proto is tcp, udp or sctp.
func (r *portRow) Proto() string { return r.p.Proto }

// Mapping is the line of `docker port`: 80/tcp -> 0.0.0.0:8080.
func (r *portRow) Mapping() string {
	from := fmt.Sprintf("%s/%s", ports(r.p.ContainerPort, r.p.Count), r.p.Proto)
	if !r.p.HostIP.IsValid() {
		return from + " -> " + r.Target()
	}
	return from + " -> " + r.Host()
}

// Proxied says that the daemon carries the traffic from IPv6 to IPv4.
func (r *portRow) Proxied() bool { return r.p.Proxied }

// HostIP is the address on the host; "" when there is none.
func (r *portRow) HostIP() string {
	if !r.p.HostIP.IsValid() {
		return ""
	}
	return r.p.HostIP.String()
}

// HostPort is the first port on the host; 0 when there is none.
func (r *portRow) HostPort() int { return int(r.p.HostPort) }

// ContainerIP is the container's address.
func (r *portRow) ContainerIP() string { return r.p.ContainerIP.String() }

// ContainerPort is the first port of the container.
func (r *portRow) ContainerPort() int { return int(r.p.ContainerPort) }

// Count is how many ports follow one another.
func (r *portRow) Count() int { return int(r.p.Count) }

// mapping is a port as `docker ps` has it: 0.0.0.0:8080->80/tcp.
func mapping(p control.Port) string {
	to := ports(p.ContainerPort, p.Count) + "/" + p.Proto
	if !p.HostIP.IsValid() {
		return to
	}
	return endpointOf(p.HostIP, p.HostPort, p.Count) + "->" + to
}

func endpointOf(addr netip.Addr, first, count uint16) string {
	return net.JoinHostPort(addr.String(), ports(first, count))
}

func ports(first, count uint16) string {
	if count > 1 {
		return fmt.Sprintf("%d-%d", first, first+count-1)
	}
	return strconv.Itoa(int(first))
}
