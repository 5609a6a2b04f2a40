package commands

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Manage snapshots of Berth's volumes", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(
		a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotInspectCommand(), a.snapshotRemoveCommand(), a.snapshotPruneCommand(),
	)
	return cmd
}

// refOf is VOLUME@NAME.
func refOf(s control.Snapshot) string {
	return control.SnapshotRef{Volume: s.Volume, Name: s.Name}.String()
}

// parseRef reads VOLUME@NAME.
func parseRef(text string) (control.SnapshotRef, error) {
	volume, name, ok := strings.Cut(text, "@")
	if !ok || volume == "" || name == "" {
		return control.SnapshotRef{}, fault.Invalid("snapshot %q: want VOLUME@SNAPSHOT", text)
	}
	return control.SnapshotRef{Volume: volume, Name: name}, nil
}

// pauseOptions are the flags of a snapshot for which containers stand still.
type pauseOptions struct {
	pause bool
	max   time.Duration
}

func (o *pauseOptions) install(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&o.pause, "pause", false, "Pause the containers that use the volume as long as a snapshot takes")
	cmd.Flags().DurationVar(&o.max, "pause-max", quiesce.DefaultMax, "How long they are paused at most")
}

func (o *pauseOptions) check(cmd *cobra.Command) error {
	if o.max < quiesce.LeastMax || o.max > quiesce.MostMax {
		return fault.Invalid("--pause-max %s: want at least %s and at most %s", o.max, quiesce.LeastMax, quiesce.MostMax)
	}
	if cmd.Flags().Changed("pause-max") && !o.pause {
		return fault.Invalid("--pause-max is for --pause")
	}
	return nil
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var o pauseOptions
	cmd := &cobra.Command{
		Use: "create [OPTIONS] VOLUME [SNAPSHOT]", Short: "Make a snapshot of a volume", Args: cli.RequiresRangeArgs(1, 2),
		Long: "Make a snapshot of a volume, named after the time in UTC if it has no name, and print\n" +
			"VOLUME@SNAPSHOT. By that name containers can read it: -v VOLUME@SNAPSHOT:PATH.\n\n" +
			"With --pause the containers that use the volume stand still meanwhile, so that no file\n" +
			"is written to in the middle. They go on afterwards, whatever happens to the command,\n" +
			"and after --pause-max at the latest; a snapshot that takes longer is given up.\n" +
			"Containers that you have paused yourself stay paused.",
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, snapshot, err := splitRef(args)
			if err != nil {
				return err
			}
			if err := o.check(cmd); err != nil {
				return err
			}
			ctx, done := interruptible(cmd)
			return done(a.createSnapshot(ctx, volume, snapshot, o))
		},
	}
	o.install(cmd)
	return cmd
}

func (a *app) createSnapshot(ctx context.Context, volume, name string, o pauseOptions) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("snapshot of " + volume)
	defer end()
	req := control.SnapshotRequest{Volume: volume, Name: name}
	var made control.Snapshot
	if o.pause {
		made, err = a.pausedSnapshot(ctx, client, req, o.max, show)
	} else {
		made, err = client.CreateSnapshot(ctx, req, show)
	}
	end()
	if err != nil {
		return err
	}
	if made.Unstable > 0 {
		fmt.Fprintf(a.Docker.Err(), "WARNING: %d files changed while they were read, over and over, and are in some state of between (see --pause)\n", made.Unstable)
	}
	fmt.Fprintln(a.Docker.Out(), refOf(made))
	return nil
}

// pausedSnapshot makes a snapshot while the containers that use the volume stand still.
// One for which they did not is removed again.
func (a *app) pausedSnapshot(ctx context.Context, client *control.Client, req control.SnapshotRequest, most time.Duration, show func(control.Progress)) (made control.Snapshot, err error) {
	if err := engine.CheckLocal(a.Docker.Host(), a.Docker.Context()); err != nil {
		return made, err
	}
	v, err := client.Volume(ctx, req.Volume)
	if err != nil {
		return made, err
	}
	for _, u := range v.Users {
		if !u.Here {
			return made, fault.Conflict("volume %s is mounted on host %s too: containers there cannot be paused from here", req.Volume, u.Host)
		}
	}
	hold, err := quiesce.Begin(ctx, quiesce.Config{
		API: a.Docker.API(), Host: a.Docker.Host(), Dir: pausedDir(os.Getenv, os.Getuid()), Volume: req.Volume, Max: most,
	})
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, hold.End(ctx)) }()
	req.Paused = true
	within := ctx
	if until := hold.Until(); !until.IsZero() {
		var cancel context.CancelFunc
		within, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	made, err = client.CreateSnapshot(within, req, show)
	if err != nil {
		if ctx.Err() == nil && within.Err() != nil {
			return made, fault.Exhausted("the snapshot was not done within --pause-max %s: %s goes on, and there is no snapshot", most, strings.Join(hold.Names(), ", "))
		}
		return made, err
	}
	if err := hold.Still(ctx); err != nil {
		removed := client.RemoveSnapshot(context.WithoutCancel(ctx), control.SnapshotRef{Volume: made.Volume, Name: made.Name}, nil)
		if removed != nil {
			return made, errors.Join(err, fmt.Errorf("snapshot %s is not worth what it says, and could not be removed: %w", refOf(made), removed))
		}
		return made, fmt.Errorf("%w; the snapshot was removed again", err)
	}
	return made, nil
}

// pausedDir is the directory for what a user's commands have paused.
func pausedDir(getenv func(string) string, uid int) string {
	switch state := getenv("XDG_STATE_HOME"); {
	case filepath.IsAbs(state):
		return filepath.Join(state, "docker-berth", "paused")
	case uid == 0 || getenv("HOME") == "":
		return "/var/lib/berth/cli/paused"
	default:
		return filepath.Join(getenv("HOME"), ".local", "state", "docker-berth", "paused")
	}
}

// makeGood lets containers go that a command has left paused which was killed with its
// watchdog.
func (a *app) makeGood(ctx context.Context) {
	if a.remote() {
		return
	}
	names, err := quiesce.MakeGood(ctx, a.Docker.API(), a.Docker.Host(), pausedDir(os.Getenv, os.Getuid()))
	if len(names) > 0 {
		fmt.Fprintf(a.Docker.Err(), "WARNING: %s was paused by a command that was killed, and goes on now\n", strings.Join(names, ", "))
	}
	if err != nil {
		fmt.Fprintf(a.Docker.Err(), "WARNING: containers that a killed command has paused: %v\n", err)
	}
}

func (a *app) snapshotListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS] [VOLUME]", Aliases: []string{"list"}, Short: "List snapshots", Args: cli.RequiresMaxArgs(1),
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.listSnapshots(cmd.Context(), &o, strings.Join(args, ""))
		},
	}
	o.install(cmd, "Only display VOLUME@SNAPSHOT", "origin=schedule", "volume", "name", "origin", "consistency")
	return cmd
}

func (a *app) listSnapshots(ctx context.Context, o *listOptions, volume string) error {
	args, client, err := a.filtered(ctx, o, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	snapshots, err := client.Snapshots(ctx, volume)
	if err != nil {
		return err
	}
	snapshots = slices.DeleteFunc(snapshots, func(s control.Snapshot) bool {
		return !args.Match("volume", s.Volume) || !args.Match("name", s.Name) || !args.ExactMatch("origin", string(s.Origin)) ||
			!args.ExactMatch("consistency", string(s.Consistency))
	})
	return a.writeSnapshots(o, snapshots)
}

func (a *app) writeSnapshots(o *listOptions, snapshots []control.Snapshot) error {
	slices.SortStableFunc(snapshots, func(x, y control.Snapshot) int { return compareNames(x.Volume, y.Volume) })
	rows := make([]formatter.SubContext, 0, len(snapshots))
	for _, s := range snapshots {
		rows = append(rows, &snapshotRow{s: s})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Volume}}\t{{.Name}}\t{{.Consistency}}\t{{.Origin}}\t{{.Used}}\t{{.Created}}`,
		quiet: "{{.Ref}}",
		header: formatter.SubHeaderContext{
			"Ref": "SNAPSHOT", "Volume": "VOLUME NAME", "VolumeUUID": "VOLUME UUID", "Name": "SNAPSHOT", "Consistency": "CONSISTENCY", "Origin": "ORIGIN",
			"Used": "USED", "Files": "FILES", "Bytes": "BYTES", "Unstable": "UNSTABLE", "Mounted": "MOUNTED", "Created": "CREATED", "CreatedAt": "CREATED AT",
			"Error": "ERROR",
		},
	}, rows)
}

// snapshotRow is a snapshot in a list. Its methods are the fields of templates.
type snapshotRow struct {
	formatter.HeaderContext
	s control.Snapshot
}

// MarshalJSON gives all fields.
func (r *snapshotRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Ref is VOLUME@SNAPSHOT.
func (r *snapshotRow) Ref() string { return refOf(r.s) }

// Volume is the name of its volume.
func (r *snapshotRow) Volume() string { return r.s.Volume }

// VolumeUUID is its volume's for the whole life of that.
func (r *snapshotRow) VolumeUUID() string { return r.s.VolumeUUID }

// Name is the snapshot's.
func (r *snapshotRow) Name() string { return r.s.Name }

// Consistency is none, crash, frozen, paused or quiesced.
func (r *snapshotRow) Consistency() string { return string(r.s.Consistency) }

// Origin is manual, schedule, rollback, restore, clone or backup.
func (r *snapshotRow) Origin() string { return string(r.s.Origin) }

// Used is what its removal would free; "" when not known.
func (r *snapshotRow) Used() string { return human(r.s.Used) }

// Files is how many were copied or shared.
func (r *snapshotRow) Files() uint64 { return r.s.Files }

// Bytes is how much they hold.
func (r *snapshotRow) Bytes() string { return human(r.s.Bytes) }

// Unstable is how many files changed while they were read.
func (r *snapshotRow) Unstable() uint64 { return r.s.Unstable }

// Mounted says that a container has it.
func (r *snapshotRow) Mounted() bool { return r.s.Mounted }

// Created is the time since then.
func (r *snapshotRow) Created() string { return ago(r.s.Created) }

// CreatedAt is the time in the form of RFC 3339.
func (r *snapshotRow) CreatedAt() string { return at(r.s.Created) }

// Error is why it cannot be used.
func (r *snapshotRow) Error() string { return r.s.Error }

func (a *app) snapshotInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] VOLUME@SNAPSHOT [VOLUME@SNAPSHOT...]", Short: "Display what Berth knows of snapshots", Args: cli.RequiresMinArgs(1),
		ValidArgsFunction: a.completeSnapshots,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.inspectSnapshots(cmd.Context(), args, format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

func (a *app) inspectSnapshots(ctx context.Context, refs []string, format string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	return inspect.Inspect(a.Docker.Out(), refs, format, func(text string) (any, []byte, error) {
		ref, err := parseRef(text)
		if err != nil {
			return nil, nil, err
		}
		snapshots, err := client.Snapshots(ctx, ref.Volume)
		if err != nil {
			return nil, nil, err
		}
		for _, s := range snapshots {
			if s.Name == ref.Name {
				return s, nil, nil
			}
		}
		return nil, nil, fault.NotFound("volume %s has no snapshot %s", ref.Volume, ref.Name)
	})
}

func (a *app) snapshotRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm VOLUME@SNAPSHOT [VOLUME@SNAPSHOT...]", Aliases: []string{"remove"}, Short: "Remove snapshots", Args: cli.RequiresMinArgs(1),
		Long:              "Remove snapshots and print their names. There is no trash for them.",
		ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.removeSnapshots(ctx, args))
		},
	}
}

func (a *app) removeSnapshots(ctx context.Context, texts []string) error {
	var refs []control.SnapshotRef
	for _, text := range texts {
		ref, err := parseRef(text)
		if err != nil {
			return err // nothing is removed of a list that has a slip in it
		}
		refs = append(refs, ref)
	}
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	var errs []error
	for _, ref := range refs {
		show, end := a.progress("removing " + ref.String())
		err := client.RemoveSnapshot(ctx, ref, show)
		end()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.Docker.Out(), ref)
	}
	return errors.Join(errs...)
}

// snapshotPruneOptions are the flags of `snapshot prune`.
type snapshotPruneOptions struct {
	keep               string
	all, force, dryRun bool
}

func (a *app) snapshotPruneCommand() *cobra.Command {
	var o snapshotPruneOptions
	cmd := &cobra.Command{
		Use: "prune [OPTIONS] [VOLUME]", Short: "Remove old snapshots", Args: cli.RequiresMaxArgs(1),
		Long: "Remove the snapshots that a volume's policy does not keep, of one volume or of all, and\n" +
			"print their names. Only snapshots that a schedule made are looked at, unless --all is\n" +
			"given. A policy like 24h:7d:4w:12m keeps the newest of each of the last 24 hours, 7\n" +
			"days, 4 weeks and 12 months that have any.",
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.pruneSnapshots(ctx, strings.Join(args, ""), o))
		},
	}
	set := cmd.Flags()
	set.StringVar(&o.keep, "keep", "", "`POLICY` instead of each volume's own")
	set.BoolVarP(&o.all, "all", "a", false, "Look at snapshots that no schedule made too")
	set.BoolVarP(&o.force, "force", "f", false, "Do not prompt for confirmation")
	set.BoolVarP(&o.dryRun, "dry-run", "n", false, "Only list them")
	return cmd
}

func (a *app) pruneSnapshots(ctx context.Context, volume string, o snapshotPruneOptions) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	req := control.PruneSnapshotsRequest{Volume: volume, Keep: o.keep, All: o.all, DryRun: true}
	if o.dryRun || !o.force {
		report, err := client.PruneSnapshots(ctx, req, nil)
		if err != nil {
			return err
		}
		if len(report.Removed) == 0 {
			fmt.Fprintln(a.Docker.Err(), "There is no snapshot to remove.")
			return nil
		}
		if o.dryRun {
			return a.writeSnapshots(&listOptions{}, report.Removed)
		}
		fmt.Fprintf(a.Docker.Err(), "WARNING! This will remove %d snapshots:\n", len(report.Removed))
		for _, s := range report.Removed {
			fmt.Fprintf(a.Docker.Err(), "  %s (%s)\n", refOf(s), ago(s.Created))
		}
		if err := a.confirm(ctx); err != nil {
			return err
		}
	}
	req.DryRun = false
	show, end := a.progress("removing snapshots")
	report, err := client.PruneSnapshots(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	for _, s := range report.Removed {
		fmt.Fprintln(a.Docker.Out(), refOf(s))
	}
	return failures(report.Failed)
}
