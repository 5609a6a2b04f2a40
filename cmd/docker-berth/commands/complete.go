package commands

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
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
