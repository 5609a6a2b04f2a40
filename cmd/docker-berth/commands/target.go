package commands

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

func (a *app) targetCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "target", Short: "Manage where volumes are backed up to", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(a.targetAddCommand(), a.targetListCommand(), a.targetInspectCommand(), a.targetTestCommand(), a.targetRemoveCommand())
	return cmd
}

// targetOptions are the flags of `target add`.
type targetOptions struct {
	secretOptions
	engine, upload, download, prune, check, verify, share string
	replace                                               bool
}

func (a *app) targetAddCommand() *cobra.Command {
	var o targetOptions
	cmd := &cobra.Command{
		Use: "add [OPTIONS] NAME REPOSITORY", Short: "Add a repository that volumes are backed up to", Args: cli.ExactArgs(2),
		Long: "Add a repository that volumes are backed up to, and print its name. It is opened with the\n" +
			"password, and made if there is none.\n\n" +
			"REPOSITORY is an absolute path as the daemon sees it, or a place in restic's words:\n" +
			"sftp:USER@HOST:/PATH, rest:https://HOST/, s3:https://HOST/BUCKET, b2:BUCKET:PATH,\n" +
			"azure:CONTAINER:/, gs:BUCKET:/, rclone:REMOTE:PATH. The engine archive knows paths and s3.\n\n" +
			"Without --password-file the password is asked for, twice. Keep it in another place too:\n" +
			"without it nobody can read the backups.\n\n" +
			"--env sets what the place needs, as AWS_ACCESS_KEY_ID. With KEY=@FILE the value is what\n" +
			"the file holds, and is not to be seen in a list of processes. So it has to be for the\n" +
			"variables that are the path of a file:\n" +
			strings.Join(backup.FileVariables, ", ") + ".",
		Example: "  docker berth target add nas sftp:berth@nas:/backup --ssh-key ~/.ssh/backup --known-hosts ~/.ssh/known_hosts\n" +
			"  docker berth target add s3 s3:https://s3.example.com/berth --password-file password \\\n" +
			"    --env AWS_ACCESS_KEY_ID=berth --env AWS_SECRET_ACCESS_KEY=@secret --limit-upload 10M",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.addTarget(ctx, args[0], args[1], &o))
		},
	}
	set := cmd.Flags()
	set.StringVar(&o.engine, "engine", backup.Restic, "`ENGINE` that keeps the backups: "+backup.Restic+" or "+backup.Archive)
	set.StringVar(&o.passwordFile, "password-file", "", "`FILE` with the password of the repository, - for standard input")
	set.StringArrayVar(&o.variables, "env", nil, "`KEY=VALUE` or KEY=@FILE that the repository's place needs")
	set.StringVar(&o.sshKey, "ssh-key", "", "`FILE` with the private key for sftp")
	set.StringVar(&o.knownHosts, "known-hosts", "", "`FILE` with the keys of sftp servers")
	set.StringVar(&o.caCert, "ca-cert", "", "`FILE` with the certificates that signed that of an https server")
	set.StringVar(&o.upload, "limit-upload", noSize, "Send at most this much in a second, as 500K or 10M: `RATE`")
	set.StringVar(&o.download, "limit-download", noSize, "Receive at most this much in a second: `RATE`")
	set.StringVar(&o.prune, "prune", "", "`SCHEDULE` by which the space of removed backups is freed, or "+backup.Never+" (default once a week)")
	set.StringVar(&o.check, "check", "", "`SCHEDULE` by which the repository is looked through for damage, or "+backup.Never+" (default once a week)")
	set.StringVar(&o.verify, "verify", "", "`SCHEDULE` by which a backup chosen by chance is restored for a test, and removed again (default "+backup.Never+")")
	set.StringVar(&o.share, "check-share", "0%", "`PERCENT` of the data that a check reads")
	set.BoolVar(&o.replace, "replace", false, "Replace a target of that name")
	complete(cmd, "engine", backup.Restic, backup.Archive)
	complete(cmd, "prune", "@daily", "@weekly", "@monthly", backup.Never)
	complete(cmd, "verify", "@daily", "@weekly", "@monthly", backup.Never)
	complete(cmd, "check", "@daily", "@weekly", "@monthly", backup.Never)
	return cmd
}

// spec is what the flags say, without a look at any file.
func (o *targetOptions) spec(name, repository string) (spec control.TargetSpec, err error) {
	spec = control.TargetSpec{Name: name, Engine: o.engine, Repository: repository, PruneSchedule: o.prune, CheckSchedule: o.check, VerifySchedule: o.verify, Replace: o.replace}
	if err := backup.CheckTarget(name); err != nil {
		return spec, err
	}
	if o.engine != backup.Restic && o.engine != backup.Archive {
		return spec, fault.Invalid("--engine %q: want %s or %s", o.engine, backup.Restic, backup.Archive)
	}
	if spec.UploadLimit, err = parseRate("--limit-upload", o.upload); err != nil {
		return spec, err
	}
	if spec.DownloadLimit, err = parseRate("--limit-download", o.download); err != nil {
		return spec, err
	}
	spec.CheckShare, err = parsePercent("--check-share", o.share)
	return spec, err
}

// parseRate reads what goes over the wire in a second, and returns KiB.
func parseRate(flag, text string) (int, error) {
	if text == noSize {
		return 0, nil
	}
	n, err := units.RAMInBytes(text)
	if err != nil || n < units.KiB || strings.Trim(text, "0123456789.") == "" {
		return 0, fault.Invalid("%s %q: want a number with a unit, as 500K or 10M, or %s", flag, text, noSize)
	}
	return int(n / units.KiB), nil
}

// parsePercent reads a part of a whole, with or without the sign, and returns it as a
// number from 0 to 1.
func parsePercent(flag, text string) (float64, error) {
	const whole = 100
	n, err := strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
	if err != nil || !(n >= 0 && n <= whole) {
		return 0, fault.Invalid("%s %q: want a number from 0 to %d", flag, text, whole)
	}
	return n / whole, nil
}

func (a *app) addTarget(ctx context.Context, name, repository string, o *targetOptions) error {
	spec, err := o.spec(name, repository)
	if err != nil {
		return err
	}
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := o.read(ctx, a, &spec); err != nil {
		return err
	}
	show, end := a.progress("opening " + name)
	report, err := client.AddTarget(ctx, spec, show)
	end()
	if err != nil {
		return err
	}
	switch {
	case report.Made:
		fmt.Fprintf(a.Docker.Err(), "Made a repository at %s.\n", report.Target.Repository)
	default:
		fmt.Fprintf(a.Docker.Err(), "Opened the repository at %s: %s.\n", report.Target.Repository, contents(report))
	}
	fmt.Fprintln(a.Docker.Out(), report.Target.Name)
	return nil
}

// contents are in words what a repository has.
func contents(r control.TargetReport) string {
	return fmt.Sprintf("%s of %s", plural(r.Backups, "backup"), plural(r.Volumes, "volume"))
}

// plural is a number of things.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}

func (a *app) targetListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List targets", Args: cli.NoArgs,
		Long:              "List targets. No repository is asked: the status is what was last found.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listTargets(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display names", "engine=restic", "name", "engine", "status")
	return cmd
}

func (a *app) listTargets(ctx context.Context, o *listOptions) error {
	args, client, err := a.filtered(ctx, o, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	targets, err := client.Targets(ctx)
	if err != nil {
		return err
	}
	slices.SortStableFunc(targets, func(x, y control.Target) int { return compareNames(x.Name, y.Name) })
	var rows []formatter.SubContext
	for _, t := range targets {
		row := &targetRow{t: t}
		if args.Match("name", t.Name) && args.ExactMatch("engine", row.Engine()) && args.ExactMatch("status", row.Status()) {
			rows = append(rows, row)
		}
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Name}}\t{{.Engine}}\t{{.Repository}}\t{{.Volumes}}\t{{.Pruned}}\t{{.Checked}}\t{{.Status}}`,
		quiet: "{{.Name}}",
		header: formatter.SubHeaderContext{
			"Name": "NAME", "Engine": "ENGINE", "Repository": "REPOSITORY", "Volumes": "VOLUMES", "Pruned": "PRUNED", "Checked": "CHECKED", "Status": "STATUS",
			"Error": "ERROR", "Prune": "PRUNE", "NextPrune": "NEXT PRUNE", "Check": "CHECK", "NextCheck": "NEXT CHECK", "CheckShare": "CHECK SHARE",
			"Variables": "VARIABLES", "Files": "FILES", "UploadLimit": "UPLOAD LIMIT", "DownloadLimit": "DOWNLOAD LIMIT",
		},
	}, rows)
}

// targetRow is a target in a list. Its methods are the fields of templates.
type targetRow struct {
	formatter.HeaderContext
	t control.Target
}

// MarshalJSON gives all fields.
func (r *targetRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Name is the administrator's.
func (r *targetRow) Name() string { return r.t.Name }

// Engine keeps the backups; "" when the target cannot be read.
func (r *targetRow) Engine() string { return r.t.Engine }

// Repository has no password.
func (r *targetRow) Repository() string { return r.t.Repository }

// Volumes is how many are backed up to it by schedule.
func (r *targetRow) Volumes() int { return len(r.t.Volumes) }

// Pruned is the time since the space of removed backups was last freed.
func (r *targetRow) Pruned() string { return ago(r.prune().Last) }

// Checked is the time since the repository was last looked through.
func (r *targetRow) Checked() string { return ago(r.check().Last) }

// Status is ok, unusable, or what failed the last time.
func (r *targetRow) Status() string {
	switch {
	case r.t.Error != "":
		return "unusable"
	case r.check().LastError != "":
		return "check failed"
	case r.t.Verify != nil && r.t.Verify.LastError != "":
		return "verify failed"
	case r.prune().LastError != "":
		return "prune failed"
	default:
		return "ok"
	}
}

// Error is the reason of a status that is not ok.
func (r *targetRow) Error() string {
	return cmp.Or(r.t.Error, r.check().LastError, r.prune().LastError)
}

// Prune is the schedule by which space is freed; "" is never.
func (r *targetRow) Prune() string { return r.prune().Spec }

// NextPrune is the time until that is due.
func (r *targetRow) NextPrune() string { return until(r.prune().Next) }

// Check is the schedule by which the repository is looked through; "" is never.
func (r *targetRow) Check() string { return r.check().Spec }

// NextCheck is the time until that is due.
func (r *targetRow) NextCheck() string { return until(r.check().Next) }

// CheckShare is how much of the data that reads.
func (r *targetRow) CheckShare() string {
	const whole = 100
	return strconv.FormatFloat(r.t.CheckShare*whole, 'g', 6, 64) + "%"
}

// Variables are the names of those that are set.
func (r *targetRow) Variables() string { return strings.Join(r.t.Variables, ", ") }

// Files are the names of those that are stored.
func (r *targetRow) Files() string { return strings.Join(r.t.Files, ", ") }

// UploadLimit is how much is sent in a second; "" is no limit.
func (r *targetRow) UploadLimit() string { return human(uint64(r.t.UploadLimit) * units.KiB) }

// DownloadLimit is how much is received in a second; "" is no limit.
func (r *targetRow) DownloadLimit() string { return human(uint64(r.t.DownloadLimit) * units.KiB) }

func (r *targetRow) prune() control.Schedule { return scheduled(r.t.Prune) }
func (r *targetRow) check() control.Schedule { return scheduled(r.t.Check) }

// scheduled is a schedule, or an empty one for none.
func scheduled(s *control.Schedule) control.Schedule {
	if s == nil {
		return control.Schedule{}
	}
	return *s
}

func (a *app) targetInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] NAME [NAME...]", Short: "Display what Berth knows of targets, without their secrets", Args: cli.RequiresMinArgs(1),
		ValidArgsFunction: a.completeTargets(many),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.inspectTargets(cmd.Context(), args, format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

func (a *app) inspectTargets(ctx context.Context, names []string, format string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	targets, err := client.Targets(ctx)
	if err != nil {
		return err
	}
	return inspect.Inspect(a.Docker.Out(), names, format, func(name string) (any, []byte, error) {
		i := slices.IndexFunc(targets, func(t control.Target) bool { return t.Name == name })
		if i < 0 {
			return nil, nil, fault.NotFound("there is no target %s", name)
		}
		return targets[i], nil, nil
	})
}

func (a *app) targetTestCommand() *cobra.Command {
	return &cobra.Command{
		Use: "test NAME", Short: "Open a target's repository and count what is in it", Args: cli.ExactArgs(1),
		ValidArgsFunction: a.completeTargets(one),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.testTarget(ctx, args[0]))
		},
	}
}

func (a *app) testTarget(ctx context.Context, name string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("opening " + name)
	report, err := client.TestTarget(ctx, control.TargetRef{Name: name}, show)
	end()
	if err != nil {
		return err
	}
	fmt.Fprintf(a.Docker.Out(), "%s: opened in %s, %s\n", report.Target.Name, report.Took.Round(time.Millisecond), contents(report))
	return nil
}

func (a *app) targetRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm [OPTIONS] NAME [NAME...]", Aliases: []string{"remove"}, Short: "Forget targets", Args: cli.RequiresMinArgs(1),
		Long: "Forget targets with their passwords, after having asked, and print their names. The\n" +
			"repositories stay as they are. One that a volume's schedule uses is refused.",
		ValidArgsFunction: a.completeTargets(many),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.removeTargets(ctx, args, force))
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not prompt for confirmation")
	return cmd
}

func (a *app) removeTargets(ctx context.Context, names []string, force bool) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if !force {
		fmt.Fprintf(a.Docker.Err(), "WARNING! This will forget how to open %s. Nobody reads the backups without the password.\n", strings.Join(names, ", "))
		if err := a.confirm(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, name := range names {
		if err := client.RemoveTarget(ctx, control.TargetRef{Name: name}); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.Docker.Out(), name)
	}
	return errors.Join(errs...)
}
