package commands

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// Words for whether a backup has all files.
const (
	statusOK         = "ok"
	statusIncomplete = "incomplete"
)

// exitIncomplete is the exit status of a backup that is there and has not all files.
const exitIncomplete = 3

func (a *app) backupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "backup", Short: "Back up volumes and restore them", Args: cli.NoArgs, RunE: help,
		Long: "Back up volumes to targets and restore them.\n\n" +
			"A backup is named by a reference, which means the same on every host whose target has the\n" +
			"same name: TARGET/VOLUME@ID. TARGET/VOLUME, or with @latest, is the newest complete one,\n" +
			"and with @TIME, as 2026-01-31 or 2026-01-31T12:00:00Z, the newest that is not newer.",
	}
	cmd.AddCommand(
		a.backupCreateCommand(), a.backupListCommand(), a.backupInspectCommand(), a.backupRemoveCommand(), a.backupPruneCommand(),
		a.backupVerifyCommand(), a.backupRestoreCommand(), a.backupExportCommand(), a.backupImportCommand(),
	)
	return cmd
}

func (a *app) backupCreateCommand() *cobra.Command {
	var p pauseOptions
	var req control.BackupRequest
	cmd := &cobra.Command{
		Use: "create [OPTIONS] VOLUME[@SNAPSHOT]", Short: "Back up a volume or one of its snapshots", Args: cli.ExactArgs(1),
		Long: "Back up a volume, from a snapshot that is made for it and removed afterwards, or one of its\n" +
			"snapshots, and print the reference of the backup. Without --target it goes to the volume's\n" +
			"own target, or to the only one that there is.\n\n" +
			"When nothing in the volume has changed since its last backup, as far as its engine can tell,\n" +
			"no new one is made in the next 20 hours: the reference of the last one is printed, and\n" +
			"standard error says so. --tag and --full ask for a new one all the same.\n\n" +
			"A backup for which files could not be read is kept. Their names are printed on standard\n" +
			"error, and the exit status is 3.\n\n" +
			"--pause and --pause-max are those of docker berth snapshot create: the containers stand\n" +
			"still until there is a snapshot, and go on while that is backed up.",
		Example:           "  docker berth backup create db\n  docker berth backup create db@before --target nas --tag upgrade",
		ValidArgsFunction: a.completeClone,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Volume, req.Snapshot, _ = strings.Cut(args[0], "@")
			if err := p.check(cmd); err != nil {
				return err
			}
			if p.pause && req.Snapshot != "" {
				return fault.Invalid("--pause is for a snapshot that is made now, and %s is there already", args[0])
			}
			if err := checkTags(req.Tags); err != nil {
				return err
			}
			ctx, done := interruptible(cmd)
			return done(a.createBackup(ctx, req, p))
		},
	}
	set := cmd.Flags()
	set.StringVar(&req.Target, "target", "", "`TARGET` that it goes to")
	set.StringArrayVar(&req.Tags, "tag", nil, "Mark the backup with a `WORD`; may be repeated")
	set.BoolVar(&req.Full, "full", false, "Read all files, also those that look unchanged since the last backup")
	p.install(cmd)
	a.completeTargetFlag(cmd)
	return cmd
}

func checkTags(tags []string) error {
	for _, tag := range tags {
		if tag == "" || strings.ContainsAny(tag, ", \t\r\n") {
			return fault.Invalid("--tag %q: want a word without white space and commas", tag)
		}
	}
	return nil
}

func (a *app) createBackup(ctx context.Context, req control.BackupRequest, p pauseOptions) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("backing up " + req.Volume)
	defer end()
	var made control.Backup
	if p.pause {
		made, err = a.pausedBackup(ctx, client, req, p.max, show)
	} else {
		made, err = client.CreateBackup(ctx, req, show)
	}
	end()
	if made.Reference == "" {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), made.Reference)
	if made.Unchanged {
		fmt.Fprintf(a.Docker.Err(), "No new backup was made: nothing in volume %s has changed since this one\n", made.Volume)
	}
	if err != nil || !made.Incomplete {
		return err
	}
	for _, missing := range made.Missing {
		fmt.Fprintln(a.Docker.Err(), missing)
	}
	return cli.StatusError{StatusCode: exitIncomplete, Status: fmt.Sprintf("backup %s is incomplete: %s", made.Reference, missingWords(len(made.Missing)))}
}

func missingWords(named int) string {
	if named == 0 {
		return "files are missing"
	}
	return "the files above are missing, and maybe others"
}

// pausedBackup makes a snapshot while the containers that use the volume stand still,
// backs that up and removes it, whatever became of the backup; the daemon does if this
// process is killed. A backup with a
// reference was made, whatever the error is.
func (a *app) pausedBackup(ctx context.Context, client *control.Client, req control.BackupRequest, most time.Duration, show func(control.Progress)) (backup control.Backup, err error) {
	name := "backup-" + time.Now().UTC().Format("20060102T150405Z")
	snapshot, err := a.pausedSnapshot(ctx, client, control.SnapshotRequest{Volume: req.Volume, Name: name, ForBackup: true}, most, show)
	if err != nil {
		return backup, err
	}
	defer func() {
		ref := control.SnapshotRef{Volume: snapshot.Volume, Name: snapshot.Name}
		if removed := client.RemoveSnapshot(context.WithoutCancel(ctx), ref, nil); removed != nil {
			err = errors.Join(err, fmt.Errorf("snapshot %s was for the backup only and could not be removed: %w", ref, removed))
		}
	}()
	req.Snapshot = snapshot.Name
	return client.CreateBackup(ctx, req, show)
}

func (a *app) backupListCommand() *cobra.Command {
	var o listOptions
	var req control.BackupsRequest
	cmd := &cobra.Command{
		Use: "ls [OPTIONS] [VOLUME]", Aliases: []string{"list"}, Short: "List backups, the newest last", Args: cli.RequiresMaxArgs(1),
		Long: "List the backups that are in the repositories of all targets or of one, the newest last,\n" +
			"also those of other hosts and of volumes that are gone. When a target does not answer, the\n" +
			"others are listed and the exit status is 1.",
		Example:           "  docker berth backup ls db\n  docker berth backup ls --target nas --filter status=incomplete",
		ValidArgsFunction: a.completeVolumes(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if req.Volume != "" && req.Volume != args[0] {
					return fault.Invalid("--volume %s: %s is meant already", req.Volume, args[0])
				}
				req.Volume = args[0]
			}
			ctx, done := interruptible(cmd)
			return done(a.listBackups(ctx, &o, req))
		},
	}
	o.install(cmd, "Only display references", "host=alpha", "target", "volume", "host", "tag", "status", "id")
	cmd.Flags().StringVar(&req.Target, "target", "", "Only those of `TARGET`")
	cmd.Flags().StringVar(&req.Volume, "volume", "", "Only those of `VOLUME`")
	a.completeTargetFlag(cmd)
	a.completeVolumeFlag(cmd)
	return cmd
}

func (a *app) listBackups(ctx context.Context, o *listOptions, req control.BackupsRequest) error {
	args, err := o.filters()
	if err != nil {
		return err
	}
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("listing")
	list, err := client.Backups(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	backups := slices.DeleteFunc(list.Backups, func(b control.Backup) bool {
		return !args.ExactMatch("target", b.Target) || !args.Match("volume", b.Volume) || !args.ExactMatch("host", b.Host) ||
			!args.ExactMatch("status", backupStatus(b)) || !args.FuzzyMatch("id", b.ID) ||
			args.Contains("tag") && !slices.ContainsFunc(b.Tags, func(tag string) bool { return args.ExactMatch("tag", tag) })
	})
	return errors.Join(a.writeBackups(o, backups), targetFailures(list.Failed))
}

// targetFailures makes one error of targets that did not answer.
func targetFailures(failed map[string]string) error {
	var errs []error
	for _, target := range slices.Sorted(maps.Keys(failed)) {
		errs = append(errs, fmt.Errorf("target %s: %s", target, failed[target]))
	}
	return errors.Join(errs...)
}

func (a *app) writeBackups(o *listOptions, backups []control.Backup) error {
	slices.SortStableFunc(backups, func(x, y control.Backup) int { return x.Time.Compare(y.Time) })
	rows := make([]formatter.SubContext, 0, len(backups))
	for _, b := range backups {
		rows = append(rows, &backupRow{b: b, o: o})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Reference}}\t{{.Volume}}\t{{.Host}}\t{{.Time}}\t{{.Files}}\t{{.Size}}\t{{.Added}}\t{{.Status}}`,
		quiet: "{{.Reference}}",
		header: formatter.SubHeaderContext{
			"Reference": "REFERENCE", "Target": "TARGET", "ID": "ID", "Volume": "VOLUME", "UUID": "UUID", "Host": "HOST", "Time": "TIME", "Age": "AGE",
			"Files": "FILES", "Size": "SIZE", "Added": "ADDED", "Status": "STATUS", "Tags": "TAGS",
		},
	}, rows)
}

// backupRow is a backup in a list. Its methods are the fields of templates.
type backupRow struct {
	formatter.HeaderContext
	b control.Backup
	o *listOptions
}

// MarshalJSON gives all fields.
func (r *backupRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Reference is TARGET/VOLUME@ID.
func (r *backupRow) Reference() string { return r.b.Target + "/" + r.b.Volume + "@" + r.ID() }

// ID is unique in the repository, or its first part, which nearly always is.
func (r *backupRow) ID() string {
	const short = 8
	if r.o.noTrunc || len(r.b.ID) < short {
		return r.b.ID
	}
	return r.b.ID[:short]
}

// Target is where it is.
func (r *backupRow) Target() string { return r.b.Target }

// Volume is the name that its volume had.
func (r *backupRow) Volume() string { return r.b.Volume }

// UUID is its volume's.
func (r *backupRow) UUID() string { return r.b.UUID }

// Host made it.
func (r *backupRow) Host() string { return r.b.Host }

// Time is that of the data, in UTC and as references take it.
func (r *backupRow) Time() string { return at(r.b.Time.UTC()) }

// Age is the time since then.
func (r *backupRow) Age() string { return ago(r.b.Time) }

// Files is how many there are; "" when not known.
func (r *backupRow) Files() string {
	if r.b.Files == 0 {
		return ""
	}
	return strconv.FormatUint(r.b.Files, 10)
}

// Size is what the files hold; "" when not known.
func (r *backupRow) Size() string { return human(r.b.Bytes) }

// Added is what the repository has grown by; "" when not known.
func (r *backupRow) Added() string { return human(r.b.Added) }

// Status is ok or incomplete.
func (r *backupRow) Status() string { return backupStatus(r.b) }

// Tags are words that it was marked with.
func (r *backupRow) Tags() string { return strings.Join(r.b.Tags, ",") }

func backupStatus(b control.Backup) string {
	if b.Incomplete {
		return statusIncomplete
	}
	return statusOK
}

func (a *app) backupInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] REFERENCE [REFERENCE...]", Short: "Display what is known of backups, with their manifests", Args: cli.RequiresMinArgs(1),
		Example:           "  docker berth backup inspect nas/db@latest",
		ValidArgsFunction: a.completeReferences(many, true),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.inspectBackups(ctx, args, format))
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

func (a *app) inspectBackups(ctx context.Context, refs []string, format string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	return inspect.Inspect(a.Docker.Out(), refs, format, func(ref string) (any, []byte, error) {
		show, end := a.progress("reading " + ref)
		defer end()
		b, err := client.Backup(ctx, control.BackupRef{Reference: ref}, show)
		return b, nil, err
	})
}
