package commands

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/fvbommel/sortorder"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) networkCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "network", Short: "Manage Berth's networks", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.networkListCommand(), a.networkInspectCommand(), a.networkPruneCommand())
	return cmd
}

func (a *app) networkListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List Berth's networks", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listNetworks(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display network IDs", "state=broken", "id", "name", "mode", "bridge", "parent", "state")
	return cmd
}

func (a *app) listNetworks(ctx context.Context, o *listOptions) error {
	args, err := o.filters()
	if err != nil {
		return err
	}
	networks, err := a.networks(ctx)
	if err != nil {
		return err
	}
	view := a.look(ctx)
	var rows []formatter.SubContext
	for _, n := range sorted(networks, view) {
		name := view.Network(n.ID)
		if args.FuzzyMatch("id", n.ID) && args.Match("name", name) && args.ExactMatch("mode", n.Mode) &&
			args.ExactMatch("bridge", linkOf(n)) && args.ExactMatch("parent", n.Parent) && args.ExactMatch("state", string(n.State)) {
			rows = append(rows, &networkRow{n: n, name: name, o: o})
		}
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.ID}}\t{{.Name}}\t{{.Mode}}\t{{.Bridge}}\t{{.Subnets}}\t{{.Endpoints}}\t{{.Ports}}\t{{.State}}`,
		quiet: "{{.ID}}",
		header: formatter.SubHeaderContext{
			"ID": "NETWORK ID", "Name": "NAME", "Mode": "MODE", "Bridge": "BRIDGE", "Subnets": "SUBNETS",
			"Endpoints": "ENDPOINTS", "Ports": "PORTS", "State": "STATE", "Created": "CREATED", "CreatedAt": "CREATED AT",
			"Internal": "INTERNAL", "Gateway": "GATEWAY MODE", "Parent": "PARENT", "LANType": "LAN TYPE", "HostAccess": "HOST ACCESS", "Uplink": "UPLINK",
		},
	}, rows)
}

// networks asks the daemon that is meant for all networks.
func (a *app) networks(ctx context.Context) ([]control.Network, error) {
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Networks(ctx)
}

// sorted returns networks by name as people count, those without a name last.
func sorted(networks []control.Network, view engine.View) []control.Network {
	slices.SortStableFunc(networks, func(x, y control.Network) int {
		return compareNames(view.Network(x.ID), view.Network(y.ID))
	})
	return networks
}

// linkOf is the name of the link that joins a network's containers.
func linkOf(n control.Network) string { return cmp.Or(n.Parent, n.Bridge) }

func compareNames(x, y string) int {
	switch {
	case x == y:
		return 0
	case x == "" || y == "":
		return cmp.Compare(len(y), len(x))
	case sortorder.NaturalLess(x, y):
		return -1
	default:
		return 1
	}
}

// networkRow is a network in a list. Its methods are the fields of templates.
type networkRow struct {
	formatter.HeaderContext
	n    control.Network
	name string
	o    *listOptions
}

// MarshalJSON gives all fields.
func (r *networkRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// ID is Docker's ID.
func (r *networkRow) ID() string { return r.o.id(r.n.ID) }

// Name is Docker's name; "" when Docker does not know the network.
func (r *networkRow) Name() string { return r.name }

// Mode is how containers are attached.
func (r *networkRow) Mode() string { return r.n.Mode }

// Bridge is the name of the link that containers are joined by: the bridge, or in
// other modes the parent.
func (r *networkRow) Bridge() string { return linkOf(r.n) }

// Parent is the link whose LAN the containers are on; "" is none.
func (r *networkRow) Parent() string { return r.n.Parent }

// LANType is what macvlan or ipvlan does with the parent; "" in other modes.
func (r *networkRow) LANType() string { return r.n.LANType }

// HostAccess says that a macvlan network's containers and the host reach each other.
func (r *networkRow) HostAccess() bool { return r.n.HostAccess }

// Uplink is the link that joins the bridge to a LAN; "" is none.
func (r *networkRow) Uplink() string { return r.n.Uplink }

// Subnets are separated by commas.
func (r *networkRow) Subnets() string {
	list := make([]string, 0, len(r.n.Subnets))
	for _, s := range r.n.Subnets {
		list = append(list, s.Pool.String())
	}
	return strings.Join(list, ", ")
}

// Gateway is the gateway mode of each family that the network has.
func (r *networkRow) Gateway() string {
	modes := []string{r.n.IPv4.GatewayMode, r.n.IPv6.GatewayMode}
	modes = slices.DeleteFunc(modes, func(mode string) bool { return mode == "" })
	return strings.Join(slices.Compact(modes), ", ")
}

// Internal says that there is no way out.
func (r *networkRow) Internal() bool { return r.n.Internal }

// Endpoints is how many there are.
func (r *networkRow) Endpoints() int { return r.n.Endpoints }

// Ports is how many are published.
func (r *networkRow) Ports() int { return r.n.Ports }

// State is ready, broken, creating or removing.
func (r *networkRow) State() string { return string(r.n.State) }

// Created is the time since then.
func (r *networkRow) Created() string { return ago(r.n.Created) }

// CreatedAt is the time in the form of RFC 3339.
func (r *networkRow) CreatedAt() string { return at(r.n.Created) }

func (a *app) networkInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] NETWORK [NETWORK...]", Short: "Display what Berth knows of networks", Args: cli.RequiresMinArgs(1),
		ValidArgsFunction: a.completeNetworks,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.inspectNetworks(cmd.Context(), args, format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

// networkDetail is a network with all that is on it.
type networkDetail struct {
	// Name is Docker's.
	Name string
	control.Network
	// Containers are the endpoints with their containers.
	Containers []endpointDetail
}

// endpointDetail is an endpoint with its container.
type endpointDetail struct {
	// Container is the name; both are "" when Docker knows no such container.
	Container, ContainerID string
	control.Endpoint
}

func (a *app) inspectNetworks(ctx context.Context, refs []string, format string) error {
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
	return inspect.Inspect(a.Docker.Out(), refs, format, func(ref string) (any, []byte, error) {
		n, err := pickNetwork(networks, view, ref)
		if err != nil {
			return nil, nil, err
		}
		detail := networkDetail{Name: view.Network(n.ID), Network: n, Containers: []endpointDetail{}}
		endpoints, err := client.Endpoints(ctx, n.ID)
		if err != nil {
			return nil, nil, err
		}
		for _, ep := range endpoints {
			c := view.Containers[ep.ID]
			detail.Containers = append(detail.Containers, endpointDetail{Container: c.Name, ContainerID: c.ID, Endpoint: ep})
		}
		return detail, nil, nil
	})
}

// pickNetwork returns the network of a name, an ID or the beginning of one.
func pickNetwork(networks []control.Network, view engine.View, ref string) (control.Network, error) {
	var found []control.Network
	for _, n := range networks {
		if n.ID == ref || view.Network(n.ID) == ref {
			return n, nil
		}
		if strings.HasPrefix(n.ID, ref) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		for _, n := range view.Networks {
			if n.Name == ref || n.ID == ref {
				return control.Network{}, fault.NotFound("network %s has the driver %s: it is not one of this Berth plugin's", ref, n.Driver)
			}
		}
		return control.Network{}, fault.NotFound("network %s not found", ref)
	default:
		return control.Network{}, fault.Conflict("network %s is one of several: give more digits of the ID", ref)
	}
}

func (a *app) networkPruneCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "prune [OPTIONS]", Short: "Remove networks that Docker does not know any more", Args: cli.NoArgs,
		Long: "Remove networks that Docker does not know any more, with their bridges and subnets.\n\n" +
			"Docker does not tell a plugin of what is removed while it is disabled. Networks with\n" +
			"running containers and networks made in the last minutes stay. Without --force the\n" +
			"networks are only listed.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.pruneNetworks(cmd.Context(), force) },
	}
	cmd.Flags().BoolVar(&force, "force", false, "Remove them, not only list them")
	return cmd
}

func (a *app) pruneNetworks(ctx context.Context, force bool) error {
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	forgotten, err := a.forgotten(ctx, client)
	if err != nil {
		return err
	}
	if len(forgotten) == 0 {
		fmt.Fprintln(a.Docker.Err(), "Docker knows all networks of Berth.")
		return nil
	}
	if !force {
		fmt.Fprintf(a.Docker.Err(), "Docker does not know these networks of Berth; remove them with --force:\n")
		o := &listOptions{noTrunc: true}
		var rows []formatter.SubContext
		for _, n := range forgotten {
			rows = append(rows, &networkRow{n: n, o: o})
		}
		return o.write(a.Docker.Out(), layout{
			table:  `{{.ID}}\t{{.Bridge}}\t{{.Subnets}}\t{{.Endpoints}}\t{{.Created}}`,
			header: formatter.SubHeaderContext{"ID": "NETWORK ID", "Bridge": "BRIDGE", "Subnets": "SUBNETS", "Endpoints": "ENDPOINTS", "Created": "CREATED"},
		}, rows)
	}
	var errs []error
	for _, n := range forgotten {
		if err := client.RemoveNetwork(ctx, n.ID); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.Docker.Out(), n.ID)
	}
	return errors.Join(errs...)
}

// forgotten returns the networks that Docker does not know. Berth is asked first:
// whatever it has then and Docker has not is no network that is just being made,
// but for the moment that RemoveNetwork looks at.
func (a *app) forgotten(ctx context.Context, client *control.Client) ([]control.Network, error) {
	networks, err := client.Networks(ctx)
	if err != nil {
		return nil, err
	}
	view, err := a.tryLook(ctx)
	if err != nil {
		return nil, fault.Unavailable("which networks Docker has forgotten can only be told while it answers: %w", err)
	}
	return slices.DeleteFunc(networks, func(n control.Network) bool {
		_, known := view.Networks[n.ID]
		return known
	}), nil
}
