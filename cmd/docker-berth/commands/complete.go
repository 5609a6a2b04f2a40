package commands

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

// completeTime bounds the looking for names: a shell is waiting.
const completeTime = 3 * time.Second

// completeNetworks offers the names of Berth's networks that are not named yet.
func (a *app) completeNetworks(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	names, _ := a.namesOf(cmd.Context())
	return slices.DeleteFunc(names, func(name string) bool { return slices.Contains(args, name) }), cobra.ShellCompDirectiveNoFileComp
}

// completeContainersAndNetworks offers one name of a Berth network, or of a running
// container on one.
func (a *app) completeContainersAndNetworks(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	networks, containers := a.namesOf(cmd.Context())
	return slices.Concat(containers, networks), cobra.ShellCompDirectiveNoFileComp
}

// completeLeases offers a network, and then those of its addresses that are offered
// and are not named yet.
func (a *app) completeLeases(offered func(control.Lease) bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return a.completeNetworks(cmd, args, "")
		}
		var addresses []string
		for _, l := range a.leasesOf(cmd.Context(), args[0]) {
			if address := l.Addr.String(); offered(l) && !slices.Contains(args, address) {
				addresses = append(addresses, address)
			}
		}
		return addresses, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeReserve offers a network, an address that was given to a container, and
// the containers, the one that had the address first.
func (a *app) completeReserve(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const key = 2
	switch {
	case len(args) < key:
		return a.completeLeases(func(l control.Lease) bool {
			return !l.Reserved && (releasable(l) || l.State == control.LeaseActive) && l.State != control.LeaseConflict
		})(cmd, args, "")
	case len(args) > key:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	_, containers := a.namesOf(cmd.Context())
	for _, l := range a.leasesOf(cmd.Context(), args[0]) {
		if l.Key != "" && l.Addr.String() == args[1] {
			containers = slices.DeleteFunc(containers, func(name string) bool { return name == l.Key })
			containers = slices.Insert(containers, 0, l.Key)
		}
	}
	return containers, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// leasesOf returns the leases of the network that ref names, by address; none when
// something does not answer.
func (a *app) leasesOf(ctx context.Context, ref string) []control.Lease {
	ctx, cancel := context.WithTimeout(ctx, completeTime)
	defer cancel()
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return nil
	}
	defer client.Close()
	networks, err := client.Networks(ctx)
	if err != nil {
		return nil
	}
	view, _ := a.tryLook(ctx) // an ID needs no name
	n, err := pickNetwork(networks, view, ref)
	if err != nil {
		return nil
	}
	leases, err := client.Leases(ctx, n.ID)
	if err != nil {
		return nil
	}
	slices.SortFunc(leases, func(x, y control.Lease) int { return x.Addr.Compare(y.Addr) })
	return leases
}

// namesOf returns the names of Berth's networks and of the running containers on
// them; none when something does not answer.
func (a *app) namesOf(ctx context.Context) (networks, containers []string) {
	ctx, cancel := context.WithTimeout(ctx, completeTime)
	defer cancel()
	ours, err := a.networks(ctx)
	if err != nil {
		return nil, nil
	}
	view, err := a.tryLook(ctx)
	if err != nil {
		return nil, nil
	}
	on := make(map[string]bool)
	for _, n := range sorted(ours, view) {
		if name := view.Network(n.ID); name != "" {
			networks = append(networks, name)
			on[n.ID] = true
		}
	}
	for endpoint, c := range view.Containers {
		if on[view.On[endpoint]] {
			containers = append(containers, c.Name)
		}
	}
	slices.Sort(containers)
	return networks, slices.Compact(containers)
}

// completePlugins offers the names of the Berth plugins that are enabled.
func (a *app) completePlugins(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTime)
	defer cancel()
	var names []string
	plugins, _ := engine.Plugins(ctx, a.Docker.API(), a.SocketDir)
	daemons, _ := engine.Daemons(ctx, a.SocketDir)
	for _, p := range slices.Concat(plugins, daemons) {
		if p.Enabled {
			names = append(names, p.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
