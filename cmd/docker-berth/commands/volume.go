package commands

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/cli/cli/flags"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce"
)

func (a *app) volumeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Short: "Manage Berth's volumes", Args: cli.NoArgs, RunE: help}
	cmd.AddCommand(
		a.volumeListCommand(), a.volumeInspectCommand(), a.volumeUsageCommand(), a.volumeCloneCommand(), a.volumeRollbackCommand(),
		a.volumeRenameCommand(), a.volumeResizeCommand(), a.volumeSetCommand(), a.volumeAdoptCommand(), a.volumePruneCommand(),
	)
	return cmd
}

func (a *app) volumeListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List Berth's volumes", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.listVolumes(cmd.Context(), &o) },
	}
	o.install(cmd, "Only display volume names", "state=broken", "name", "engine", "root", "state", "label", "container", "dangling")
	return cmd
}

func (a *app) listVolumes(ctx context.Context, o *listOptions) error {
	args, err := o.filters()
	if err != nil {
		return err
	}
	dangling, err := args.GetBoolOrDefault("dangling", false)
	if err != nil {
		return fault.Invalid("filter dangling=%s: want true or false", strings.Join(args.Get("dangling"), ", "))
	}
	volumes, err := a.volumes(ctx)
	if err != nil {
		return err
	}
	var users map[string][]quiesce.User
	if args.Contains("dangling") || args.Contains("container") {
		// Without Docker's answer every volume would look unused.
		users, err = a.tryUsers(ctx)
	} else {
		users = a.users(ctx)
	}
	if err != nil {
		return err
	}
	var rows []formatter.SubContext
	for _, v := range volumes {
		unused := len(users[v.Name]) == 0 && len(v.Users) == 0
		if args.Match("name", v.Name) && args.ExactMatch("engine", v.Engine) && args.ExactMatch("root", v.Root) &&
			args.ExactMatch("state", string(v.State)) && args.MatchKVList("label", v.Labels) &&
			(!args.Contains("container") || slices.ContainsFunc(users[v.Name], func(u quiesce.User) bool { return matches(args, "container", u.ID, u.Name) })) &&
			(!args.Contains("dangling") || unused == dangling) {
			rows = append(rows, &volumeRow{v: v, users: users[v.Name]})
		}
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Name}}\t{{.Engine}}\t{{.Size}}\t{{.Used}}\t{{.Snapshots}}\t{{.Containers}}\t{{.State}}\t{{.Created}}`,
		quiet: "{{.Name}}",
		header: formatter.SubHeaderContext{
			"Name": "VOLUME NAME", "Engine": "ENGINE", "FileSystem": "FILE SYSTEM", "Root": "ROOT", "Size": "SIZE", "Used": "USED",
			"Snapshots": "SNAPSHOTS", "Containers": "CONTAINERS", "Hosts": "HOSTS", "State": "STATE", "Error": "ERROR", "Created": "CREATED",
			"CreatedAt": "CREATED AT", "UUID": "UUID", "Mountpoint": "MOUNTPOINT", "OnRemove": "ON REMOVE", "Protect": "PROTECT", "ReadOnly": "READ ONLY",
			"Exclusive": "EXCLUSIVE", "Adopted": "ADOPTED", "Labels": "LABELS", "Schedule": "SCHEDULE", "Keep": "KEEP", "NextSnapshot": "NEXT SNAPSHOT",
			"Consistency": "CONSISTENCY", "BackupTarget": "BACKUP TARGET", "BackupSchedule": "BACKUP SCHEDULE", "BackupKeep": "BACKUP KEEP",
			"NextBackup": "NEXT BACKUP", "LastBackup": "LAST BACKUP", "BackupError": "BACKUP ERROR",
		},
	}, rows)
}

// volumes asks the daemon that is meant for all volumes, by name as people count.
func (a *app) volumes(ctx context.Context) ([]control.Volume, error) {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	volumes, err := client.Volumes(ctx)
	slices.SortStableFunc(volumes, func(x, y control.Volume) int { return compareNames(x.Name, y.Name) })
	return volumes, err
}

// users asks Docker for the containers that have volumes. Without them none are shown,
// and the user is told why.
func (a *app) users(ctx context.Context) map[string][]quiesce.User {
	users, err := a.tryUsers(ctx)
	if err != nil {
		fmt.Fprintf(a.Docker.Err(), "WARNING: containers are not shown: %v\n", err)
	}
	return users
}

func (a *app) tryUsers(ctx context.Context) (map[string][]quiesce.User, error) {
	if err := engine.CheckLocal(a.Docker.Host(), a.Docker.Context()); err != nil {
		return nil, fmt.Errorf("the Docker context %q is the engine of another machine", a.Docker.Context())
	}
	return quiesce.Users(ctx, a.Docker.API())
}

// human is a size as tables show it; "" for none.
func human(n uint64) string {
	if n == 0 {
		return ""
	}
	return units.BytesSize(float64(n))
}

// volumeRow is a volume in a list. Its methods are the fields of templates.
type volumeRow struct {
	formatter.HeaderContext
	v     control.Volume
	users []quiesce.User
}

// MarshalJSON gives all fields.
func (r *volumeRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Name is the volume's.
func (r *volumeRow) Name() string { return r.v.Name }

// UUID is the volume's for its whole life.
func (r *volumeRow) UUID() string { return r.v.UUID }

// Engine keeps the data.
func (r *volumeRow) Engine() string { return r.v.Engine }

// FileSystem is that of the data.
func (r *volumeRow) FileSystem() string { return r.v.FileSystem }

// Root is the root's name; "" is the default one.
func (r *volumeRow) Root() string { return r.v.Root }

// Size is the limit; "" is none.
func (r *volumeRow) Size() string { return human(r.v.Size) }

// Used is what the data took when it was last measured; "" when it never was.
func (r *volumeRow) Used() string {
	if r.v.UsedAt.IsZero() {
		return ""
	}
	return units.BytesSize(float64(r.v.Used))
}

// Snapshots is how many there are.
func (r *volumeRow) Snapshots() int { return r.v.SnapshotCount }

// Containers are the names of those that have the volume, whether or not they run.
func (r *volumeRow) Containers() string {
	var names []string
	for _, u := range r.users {
		names = append(names, named(u.Name, u.ID))
	}
	return strings.Join(names, ", ")
}

// Hosts are those that have it mounted.
func (r *volumeRow) Hosts() string {
	var names []string
	for _, u := range r.v.Users {
		names = append(names, u.Host)
	}
	return strings.Join(names, ", ")
}

// State is ready, creating, restoring with how far that is, removing, broken or away.
func (r *volumeRow) State() string {
	return strings.TrimSpace(string(r.v.State) + " " + percent(r.v.Progress))
}

// Error is what is wrong with it.
func (r *volumeRow) Error() string { return r.v.Error }

// Created is the time since then.
func (r *volumeRow) Created() string { return ago(r.v.Created) }

// CreatedAt is the time in the form of RFC 3339.
func (r *volumeRow) CreatedAt() string { return at(r.v.Created) }

// Mountpoint is the path that Docker is given.
func (r *volumeRow) Mountpoint() string { return r.v.Mountpoint }

// OnRemove is trash, keep or purge.
func (r *volumeRow) OnRemove() string { return r.v.OnRemove }

// Protect says that it cannot be removed.
func (r *volumeRow) Protect() bool { return r.v.Protect }

// ReadOnly says that containers cannot write.
func (r *volumeRow) ReadOnly() bool { return r.v.ReadOnly }

// Exclusive says that one host at a time has it.
func (r *volumeRow) Exclusive() bool { return r.v.Exclusive }

// Adopted says that the data was there before the volume.
func (r *volumeRow) Adopted() bool { return r.v.Adopted }

// Labels are separated by commas.
func (r *volumeRow) Labels() string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(r.v.Labels)) {
		list = append(list, key+"="+r.v.Labels[key])
	}
	return strings.Join(list, ",")
}

// Label is one of the labels.
func (r *volumeRow) Label(key string) string { return r.v.Labels[key] }

// Schedule makes snapshots; "" is none.
func (r *volumeRow) Schedule() string { return r.schedule().Spec }

// Keep is how many snapshots stay.
func (r *volumeRow) Keep() string { return r.schedule().Keep }

// NextSnapshot is the time until the schedule makes one.
func (r *volumeRow) NextSnapshot() string { return until(r.schedule().Next) }

// Consistency of a snapshot that nothing is paused for.
func (r *volumeRow) Consistency() string { return string(r.v.Consistency) }

// BackupTarget is where a schedule backs it up to; "" is the only target there is.
func (r *volumeRow) BackupTarget() string { return r.backup().Target }

// BackupSchedule makes backups; "" is none.
func (r *volumeRow) BackupSchedule() string { return r.backup().Schedule }

// BackupKeep is how many backups stay.
func (r *volumeRow) BackupKeep() string { return r.backup().Keep }

// NextBackup is the time until the schedule makes one.
func (r *volumeRow) NextBackup() string { return until(r.backup().Next) }

// LastBackup is the age of the last good one that this host knows of; "" is none.
func (r *volumeRow) LastBackup() string { return ago(r.backup().GoodTime) }

// BackupError is what was wrong with the last one.
func (r *volumeRow) BackupError() string { return r.backup().LastError }

func (r *volumeRow) backup() control.VolumeBackup {
	if r.v.Backup == nil {
		return control.VolumeBackup{}
	}
	return *r.v.Backup
}

func (r *volumeRow) schedule() control.Schedule { return scheduled(r.v.Schedule) }

func (a *app) volumeInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] VOLUME [VOLUME...]", Short: "Display what Berth knows of volumes", Args: cli.RequiresMinArgs(1),
		ValidArgsFunction: a.completeVolumes(many),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.inspectVolumes(cmd.Context(), args, format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

// volumeDetail is a volume with the containers that have it.
type volumeDetail struct {
	control.Volume
	Containers []volumeContainer
}

// volumeContainer is a container that has a volume, whether or not it runs.
type volumeContainer struct {
	Container, ContainerID string
	// State is Docker's word for it.
	State string
}

func (a *app) inspectVolumes(ctx context.Context, refs []string, format string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	users := a.users(ctx)
	return inspect.Inspect(a.Docker.Out(), refs, format, func(ref string) (any, []byte, error) {
		if strings.Contains(ref, "@") {
			return nil, nil, fault.Invalid("%s is a snapshot: docker berth snapshot inspect %s", ref, ref)
		}
		v, err := client.Volume(ctx, ref)
		if err != nil {
			return nil, nil, err
		}
		detail := volumeDetail{Volume: v, Containers: []volumeContainer{}}
		for _, u := range users[v.Name] {
			detail.Containers = append(detail.Containers, volumeContainer{Container: u.Name, ContainerID: u.ID, State: u.State})
		}
		return detail, nil, nil
	})
}

func (a *app) volumeUsageCommand() *cobra.Command {
	var o listOptions
	var roots bool
	cmd := &cobra.Command{
		Use: "df [OPTIONS] [VOLUME...]", Short: "Show the space that volumes and their snapshots take",
		Long: "Show the space that volumes and their snapshots take, and what is left.\n\n" +
			"With engines that have no better means every file is looked at, which takes its time.",
		ValidArgsFunction: a.completeVolumes(many),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.volumeUsage(ctx, &o, args, roots))
		},
	}
	o.install(cmd, "Only display volume names", "")
	cmd.Flags().BoolVar(&roots, "roots", false, "Show the roots that volumes are on instead of the volumes")
	return cmd
}

func (a *app) volumeUsage(ctx context.Context, o *listOptions, volumes []string, roots bool) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("measuring")
	report, err := client.VolumeUsage(ctx, control.UsageRequest{Volumes: volumes}, show)
	end()
	if err != nil {
		return err
	}
	for _, v := range report.Volumes {
		if v.Error != "" {
			fmt.Fprintf(a.Docker.Err(), "WARNING: %s could not be measured: %s\n", v.Name, v.Error)
		}
	}
	for _, r := range report.Roots {
		if r.Error != "" {
			fmt.Fprintf(a.Docker.Err(), "WARNING: root %s could not be measured: %s\n", cmp.Or(r.Name, r.Path), r.Error)
		}
	}
	var rows []formatter.SubContext
	if roots {
		for _, r := range report.Roots {
			rows = append(rows, &rootRow{r: r})
		}
		return o.write(a.Docker.Out(), layout{
			table: `{{.Name}}\t{{.Path}}\t{{.FileSystem}}\t{{.Size}}\t{{.Used}}\t{{.Free}}\t{{.Volumes}}\t{{.Trash}}\t{{.TrashUsed}}`, quiet: "{{.Name}}",
			header: formatter.SubHeaderContext{
				"Name": "ROOT", "Path": "PATH", "FileSystem": "FILE SYSTEM", "Size": "SIZE", "Used": "USED", "Free": "FREE", "Volumes": "VOLUMES",
				"Trash": "IN TRASH", "TrashUsed": "TRASH USED", "Error": "ERROR",
			},
		}, rows)
	}
	slices.SortStableFunc(report.Volumes, func(x, y control.VolumeUsage) int { return compareNames(x.Name, y.Name) })
	for _, v := range report.Volumes {
		rows = append(rows, &usageRow{u: v})
	}
	return o.write(a.Docker.Out(), layout{
		table: `{{.Name}}\t{{.Engine}}\t{{.Used}}\t{{.Limit}}\t{{.Free}}\t{{.Files}}\t{{.Snapshots}}\t{{.SnapshotsUsed}}\t{{.Exclusive}}`, quiet: "{{.Name}}",
		header: formatter.SubHeaderContext{
			"Name": "VOLUME NAME", "Engine": "ENGINE", "Root": "ROOT", "Used": "USED", "Limit": "LIMIT", "Free": "FREE", "Files": "FILES",
			"Snapshots": "SNAPSHOTS", "SnapshotsUsed": "SNAPSHOTS USED", "Exclusive": "EXCLUSIVE", "Error": "ERROR",
		},
	}, rows)
}

// usageRow is a volume's space in a list. Its methods are the fields of templates.
type usageRow struct {
	formatter.HeaderContext
	u control.VolumeUsage
}

// MarshalJSON gives all fields.
func (r *usageRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// measured is a number that is there unless the volume could not be measured.
func (r *usageRow) measured(n uint64) string {
	if r.u.Error != "" {
		return ""
	}
	return units.BytesSize(float64(n))
}

// Name is the volume's.
func (r *usageRow) Name() string { return r.u.Name }

// Engine keeps the data.
func (r *usageRow) Engine() string { return r.u.Engine }

// Root is the root's name; "" is the default one.
func (r *usageRow) Root() string { return r.u.Root }

// Used is what the data takes.
func (r *usageRow) Used() string { return r.measured(r.u.Used) }

// Limit is what it may take; "" is no limit.
func (r *usageRow) Limit() string { return human(r.u.Limit) }

// Free is what can still be written.
func (r *usageRow) Free() string { return r.measured(r.u.Free) }

// Files is how many inodes the data has.
func (r *usageRow) Files() string {
	if r.u.Error != "" {
		return ""
	}
	return strconv.FormatUint(r.u.Files, 10)
}

// Snapshots is how many there are.
func (r *usageRow) Snapshots() int { return r.u.Snapshots }

// SnapshotsUsed is what these take beside the data; "" when not known.
func (r *usageRow) SnapshotsUsed() string { return human(r.u.SnapshotsUsed) }

// Exclusive is what the volume's removal would free; "" when not known.
func (r *usageRow) Exclusive() string { return human(r.u.Exclusive) }

// Error is why it could not be measured.
func (r *usageRow) Error() string { return r.u.Error }

// rootRow is a root's space in a list. Its methods are the fields of templates.
type rootRow struct {
	formatter.HeaderContext
	r control.RootUsage
}

// MarshalJSON gives all fields.
func (r *rootRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Name is the root's; the default one has none of its own.
func (r *rootRow) Name() string { return cmp.Or(r.r.Name, "(default)") }

// Path is where it is as the daemon sees it.
func (r *rootRow) Path() string { return r.r.Path }

// FileSystem is the root's.
func (r *rootRow) FileSystem() string { return r.r.FileSystem }

// Size is that of the file system.
func (r *rootRow) Size() string { return human(r.r.Size) }

// Used is what is used of it by whomever.
func (r *rootRow) Used() string { return human(r.r.Used) }

// Free is what volumes can still have.
func (r *rootRow) Free() string { return human(r.r.Free) }

// Volumes is how many there are.
func (r *rootRow) Volumes() int { return r.r.Volumes }

// Trash is how many removed volumes there are.
func (r *rootRow) Trash() int { return r.r.Trash }

// TrashUsed is the space that they take; "" when not known.
func (r *rootRow) TrashUsed() string { return human(r.r.TrashUsed) }

// Error is why it does not answer.
func (r *rootRow) Error() string { return r.r.Error }
