package commands

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

func (a *app) endpointCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "endpoint", Short: "Manage the places of containers on Berth's networks", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.endpointListCommand(), a.endpointCollectCommand())
	return cmd
}

func (a *app) endpointListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List endpoints", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listEndpoints(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display endpoint IDs", "network=front", "id", "network", "container", "state")
	return cmd
}

func (a *app) listEndpoints(ctx context.Context, o *listOptions) error {
	args, client, err := a.filtered(ctx, o, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	endpoints, err := client.Endpoints(ctx, "")
	if err != nil {
		return err
	}
	view := a.look(ctx)
	endpoints = slices.DeleteFunc(endpoints, func(ep control.Endpoint) bool {
		return !args.FuzzyMatch("id", ep.ID) || !matches(args, "network", ep.NetworkID, view.Network(ep.NetworkID)) ||
			!matches(args, "container", view.Containers[ep.ID].ID, view.Container(ep.ID)) || !args.ExactMatch("state", string(ep.State))
	})
	return o.write(a.Docker.Out(), layout{
		table:  `{{.ID}}\t{{.Container}}\t{{.Network}}\t{{.IPv4}}\t{{.IPv6}}\t{{.State}}\t{{.Created}}`,
		quiet:  "{{.ID}}",
		header: endpointHeader,
	}, endpointRows(endpoints, view, o))
}

var endpointHeader = formatter.SubHeaderContext{
	"ID": "ENDPOINT ID", "Container": "CONTAINER", "Network": "NETWORK", "IPv4": "IPV4", "IPv6": "IPV6", "MAC": "MAC ADDRESS",
	"State": "STATE", "Created": "CREATED", "CreatedAt": "CREATED AT", "Gone": "GONE", "GoneSince": "GONE SINCE",
	"HostLink": "HOST LINK", "Ports": "PORTS", "NetworkID": "NETWORK ID", "ContainerID": "CONTAINER ID",
}

func endpointRows(endpoints []control.Endpoint, view engine.View, o *listOptions) []formatter.SubContext {
	slices.SortStableFunc(endpoints, func(x, y control.Endpoint) int {
		if c := compareNames(view.Network(x.NetworkID), view.Network(y.NetworkID)); c != 0 {
			return c
		}
		return compareNames(view.Container(x.ID), view.Container(y.ID))
	})
	rows := make([]formatter.SubContext, 0, len(endpoints))
	for _, ep := range endpoints {
		rows = append(rows, &endpointRow{ep: ep, c: view.Containers[ep.ID], network: view.Network(ep.NetworkID), o: o})
	}
	return rows
}

// endpointRow is an endpoint in a list. Its methods are the fields of templates.
type endpointRow struct {
	formatter.HeaderContext
	ep      control.Endpoint
	c       engine.Container
	network string
	o       *listOptions
}

// MarshalJSON gives all fields.
func (r *endpointRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// ID is Docker's ID, new at every start of the container.
func (r *endpointRow) ID() string { return r.o.id(r.ep.ID) }

// Container is the container's name; "" when Docker does not know one.
func (r *endpointRow) Container() string { return r.c.Name }

// ContainerID is the container's ID.
func (r *endpointRow) ContainerID() string { return r.o.id(r.c.ID) }

// Network is the network's name, or its ID when Docker does not know it.
func (r *endpointRow) Network() string { return named(r.network, r.ep.NetworkID) }

// NetworkID is the network's ID.
func (r *endpointRow) NetworkID() string { return r.o.id(r.ep.NetworkID) }

// IPv4 is the address without the prefix length.
func (r *endpointRow) IPv4() string { return bare(r.ep.IPv4) }

// IPv6 is the address without the prefix length.
func (r *endpointRow) IPv6() string { return bare(r.ep.IPv6) }

// MAC is that of the container's link.
func (r *endpointRow) MAC() string { return r.ep.MAC }

// HostLink is the name of the link on the host.
func (r *endpointRow) HostLink() string { return r.ep.HostLink }

// State is alive, gone, creating or removing.
func (r *endpointRow) State() string { return string(r.ep.State) }

// Created is the time since then.
func (r *endpointRow) Created() string { return ago(r.ep.Created) }

// CreatedAt is the time in the form of RFC 3339.
func (r *endpointRow) CreatedAt() string { return at(r.ep.Created) }

// Gone is the time since the container was first seen to be gone.
func (r *endpointRow) Gone() string { return ago(r.ep.GoneSince) }

// GoneSince is that time in the form of RFC 3339.
func (r *endpointRow) GoneSince() string { return at(r.ep.GoneSince) }

// Ports are the published ports as `docker ps` has them.
func (r *endpointRow) Ports() string {
	list := make([]string, 0, len(r.ep.Ports))
	for _, p := range r.ep.Ports {
		list = append(list, mapping(p))
	}
	return strings.Join(list, ", ")
}

func bare(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.Addr().String()
}

func (a *app) endpointCollectCommand() *cobra.Command {
	var (
		o      listOptions
		dryRun bool
	)
	cmd := &cobra.Command{
		Use: "gc [OPTIONS]", Short: "Remove endpoints whose container is gone", Args: cli.NoArgs,
		Long: "Remove endpoints whose container is gone although Docker did not say so, and print\n" +
			"their IDs. Berth does so by itself after some minutes. An endpoint whose link is in a\n" +
			"container, or was made in the last minutes, always stays.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.collectEndpoints(cmd.Context(), &o, dryRun) },
	}
	o.install(cmd, "Only display endpoint IDs", "network=front", "network")
	cmd.Flags().BoolVarP(&dryRun, "dry-run", "n", false, "Only list what would be removed")
	return cmd
}

func (a *app) collectEndpoints(ctx context.Context, o *listOptions, dryRun bool) error {
	args, client, err := a.filtered(ctx, o, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	view := a.look(ctx)
	requests := []control.CollectRequest{{DryRun: dryRun}}
	if args.Contains("network") {
		networks, err := client.Networks(ctx)
		if err != nil {
			return err
		}
		requests = nil
		for _, ref := range args.Get("network") {
			n, err := pickNetwork(networks, view, ref)
			if err != nil {
				return err
			}
			requests = append(requests, control.CollectRequest{Network: n.ID, DryRun: dryRun})
		}
	}
	var (
		collected []control.Endpoint
		errs      []error
	)
	for _, req := range requests {
		report, err := client.Collect(ctx, req)
		errs = append(errs, err)
		collected = append(collected, report.Endpoints...)
		for _, id := range slices.Sorted(maps.Keys(report.Failed)) {
			errs = append(errs, fmt.Errorf("endpoint %s: %s", formatter.TruncateID(id), report.Failed[id]))
		}
	}
	if !o.quiet && len(collected) == 0 && errors.Join(errs...) == nil {
		fmt.Fprintln(a.Docker.Err(), "No endpoint without a container.")
		return nil
	}
	return errors.Join(append(errs, o.write(a.Docker.Out(), layout{
		table:  `{{.ID}}\t{{.Network}}\t{{.IPv4}}\t{{.IPv6}}\t{{.Gone}}`,
		quiet:  "{{.ID}}",
		header: endpointHeader,
	}, endpointRows(collected, view, o)))...)
}
