package commands

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) trashCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "trash", Short: "Manage removed volumes whose data is still there", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.trashListCommand(), a.trashRestoreCommand(), a.trashPurgeCommand())
	return cmd
}

func (a *app) trashListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List removed volumes, the newest first", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listTrash(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display IDs", "name=db", "id", "name", "engine", "root")
	return cmd
}

func (a *app) listTrash(ctx context.Context, o *listOptions) error {
	args, client, err := a.filtered(ctx, o, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	entries, err := client.Trash(ctx)
	if err != nil {
		return err
	}
	var rows []formatter.SubContext
	for _, e := range newestFirst(entries) {
		if args.FuzzyMatch("id", e.UUID) && args.Match("name", e.Name) && args.ExactMatch("engine", e.Engine) && args.ExactMatch("root", e.Root) {
			rows = append(rows, &trashRow{e: e, o: o})
		}
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.ID}}\t{{.Name}}\t{{.Engine}}\t{{.Used}}\t{{.Snapshots}}\t{{.Removed}}\t{{.Expires}}`,
		quiet: "{{.ID}}",
		header: formatter.SubHeaderContext{
			"ID": "ID", "Name": "VOLUME NAME", "Engine": "ENGINE", "Root": "ROOT", "Used": "USED", "Snapshots": "SNAPSHOTS", "Removed": "REMOVED",
			"RemovedAt": "REMOVED AT", "Expires": "EXPIRES", "ExpiresAt": "EXPIRES AT", "Error": "ERROR",
		},
	}, rows)
}

func newestFirst(entries []control.TrashEntry) []control.TrashEntry {
	slices.SortStableFunc(entries, func(x, y control.TrashEntry) int { return y.Removed.Compare(x.Removed) })
	return entries
}

// trashRow is a removed volume in a list. Its methods are the fields of templates.
type trashRow struct {
	formatter.HeaderContext
	e control.TrashEntry
	o *listOptions
}

// MarshalJSON gives all fields.
func (r *trashRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// ID is the volume's UUID, or its first part.
func (r *trashRow) ID() string {
	if r.o.noTrunc {
		return r.e.UUID
	}
	first, _, _ := strings.Cut(r.e.UUID, "-")
	return first
}

// Name is what the volume was called.
func (r *trashRow) Name() string { return r.e.Name }

// Engine keeps the data.
func (r *trashRow) Engine() string { return r.e.Engine }

// Root is the root's name; "" is the default one.
func (r *trashRow) Root() string { return r.e.Root }

// Used is what the data takes; "" when not known.
func (r *trashRow) Used() string { return human(r.e.Used) }

// Snapshots is how many it has.
func (r *trashRow) Snapshots() int { return r.e.Snapshots }

// Removed is the time since then.
func (r *trashRow) Removed() string { return ago(r.e.Removed) }

// RemovedAt is the time in the form of RFC 3339.
func (r *trashRow) RemovedAt() string { return at(r.e.Removed) }

// Expires is the time until it is deleted, or that it is being.
func (r *trashRow) Expires() string {
	if r.e.Deleting {
		return "being deleted"
	}
	return until(r.e.Expires)
}

// ExpiresAt is when it is deleted in the form of RFC 3339.
func (r *trashRow) ExpiresAt() string { return at(r.e.Expires) }

// Error is why it could not be deleted or cannot be restored.
func (r *trashRow) Error() string { return r.e.Error }

func (a *app) trashRestoreCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restore ID|VOLUME [NEW]", Short: "Bring a removed volume back", Args: cli.RequiresRangeArgs(1, 2),
		Long: "Bring a removed volume back with its snapshots, under the name that it had or under a new\n" +
			"one, and print that. Of several that were called VOLUME it is the one removed last.",
		ValidArgsFunction: a.completeTrash(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 1 {
				name = args[1]
			}
			return a.restoreTrash(cmd.Context(), args[0], name)
		},
	}
}

func (a *app) restoreTrash(ctx context.Context, ref, name string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	entries, err := client.Trash(ctx)
	if err != nil {
		return err
	}
	found, err := pickTrash(entries, ref)
	if err != nil {
		return err
	}
	wanted := name
	if wanted == "" {
		wanted = found[0].Name
	}
	if err := a.checkFree(ctx, wanted); err != nil {
		return fmt.Errorf("%w; give the restored one another name: docker berth trash restore %s NEW", err, ref)
	}
	v, err := client.RestoreTrash(ctx, control.RestoreTrashRequest{UUID: found[0].UUID, Name: name})
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}

// pickTrash returns the entries of a name, the newest first, or the one of an ID or of
// the beginning of one.
func pickTrash(entries []control.TrashEntry, ref string) ([]control.TrashEntry, error) {
	var named, begun []control.TrashEntry
	for _, e := range newestFirst(entries) {
		switch {
		case e.UUID == ref:
			return []control.TrashEntry{e}, nil
		case e.Name == ref:
			named = append(named, e)
		case strings.HasPrefix(e.UUID, ref):
			begun = append(begun, e)
		}
	}
	switch {
	case len(named) > 0:
		return named, nil
	case len(begun) == 1:
		return begun, nil
	case len(begun) > 1:
		return nil, fault.Conflict("%s is the beginning of several IDs: give more of it", ref)
	default:
		return nil, fault.NotFound("there is no %s in the trash", ref)
	}
}

func (a *app) trashPurgeCommand() *cobra.Command {
	var all, force bool
	cmd := &cobra.Command{
		Use: "purge [OPTIONS] [ID|VOLUME...]", Short: "Delete removed volumes for good",
		Long: "Delete removed volumes for good, with their snapshots, and print their IDs. A name that\n" +
			"several of them had is refused: give the ID.",
		ValidArgsFunction: a.completeTrash(many),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all != (len(args) == 0) {
				return fault.Invalid("want either names of removed volumes or --all")
			}
			ctx, done := interruptible(cmd)
			return done(a.purgeTrash(ctx, args, force))
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Delete all of them")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation of --all")
	return cmd
}

// purgeTrash deletes what refs name, or all that is there when asked if there are none.
func (a *app) purgeTrash(ctx context.Context, refs []string, force bool) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	entries, err := client.Trash(ctx)
	if err != nil {
		return err
	}
	var req control.PurgeTrashRequest
	for _, ref := range refs {
		found, err := pickTrash(entries, ref)
		switch {
		case err != nil:
			return err
		case len(found) > 1:
			return fault.Conflict("%d removed volumes were called %s: give the ID of one (docker berth trash ls --no-trunc --filter name=%s)", len(found), ref, ref)
		}
		req.UUIDs = append(req.UUIDs, found[0].UUID)
	}
	if len(refs) == 0 {
		if len(entries) == 0 {
			fmt.Fprintln(a.Docker.Err(), "The trash is empty.")
			return nil
		}
		if !force {
			fmt.Fprintf(a.Docker.Err(), "WARNING! This will delete %d removed volumes and their snapshots for good.\n", len(entries))
			if err := a.confirm(ctx); err != nil {
				return err
			}
		}
		// Those that the user was told of, and none that was removed meanwhile.
		for _, e := range entries {
			req.UUIDs = append(req.UUIDs, e.UUID)
		}
	}
	show, end := a.progress("deleting")
	report, err := client.PurgeTrash(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	for _, e := range report.Purged {
		fmt.Fprintln(a.Docker.Out(), e.UUID)
	}
	return failures(report.Failed)
}

// failures makes one error of what went wrong with single objects.
func failures(failed map[string]string) error {
	var errs []error
	for _, object := range slices.Sorted(maps.Keys(failed)) {
		errs = append(errs, fmt.Errorf("%s: %s", object, failed[object]))
	}
	return errors.Join(errs...)
}
