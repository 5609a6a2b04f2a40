package commands

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/opts"
	"github.com/docker/docker/api/types/filters"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce"
)

// pruneOptions are the flags of `volume prune`.
type pruneOptions struct {
	all, force, dryRun bool
	filter             opts.FilterOpt
}

func (a *app) volumePruneCommand() *cobra.Command {
	o := pruneOptions{filter: opts.NewFilterOpt()}
	cmd := &cobra.Command{
		Use: "prune [OPTIONS]", Short: "Remove volumes that no container uses", Args: cli.NoArgs,
		Long: "Remove volumes of Berth that no container uses, stopped ones included, and print\n" +
			"their names; docker volume prune looks only at those of the driver local. Like that it\n" +
			"removes volumes that were never named, and with --all the others too.\n\n" +
			"Volumes that are protected, or mounted on another host, stay. What becomes of the data\n" +
			"is each volume's own matter (on-remove): most are in the trash afterwards.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.pruneVolumes(cmd.Context(), &o) },
	}
	set := cmd.Flags()
	set.BoolVarP(&o.all, "all", "a", false, "Also remove volumes that have a name")
	set.BoolVarP(&o.force, "force", "f", false, "Do not prompt for confirmation")
	set.BoolVarP(&o.dryRun, "dry-run", "n", false, "Only print the names")
	set.Var(&o.filter, "filter", `Provide filter values (e.g. "label=LABEL"); keys: label, label!`)
	return cmd
}

func (a *app) pruneVolumes(ctx context.Context, o *pruneOptions) error {
	args := o.filter.Value()
	if err := args.Validate(map[string]bool{"label": true, "label!": true}); err != nil {
		return err
	}
	p, err := a.findPlugin(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	client := control.NewClient(p.Socket)
	defer client.Close()
	// Berth is asked first: a volume that is made later is not among them. Docker itself
	// looks again when it removes one.
	volumes, err := client.Volumes(ctx)
	if err != nil {
		return err
	}
	users, err := a.tryUsers(ctx)
	if err != nil {
		return fault.Unavailable("which volumes containers use can only be told while Docker answers: %w", err)
	}
	volumes = slices.DeleteFunc(volumes, func(v control.Volume) bool { return !o.removes(v, users[v.Name], args) })
	if len(volumes) == 0 {
		fmt.Fprintln(a.Docker.Err(), "There is no volume to remove.")
		return nil
	}
	if !o.dryRun && !o.force {
		fmt.Fprintf(a.Docker.Err(), "WARNING! This will remove %d volumes that no container uses:\n", len(volumes))
		for _, v := range volumes {
			fmt.Fprintf(a.Docker.Err(), "  %s\n", v.Name)
		}
		if err := a.confirm(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, v := range volumes {
		if !o.dryRun {
			if err := a.removeVolume(ctx, p, v); err != nil {
				errs = append(errs, fmt.Errorf("volume %s: %w", v.Name, err))
				continue
			}
		}
		fmt.Fprintln(a.Docker.Out(), v.Name)
	}
	return errors.Join(errs...)
}

// removes reports whether a volume is to be removed.
func (o *pruneOptions) removes(v control.Volume, users []quiesce.User, args filters.Args) bool {
	if len(users) > 0 || len(v.Users) > 0 || v.Mounted || v.Protect || v.State != control.VolumeReady || !o.all && !anonymous(v.Name) {
		return false
	}
	return args.MatchKVList("label", v.Labels) && (!args.Contains("label!") || !args.MatchKVList("label!", v.Labels))
}

// anonymous tells whether Docker made the name up.
func anonymous(name string) bool {
	const digits = 64
	if len(name) != digits {
		return false
	}
	return !slices.ContainsFunc([]byte(name), func(c byte) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') })
}

// removeVolume has Docker remove a volume: it knows best whether a container uses it,
// and has to know that it is gone.
func (a *app) removeVolume(ctx context.Context, p engine.Plugin, v control.Volume) error {
	have, err := a.Docker.API().VolumeInspect(ctx, v.Name)
	if err != nil {
		return err
	}
	if have.Driver != p.Name {
		return fault.Conflict("Docker has a volume of that name with the driver %s", have.Driver)
	}
	return a.Docker.API().VolumeRemove(ctx, v.Name, false)
}

// errNotConfirmed is a user's no.
var errNotConfirmed = errors.New("nothing was removed")

// confirm asks the user, as Docker does; the error is a no.
func (a *app) confirm(ctx context.Context) error {
	fmt.Fprint(a.Docker.Err(), "Are you sure you want to continue? [y/N] ")
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.Docker.In()).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.Docker.Err())
		return ctx.Err()
	case line := <-answer:
		if line != "y" {
			return errNotConfirmed
		}
		return nil
	}
}
