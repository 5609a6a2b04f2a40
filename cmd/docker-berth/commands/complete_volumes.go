package commands

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
)

// How many objects a command takes.
const (
	one  = false
	many = true
)

const (
	noFiles = cobra.ShellCompDirectiveNoFileComp
	noSpace = noFiles | cobra.ShellCompDirectiveNoSpace
)

// ask returns what a daemon with volumes answers; nothing when it does not.
func ask[T any](ctx context.Context, a *app, call func(*control.Client, context.Context) ([]T, error)) []T {
	ctx, cancel := context.WithTimeout(ctx, completeTime)
	defer cancel()
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return nil
	}
	defer client.Close()
	answer, err := call(client, ctx)
	if err != nil {
		return nil
	}
	return answer
}

func (a *app) volumeNames(ctx context.Context) (names []string) {
	for _, v := range ask(ctx, a, (*control.Client).Volumes) {
		names = append(names, v.Name)
	}
	slices.SortFunc(names, compareNames)
	return names
}

func (a *app) snapshotsOf(ctx context.Context, volume string) []control.Snapshot {
	return ask(ctx, a, func(c *control.Client, ctx context.Context) ([]control.Snapshot, error) {
		return c.Snapshots(ctx, volume)
	})
}

// completeVolumes offers volumes that are not named yet, or only the first one.
func (a *app) completeVolumes(several bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if !several && len(args) > 0 {
			return nil, noFiles
		}
		return slices.DeleteFunc(a.volumeNames(cmd.Context()), func(name string) bool { return slices.Contains(args, name) }), noFiles
	}
}

// completeClone offers what can be cloned: volumes, and the snapshots of the one that
// is begun.
func (a *app) completeClone(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	switch {
	case len(args) > 0:
		return nil, noFiles
	case strings.Contains(begun, "@"):
		return a.completeSnapshots(cmd, args, begun)
	default:
		return a.volumeNames(cmd.Context()), noFiles
	}
}

// completeSnapshots offers volumes until one is chosen and then its snapshots.
func (a *app) completeSnapshots(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	volume, _, chosen := strings.Cut(begun, "@")
	var refs []string
	if !chosen {
		for _, v := range ask(cmd.Context(), a, (*control.Client).Volumes) {
			if v.SnapshotCount > 0 {
				refs = append(refs, v.Name+"@")
			}
		}
		slices.SortFunc(refs, compareNames)
		return refs, noSpace
	}
	for _, s := range a.snapshotsOf(cmd.Context(), volume) {
		if ref := refOf(s); !slices.Contains(args, ref) {
			refs = append(refs, ref)
		}
	}
	return refs, noFiles
}

// completeSnapshotOfVolume offers a volume and then its snapshots.
func (a *app) completeSnapshotOfVolume(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.volumeNames(cmd.Context()), noFiles
	}
	if len(args) > 1 {
		return nil, noFiles
	}
	var names []string
	for _, s := range a.snapshotsOf(cmd.Context(), args[0]) {
		names = append(names, s.Name)
	}
	return names, noFiles
}

// completeSet offers a volume and then what can be set.
func (a *app) completeSet(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.volumeNames(cmd.Context()), noFiles
	}
	return []string{
		"backup.keep=", "backup.schedule=", "backup.schedule=@daily", "backup.schedule=@hourly", "backup.schedule=@weekly", "backup.target=",
		"label.", "on-remove=keep", "on-remove=purge", "on-remove=trash", "protect=false", "protect=true", "snapshot.keep=",
		"snapshot.schedule=", "snapshot.schedule=@daily", "snapshot.schedule=@hourly", "snapshot.schedule=@weekly", "trash.keep=",
	}, noSpace
}

// completeTrash offers the names of removed volumes, and the IDs of those that share one.
func (a *app) completeTrash(several bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if !several && len(args) > 0 {
			return nil, noFiles
		}
		entries := newestFirst(ask(cmd.Context(), a, (*control.Client).Trash))
		count := map[string]int{}
		for _, e := range entries {
			count[e.Name]++
		}
		var refs []string
		for _, e := range entries {
			ref := e.Name
			if several && count[e.Name] > 1 {
				ref = e.UUID
			}
			if !slices.Contains(args, ref) && !slices.Contains(refs, ref) {
				refs = append(refs, ref)
			}
		}
		return refs, noFiles
	}
}
