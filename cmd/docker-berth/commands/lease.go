package commands

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/docker/docker/api/types/filters"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) leaseCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "lease", Short: "Manage the addresses of Berth's networks", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.leaseListCommand(), a.leaseInspectCommand(), a.leaseReserveCommand(), a.leaseReleaseCommand())
	return cmd
}

func (a *app) leaseListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List addresses that are not simply free", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listLeases(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display addresses", "state=conflict", "network", "pool", "state", "key", "container", "address", "reserved")
	return cmd
}

func (a *app) listLeases(ctx context.Context, o *listOptions) error {
	args, err := o.filters()
	if err != nil {
		return err
	}
	subnets, err := addressFilter(args)
	if err != nil {
		return err
	}
	reserved, err := args.GetBoolOrDefault("reserved", false)
	if err != nil {
		return fault.Invalid("filter reserved=%s: want true or false", strings.Join(args.Get("reserved"), ", "))
	}
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	leases, err := client.Leases(ctx, "")
	if err != nil {
		return err
	}
	var pools []control.Pool
	if args.Contains("pool") {
		if pools, err = client.Pools(ctx); err != nil {
			return err
		}
	}
	view := a.look(ctx)
	leases = slices.DeleteFunc(leases, func(l control.Lease) bool {
		c := containerOf(l, view)
		return !matches(args, "network", l.NetworkID, view.Network(l.NetworkID)) || !inPool(args, pools, l.PoolID) ||
			!args.ExactMatch("state", string(l.State)) || !matchesKey(args, l.Key) || !matches(args, "container", c.ID, c.Name) ||
			!within(subnets, l.Addr) || args.Contains("reserved") && l.Reserved != reserved
	})
	slices.SortStableFunc(leases, func(x, y control.Lease) int {
		return cmp.Or(compareNames(view.Network(x.NetworkID), view.Network(y.NetworkID)), cmp.Compare(x.NetworkID, y.NetworkID), x.Addr.Compare(y.Addr))
	})
	rows := make([]formatter.SubContext, 0, len(leases))
	for _, l := range leases {
		rows = append(rows, &leaseRow{l: l, c: containerOf(l, view), network: view.Network(l.NetworkID), o: o})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Address}}\t{{.Network}}\t{{.Container}}\t{{.State}}\t{{.Key}}\t{{.MAC}}\t{{.Expires}}\t{{.Since}}`,
		quiet: "{{.Address}}",
		header: formatter.SubHeaderContext{
			"Address": "ADDRESS", "Network": "NETWORK", "NetworkID": "NETWORK ID", "Container": "CONTAINER", "ContainerID": "CONTAINER ID",
			"State": "STATE", "Key": "KEY", "MAC": "MAC ADDRESS", "Expires": "EXPIRES", "ExpiresAt": "EXPIRES AT", "Since": "SINCE", "SinceAt": "SINCE",
			"Reserved": "RESERVED", "Pinned": "PINNED", "DHCP": "DHCP", "DHCPServer": "DHCP SERVER", "EndpointID": "ENDPOINT ID", "PoolID": "POOL ID",
		},
	}, rows)
}

// containerOf is the container that has an address, or else the one by name that it
// is kept for, whose ID is not known.
func containerOf(l control.Lease, view engine.View) engine.Container {
	c := view.Containers[l.EndpointID]
	if c.Name == "" && l.State != control.LeaseConflict && !control.IsMAC(l.Key) {
		c.Name = l.Key
	}
	return c
}

// addressFilter returns the subnets that the filter "address" names.
func addressFilter(args filters.Args) ([]netip.Prefix, error) {
	var subnets []netip.Prefix
	for _, value := range args.Get("address") {
		subnet, err := netip.ParsePrefix(value)
		if err != nil {
			addr, err := netip.ParseAddr(value)
			if err != nil {
				return nil, fault.Invalid("filter address=%s: want an address or a subnet, as 10.0.0.0/24", value)
			}
			subnet = netip.PrefixFrom(addr, addr.BitLen())
		}
		subnets = append(subnets, subnet)
	}
	return subnets, nil
}

// within reports whether one of the subnets has the address, or whether there are
// none to choose from.
func within(subnets []netip.Prefix, addr netip.Addr) bool {
	return len(subnets) == 0 || slices.ContainsFunc(subnets, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// inPool reports whether the filter "pool" has the pool: by the beginning of its ID,
// its subnet or its range.
func inPool(args filters.Args, pools []control.Pool, id string) bool {
	if args.FuzzyMatch("pool", id) {
		return true
	}
	return slices.ContainsFunc(pools, func(p control.Pool) bool {
		return p.ID == id && (args.ExactMatch("pool", p.Prefix.String()) || p.Range.IsValid() && args.ExactMatch("pool", p.Range.String()))
	})
}

// matchesKey reports whether the filter "key" has the key: a part of a name, or a
// MAC address in any form.
func matchesKey(args filters.Args, key string) bool {
	return args.Match("key", key) || slices.ContainsFunc(args.Get("key"), func(value string) bool {
		want, err := control.LeaseKey(value)
		return err == nil && want == key
	})
}

// leaseRow is a lease in a list. Its methods are the fields of templates.
type leaseRow struct {
	formatter.HeaderContext
	l       control.Lease
	c       engine.Container
	network string
	o       *listOptions
}

// MarshalJSON gives all fields.
func (r *leaseRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Address is the lease's.
func (r *leaseRow) Address() string { return r.l.Addr.String() }

// Network is the network's name, or its ID when Docker does not know it.
func (r *leaseRow) Network() string { return named(r.network, r.l.NetworkID) }

// NetworkID is the network's ID.
func (r *leaseRow) NetworkID() string { return r.o.id(r.l.NetworkID) }

// Container is the name of the container that has the address or that it is kept for.
func (r *leaseRow) Container() string { return r.c.Name }

// ContainerID is the ID of the container that has the address.
func (r *leaseRow) ContainerID() string { return r.o.id(r.c.ID) }

// State is gateway, aux, active, pending, released, quarantined, reserved or conflict.
func (r *leaseRow) State() string { return string(r.l.State) }

// Key is what the address is kept for.
func (r *leaseRow) Key() string { return r.l.Key }

// MAC is that of the endpoint, or of whoever else uses the address.
func (r *leaseRow) MAC() string { return r.l.MAC }

// Expires is the time until the state ends, and where DHCP is with it.
func (r *leaseRow) Expires() string {
	left := until(r.l.Until)
	switch {
	case r.l.DHCP == nil:
		return left
	case left == "":
		return "dhcp " + r.DHCP()
	default:
		return left + " (dhcp " + r.DHCP() + ")"
	}
}

// ExpiresAt is the time when the state ends in the form of RFC 3339.
func (r *leaseRow) ExpiresAt() string { return at(r.l.Until) }

// Since is the time since the state is that.
func (r *leaseRow) Since() string { return ago(r.l.Since) }

// SinceAt is that time in the form of RFC 3339.
func (r *leaseRow) SinceAt() string { return at(r.l.Since) }

// Reserved says that an operator keeps the address for the key.
func (r *leaseRow) Reserved() bool { return r.l.Reserved }

// Pinned says that the user asked for this very address.
func (r *leaseRow) Pinned() bool { return r.l.Pinned }

// DHCP is the state of the lease from the LAN's server; "" when there is none.
func (r *leaseRow) DHCP() string {
	if r.l.DHCP == nil {
		return ""
	}
	return string(r.l.DHCP.State)
}

// DHCPServer is the server's address; "" when there is none.
func (r *leaseRow) DHCPServer() string {
	if r.l.DHCP == nil || !r.l.DHCP.Server.IsValid() {
		return ""
	}
	return r.l.DHCP.Server.String()
}

// EndpointID is the ID of the endpoint that has the address.
func (r *leaseRow) EndpointID() string { return r.o.id(r.l.EndpointID) }

// PoolID is the ID of the address's pool.
func (r *leaseRow) PoolID() string { return r.l.PoolID }

func (a *app) leaseInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] NETWORK ADDRESS [ADDRESS...]", Short: "Display what Berth knows of addresses", Args: cli.RequiresMinArgs(2),
		ValidArgsFunction: a.completeLeases(func(control.Lease) bool { return true }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspectLeases(cmd.Context(), args[0], args[1:], format)
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

// leaseDetail is a lease with the names that Docker knows.
type leaseDetail struct {
	// Network is the name; "" when Docker does not know it.
	Network string
	// Container is the name of the one that has the address, or that it is kept for;
	// ContainerID is "" for the latter.
	Container, ContainerID string
	control.Lease
}

func (a *app) inspectLeases(ctx context.Context, network string, addresses []string, format string) error {
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	networks, err := client.Networks(ctx)
	if err != nil {
		return err
	}
	view := a.look(ctx)
	n, err := pickNetwork(networks, view, network)
	if err != nil {
		return err
	}
	leases, err := client.Leases(ctx, n.ID)
	if err != nil {
		return err
	}
	return inspect.Inspect(a.Docker.Out(), addresses, format, func(ref string) (any, []byte, error) {
		addr, err := parseAddress(ref)
		if err != nil {
			return nil, nil, err
		}
		i := slices.IndexFunc(leases, func(l control.Lease) bool { return l.Addr == addr })
		if i < 0 {
			return nil, nil, fault.NotFound("address %s is free on network %s, or not one of its pools'", addr, network)
		}
		c := containerOf(leases[i], view)
		return leaseDetail{Network: view.Network(n.ID), Container: c.Name, ContainerID: c.ID, Lease: leases[i]}, nil, nil
	})
}

// parseAddress reads an address that a user gives.
func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, fault.Invalid("address %q: want an IP address, as 10.0.0.2", text)
	}
	return addr.Unmap(), nil
}
