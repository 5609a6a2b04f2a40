package commands

import (
	"cmp"
	"context"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/docker/api/types/filters"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) poolCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "Look at the ranges that addresses come from", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.poolListCommand())
	return cmd
}

func (a *app) poolListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List pools and how full they are", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listPools(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display pool IDs", "family=ipv6", "network", "parent", "family")
	return cmd
}

func (a *app) listPools(ctx context.Context, o *listOptions) error {
	args, err := o.filters()
	if err != nil {
		return err
	}
	families, err := familyFilter(args)
	if err != nil {
		return err
	}
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	pools, err := client.Pools(ctx)
	if err != nil {
		return err
	}
	view := a.look(ctx)
	pools = slices.DeleteFunc(pools, func(p control.Pool) bool {
		return !matches(args, "network", p.NetworkID, view.Network(p.NetworkID)) || !args.ExactMatch("parent", p.Parent) ||
			len(families) > 0 && !slices.Contains(families, familyOf(p))
	})
	slices.SortStableFunc(pools, func(x, y control.Pool) int {
		return cmp.Or(compareNames(view.Network(x.NetworkID), view.Network(y.NetworkID)), cmp.Compare(x.NetworkID, y.NetworkID),
			x.Prefix.Addr().Compare(y.Prefix.Addr()), cmp.Compare(x.Prefix.Bits(), y.Prefix.Bits()))
	})
	rows := make([]formatter.SubContext, 0, len(pools))
	for _, p := range pools {
		rows = append(rows, &poolRow{p: p, network: view.Network(p.NetworkID), o: o})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Subnet}}\t{{.Range}}\t{{.Network}}\t{{.Parent}}\t{{.Size}}\t{{.Used}}\t{{.Quarantined}}\t{{.Conflicts}}\t{{.Free}}`,
		quiet: "{{.ID}}",
		header: formatter.SubHeaderContext{
			"ID": "POOL ID", "Subnet": "SUBNET", "Range": "RANGE", "Network": "NETWORK", "NetworkID": "NETWORK ID", "Parent": "PARENT",
			"Family": "FAMILY", "Size": "SIZE", "Used": "USED", "Reserved": "RESERVED", "Quarantined": "QUARANTINED", "Released": "RELEASED",
			"Conflicts": "CONFLICTS", "Free": "FREE", "Sticky": "STICKY", "Quarantine": "QUARANTINE", "Probe": "PROBE", "Conflict": "CONFLICT",
			"Exclude": "EXCLUDE", "DHCP": "DHCP", "Created": "CREATED", "CreatedAt": "CREATED AT",
		},
	}, rows)
}

// The address families as they are shown.
const (
	ipv4 = "ipv4"
	ipv6 = "ipv6"
)

func familyOf(p control.Pool) string {
	if p.Prefix.Addr().Is4() {
		return ipv4
	}
	return ipv6
}

// familyFilter returns the families that the filter "family" names.
func familyFilter(args filters.Args) (families []string, _ error) {
	for _, value := range args.Get("family") {
		switch value {
		case ipv4, "4":
			families = append(families, ipv4)
		case ipv6, "6":
			families = append(families, ipv6)
		default:
			return nil, fault.Invalid("filter family=%s: want ipv4 or ipv6", value)
		}
	}
	return families, nil
}

// A count is a number of addresses. It is one in JSON and for the functions of
// templates too.
type count uint64

// String is exact for all that IPv4 has, and shorter for IPv6.
func (c count) String() string {
	switch {
	case c == math.MaxUint64:
		return "2^64"
	case c > 1<<32:
		return strconv.FormatFloat(float64(c), 'g', 3, 64)
	default:
		return strconv.FormatUint(uint64(c), 10)
	}
}

// poolRow is a pool in a list. Its methods are the fields of templates.
type poolRow struct {
	formatter.HeaderContext
	p       control.Pool
	network string
	o       *listOptions
}

// MarshalJSON gives all fields.
func (r *poolRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// ID is what Docker calls the pool.
func (r *poolRow) ID() string { return r.p.ID }

// Subnet is all that the pool has.
func (r *poolRow) Subnet() string { return r.p.Prefix.String() }

// Range is what containers get of it; "" is all.
func (r *poolRow) Range() string {
	if !r.p.Range.IsValid() {
		return ""
	}
	return r.p.Range.String()
}

// Network is the network's name, or its ID when Docker does not know it.
func (r *poolRow) Network() string { return named(r.network, r.p.NetworkID) }

// NetworkID is the network's ID.
func (r *poolRow) NetworkID() string { return r.o.id(r.p.NetworkID) }

// Parent is the link whose LAN has the addresses; "" is none.
func (r *poolRow) Parent() string { return r.p.Parent }

// Family is ipv4 or ipv6.
func (r *poolRow) Family() string { return familyOf(r.p) }

// Size is how many addresses there are for containers.
func (r *poolRow) Size() count { return count(r.p.Size) }

// Used is how many are held.
func (r *poolRow) Used() count { return count(r.p.Used) }

// Reserved is how many are kept for a key that does not use them.
func (r *poolRow) Reserved() count { return count(r.p.Reserved) }

// Quarantined is how many were given back moments ago.
func (r *poolRow) Quarantined() count { return count(r.p.Quarantined) }

// Released is how many of the free ones are kept for a key.
func (r *poolRow) Released() count { return count(r.p.Released) }

// Conflicts is how many are used by somebody else on the LAN.
func (r *poolRow) Conflicts() count { return count(r.p.Conflicts) }

// Free is how many can be had at once.
func (r *poolRow) Free() count { return count(r.p.Free) }

// Sticky says that an address is kept for the key that had it.
func (r *poolRow) Sticky() bool { return r.p.Sticky }

// Quarantine is how long nobody else gets an address that was given back.
func (r *poolRow) Quarantine() string { return r.p.Quarantine.String() }

// Probe is off, fast or full.
func (r *poolRow) Probe() string { return r.p.Probe }

// Conflict is refuse or warn.
func (r *poolRow) Conflict() string { return r.p.Conflict }

// Exclude is what nobody gets, separated by commas.
func (r *poolRow) Exclude() string { return strings.Join(r.p.Exclude, ", ") }

// DHCP says that the LAN's DHCP server gives the addresses.
func (r *poolRow) DHCP() bool { return r.p.DHCP }

// Created is the time since Docker asked for the pool.
func (r *poolRow) Created() string { return ago(r.p.Since) }

// CreatedAt is that time in the form of RFC 3339.
func (r *poolRow) CreatedAt() string { return at(r.p.Since) }
