package commands

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

func (a *app) backupRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm TARGET/VOLUME@ID [TARGET/VOLUME@ID...]", Aliases: []string{"remove"}, Short: "Remove backups", Args: cli.RequiresMinArgs(1),
		Long: "Remove backups for good and print their references. An ID is needed: what is the latest\n" +
			"backup may be another one in a moment. The space in the repository becomes free when the\n" +
			"target is pruned.",
		ValidArgsFunction: a.completeReferences(many, false),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.removeBackups(ctx, args))
		},
	}
}

// wantID refuses a reference that may mean another backup in a moment.
func wantID(text string) error {
	ref, err := backup.ParseReference(text)
	if err != nil {
		return err
	}
	if !ref.ByID() {
		return fault.Invalid("backup %s: want an ID instead of %s, as docker berth backup ls --target %s %s shows it: what %s means may change with every backup",
			text, ref.Pick, ref.Target, ref.Volume, ref.Pick)
	}
	return nil
}

func (a *app) removeBackups(ctx context.Context, refs []string) error {
	for _, ref := range refs {
		if err := wantID(ref); err != nil {
			return err // nothing is removed of a list that has a slip in it
		}
	}
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("removing")
	report, err := client.RemoveBackups(ctx, control.RemoveBackupsRequest{References: refs}, show)
	end()
	if err != nil {
		return err
	}
	for _, ref := range report.Removed {
		fmt.Fprintln(a.Docker.Out(), ref)
	}
	return failures(report.Failed)
}

func (a *app) backupPruneCommand() *cobra.Command {
	var req control.PruneBackupsRequest
	var force bool
	cmd := &cobra.Command{
		Use: "prune [OPTIONS]", Short: "Remove old backups and free the space of removed ones", Args: cli.NoArgs,
		Long: "Remove the backups that a volume's policy (backup.keep) does not keep, print their\n" +
			"references, and free the space in the repositories of all backups that were removed. Only\n" +
			"backups that a schedule made are looked at, unless --all is given. A policy like 7d:4w:12m\n" +
			"keeps the newest of each of the last 7 days, 4 weeks and 12 months that have any.",
		Example:           "  docker berth backup prune --dry-run\n  docker berth backup prune --target nas --volume db --keep 7d:4w --all",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, done := interruptible(cmd)
			return done(a.pruneBackups(ctx, req, force))
		},
	}
	set := cmd.Flags()
	set.StringVar(&req.Target, "target", "", "Only those of `TARGET`")
	set.StringVar(&req.Volume, "volume", "", "Only those of `VOLUME`")
	set.StringVar(&req.Keep, "keep", "", "`POLICY` instead of each volume's own")
	set.BoolVarP(&req.All, "all", "a", false, "Look at backups that no schedule made too")
	set.BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	set.BoolVarP(&req.DryRun, "dry-run", "n", false, "Only list them")
	a.completeTargetFlag(cmd)
	a.completeVolumeFlag(cmd)
	return cmd
}

func (a *app) pruneBackups(ctx context.Context, req control.PruneBackupsRequest, force bool) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if req.DryRun || !force {
		done, err := a.foretellPrune(ctx, client, req)
		if done || err != nil {
			return err
		}
	}
	show, end := a.progress("pruning")
	report, err := client.PruneBackups(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	o := &listOptions{}
	for _, b := range report.Removed {
		fmt.Fprintln(a.Docker.Out(), (&backupRow{b: b, o: o}).Reference())
	}
	return failures(report.Failed)
}

// foretellPrune shows what a prune would remove. That was all for a dry run; otherwise
// the user has agreed, or nothing is to be removed but there may be space to free.
func (a *app) foretellPrune(ctx context.Context, client *control.Client, req control.PruneBackupsRequest) (done bool, _ error) {
	dry := req.DryRun
	req.DryRun = true
	show, end := a.progress("looking for old backups")
	report, err := client.PruneBackups(ctx, req, show)
	end()
	if err != nil {
		return true, err
	}
	if len(report.Removed) == 0 {
		fmt.Fprintln(a.Docker.Err(), "There is no backup to remove.")
	}
	switch {
	case dry && len(report.Removed) == 0:
		return true, failures(report.Failed)
	case dry:
		return true, errors.Join(a.writeBackups(&listOptions{}, report.Removed), failures(report.Failed))
	case len(report.Removed) == 0:
		return false, nil // what fails is told by the prune itself
	}
	fmt.Fprintf(a.Docker.Err(), "WARNING! This will remove %s for good:\n", plural(len(report.Removed), "backup"))
	o := &listOptions{}
	for _, b := range report.Removed {
		row := &backupRow{b: b, o: o}
		fmt.Fprintf(a.Docker.Err(), "  %s (%s)\n", row.Reference(), row.Age())
	}
	return false, a.confirm(ctx)
}

func (a *app) backupVerifyCommand() *cobra.Command {
	var share string
	cmd := &cobra.Command{
		Use: "verify [OPTIONS] TARGET|REFERENCE", Short: "Look for damage in a target, or prove that a backup can be restored", Args: cli.ExactArgs(1),
		Long: "Look for damage in the repository of a target, or restore a backup to a place that is removed\n" +
			"afterwards and compare it with what the repository says of it. What is wrong is printed,\n" +
			"and the exit status is 1 then.",
		Example:           "  docker berth backup verify nas --read-data 10%\n  docker berth backup verify nas/db@latest",
		ValidArgsFunction: a.completeVerify,
		RunE: func(cmd *cobra.Command, args []string) error {
			var req control.VerifyRequest
			if strings.Contains(args[0], "/") {
				req.Reference = args[0]
				if cmd.Flags().Changed("read-data") {
					return fault.Invalid("--read-data %s is for a target: all data of %s is read", share, args[0])
				}
			} else {
				req.Target = args[0]
			}
			var err error
			if req.Share, err = parsePercent("--read-data", share); err != nil {
				return err
			}
			ctx, done := interruptible(cmd)
			return done(a.verifyBackups(ctx, req, args[0]))
		},
	}
	cmd.Flags().StringVar(&share, "read-data", "0%", "`PERCENT` of the target's data that is read, chosen by chance")
	return cmd
}

func (a *app) verifyBackups(ctx context.Context, req control.VerifyRequest, what string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("verifying " + what)
	report, err := client.VerifyBackups(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	for _, wrong := range report.Errors {
		fmt.Fprintln(a.Docker.Out(), wrong)
	}
	if report.Hint != "" {
		fmt.Fprintln(a.Docker.Err(), report.Hint)
	}
	if len(report.Errors) > 0 {
		return cli.StatusError{StatusCode: 1, Status: fmt.Sprintf("%s: %s", what, plural(len(report.Errors), "error"))}
	}
	if b := report.Backup; b != nil {
		fmt.Fprintf(a.Docker.Out(), "%s: restored and compared, %d files, %s\n", b.Reference, b.Files, units.BytesSize(float64(b.Bytes)))
		return nil
	}
	fmt.Fprintf(a.Docker.Out(), "%s: no errors\n", what)
	return nil
}
