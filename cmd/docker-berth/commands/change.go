package commands

import (
	"context"
	"fmt"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/opts"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce"
)

// noSize is what a user calls no limit.
const noSize = "none"

func (a *app) volumeCloneCommand() *cobra.Command {
	options := opts.NewMapOpts(nil, nil)
	cmd := &cobra.Command{
		Use: "clone [OPTIONS] VOLUME[@SNAPSHOT] NEW", Short: "Make a volume with the data of another one or of a snapshot", Args: cli.ExactArgs(2),
		Long: "Make a volume with the data of another one or of a snapshot, and print its name.\n\n" +
			"The new volume has options of its own: those of -o and the defaults, and not those\n" +
			"of the other one. An interrupted clone leaves nothing behind.",
		ValidArgsFunction: a.completeClone,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.cloneVolume(ctx, args[0], args[1], options.GetAll()))
		},
	}
	cmd.Flags().VarP(options, "opt", "o", "Options of the new volume, as docker volume create takes them")
	return cmd
}

func (a *app) cloneVolume(ctx context.Context, source, name string, options map[string]string) error {
	volume, snapshot, _ := strings.Cut(source, "@")
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := a.checkFree(ctx, name); err != nil {
		return err
	}
	show, end := a.progress("cloning " + source)
	v, err := client.CloneVolume(ctx, control.CloneRequest{Volume: volume, Snapshot: snapshot, Name: name, Options: options}, show)
	end()
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}

// checkFree refuses a name that Docker has a volume of already, of any driver: Docker
// would not let anybody have Berth's. A Docker that does not answer refuses nothing.
func (a *app) checkFree(ctx context.Context, name string) error {
	if a.remote() {
		return nil
	}
	have, err := a.Docker.API().VolumeInspect(ctx, name)
	if err != nil {
		return nil //nolint:nilerr // the name is free, or the daemon says what is wrong
	}
	return fault.Conflict("Docker has a volume %s already, with the driver %s", have.Name, have.Driver)
}

// splitRef returns the volume and the snapshot of VOLUME@SNAPSHOT or VOLUME SNAPSHOT.
func splitRef(args []string) (volume, snapshot string, _ error) {
	volume, snapshot, joined := strings.Cut(args[0], "@")
	switch {
	case joined && len(args) > 1:
		return "", "", fault.Invalid("%s names a snapshot already: %s is one too many", args[0], args[1])
	case len(args) > 1:
		snapshot = args[1]
	}
	return volume, snapshot, nil
}

func (a *app) volumeRollbackCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rollback [OPTIONS] VOLUME SNAPSHOT", Short: "Put a snapshot's data in the place of the volume's", Args: cli.RequiresRangeArgs(1, 2),
		Long: "Put a snapshot's data in the place of the volume's. What the volume had before becomes\n" +
			"a snapshot, whose name is printed: to undo the rollback is to roll back to that.\n\n" +
			"Stop the containers that use the volume first. With --force they may run; they go\n" +
			"on with the data of before until they are started again.",
		ValidArgsFunction: a.completeSnapshotOfVolume,
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, snapshot, err := splitRef(args)
			if err != nil {
				return err
			}
			if snapshot == "" {
				return fault.Invalid("%s: want VOLUME SNAPSHOT or VOLUME@SNAPSHOT", args[0])
			}
			ctx, done := interruptible(cmd)
			return done(a.rollbackVolume(ctx, volume, snapshot, force))
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "Do it while containers run that use the volume")
	return cmd
}

func (a *app) rollbackVolume(ctx context.Context, volume, snapshot string, force bool) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	// The daemon refuses it too, and does not know the names.
	running := runningNames(a.users(ctx)[volume])
	if running != "" && !force {
		return fault.Conflict("volume %s is used by %s: stop that first, or use --force", volume, running)
	}
	show, end := a.progress("rolling back " + volume)
	done, err := client.RollbackVolume(ctx, control.RollbackRequest{Volume: volume, Snapshot: snapshot, Force: force}, show)
	end()
	if err != nil {
		return err
	}
	if running != "" {
		fmt.Fprintf(a.Docker.Err(), "WARNING: until it is started again, the data of before is with %s\n", running)
	}
	fmt.Fprintf(a.Docker.Err(), "Volume %s has the data of %s. What it had before is the snapshot:\n", volume, snapshot)
	fmt.Fprintln(a.Docker.Out(), refOf(done.Kept))
	return nil
}

// runningNames are the names of users that run, joined; "" when none does.
func runningNames(users []quiesce.User) string {
	var names []string
	for _, u := range users {
		if u.Running() {
			names = append(names, named(u.Name, u.ID))
		}
	}
	return strings.Join(names, ", ")
}

// allNames are the names of all users, joined.
func allNames(users []quiesce.User) string {
	var names []string
	for _, u := range users {
		names = append(names, named(u.Name, u.ID))
	}
	return strings.Join(names, ", ")
}

func (a *app) volumeRenameCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rename VOLUME NEW", Short: "Give a volume another name", Args: cli.ExactArgs(2),
		Long: "Give a volume another name, and print that. Data, snapshots and schedule stay.\n\n" +
			"Remove the containers that use the volume first, also the stopped ones: they would\n" +
			"get a new, empty volume with the old name when they are started.",
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.renameVolume(cmd.Context(), args[0], args[1])
		},
	}
}

func (a *app) renameVolume(ctx context.Context, volume, name string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	users, err := a.tryUsers(ctx)
	if err != nil {
		return fault.Unavailable("whether containers use %s can only be told while Docker answers: %w", volume, err)
	}
	if len(users[volume]) > 0 {
		return fault.Conflict("volume %s is used by %s, which would get an empty volume with the old name: remove the containers first", volume, allNames(users[volume]))
	}
	if err := a.checkFree(ctx, name); err != nil {
		return err
	}
	v, err := client.RenameVolume(ctx, control.RenameRequest{Volume: volume, Name: name})
	if err != nil {
		return err
	}
	// Docker forgets a name when it asks for it and is told that there is no such one.
	_, _ = a.Docker.API().VolumeInspect(ctx, volume)
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}

func (a *app) volumeResizeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "resize VOLUME SIZE", Short: "Set how much a volume may hold", Args: cli.ExactArgs(2),
		Long: "Set how much a volume may hold, and print its name. SIZE is a number with a unit, as\n" +
			"500M or 10G, or \"" + noSize + "\". Containers that use the volume go on.",
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return err
			}
			ctx, done := interruptible(cmd)
			return done(a.resizeVolume(ctx, args[0], size))
		},
	}
}

// parseSize reads a size as -o size takes it, with units that are powers of 1024.
func parseSize(text string) (uint64, error) {
	if text == noSize {
		return 0, nil
	}
	n, err := units.RAMInBytes(text)
	if err != nil || n <= 0 {
		return 0, fault.Invalid("size %q: want a number with a unit, as 500M or 10G, or %s", text, noSize)
	}
	return uint64(n), nil
}

func (a *app) resizeVolume(ctx context.Context, volume string, size uint64) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("resizing " + volume)
	v, err := client.ResizeVolume(ctx, control.ResizeRequest{Volume: volume, Size: size}, show)
	end()
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}

func (a *app) volumeSetCommand() *cobra.Command {
	return &cobra.Command{
		Use: "set VOLUME KEY=VALUE [KEY=VALUE...]", Short: "Change properties of a volume", Args: cli.RequiresMinArgs(2),
		Long: "Change properties of a volume, all of them or none, and print its name. The keys are\n" +
			"those of docker volume create -o which can change: snapshot.schedule, snapshot.keep,\n" +
			"backup.schedule, backup.target, backup.keep, protect, on-remove, trash.keep, and\n" +
			"label.NAME. KEY= without a value takes back what was set, so that the default holds\n" +
			"again.",
		ValidArgsFunction: a.completeSet,
		RunE: func(cmd *cobra.Command, args []string) error {
			set := make(map[string]string)
			for _, arg := range args[1:] {
				key, value, ok := strings.Cut(arg, "=")
				if _, twice := set[key]; !ok || key == "" || twice {
					return fault.Invalid("%s: want each KEY=VALUE once", arg)
				}
				set[key] = value
			}
			return a.setVolume(cmd.Context(), args[0], set)
		},
	}
}

func (a *app) setVolume(ctx context.Context, volume string, set map[string]string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	v, err := client.UpdateVolume(ctx, control.UpdateRequest{Volume: volume, Set: set})
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}
