package commands

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// complete offers words for a flag.
func complete(cmd *cobra.Command, flag string, words ...string) {
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, noFiles)))
}

// completeTargetFlag offers targets for --target.
func (a *app) completeTargetFlag(cmd *cobra.Command) {
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("target", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.targetNames(cmd.Context()), noFiles
	}))
}

// completeVolumeFlag offers volumes for --volume.
func (a *app) completeVolumeFlag(cmd *cobra.Command) {
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("volume", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.volumeNames(cmd.Context()), noFiles
	}))
}

func (a *app) targetNames(ctx context.Context) (names []string) {
	for _, t := range ask(ctx, a, (*control.Client).Targets) {
		names = append(names, t.Name)
	}
	slices.SortFunc(names, compareNames)
	return names
}

// completeTargets offers targets that are not named yet, or only the first one.
func (a *app) completeTargets(several bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if !several && len(args) > 0 {
			return nil, noFiles
		}
		return slices.DeleteFunc(a.targetNames(cmd.Context()), func(name string) bool { return slices.Contains(args, name) }), noFiles
	}
}

// completeReferences offers a target, then a volume that has backups there, and then
// their IDs, the newest first, with latest before them if that will do. A repository
// that needs long to answer offers nothing.
func (a *app) completeReferences(several, latest bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if !several && len(args) > 0 {
			return nil, noFiles
		}
		target, rest, ok := strings.Cut(begun, "/")
		if !ok {
			return suffixed(a.targetNames(cmd.Context()), "/"), noSpace
		}
		volume, _, chosen := strings.Cut(rest, "@")
		if !chosen {
			volume = ""
		}
		backups := ask(cmd.Context(), a, func(c *control.Client, ctx context.Context) ([]control.Backup, error) {
			list, err := c.Backups(ctx, control.BackupsRequest{Target: target, Volume: volume}, nil)
			return list.Backups, err
		})
		var refs []string
		if !chosen {
			for _, b := range backups {
				refs = append(refs, target+"/"+b.Volume)
			}
			slices.SortFunc(refs, compareNames)
			return suffixed(slices.Compact(refs), "@"), noSpace
		}
		if latest && len(backups) > 0 {
			refs = append(refs, target+"/"+volume+"@"+backup.Latest)
		}
		for _, b := range slices.Backward(backups) {
			if ref := (&backupRow{b: b, o: &listOptions{}}).Reference(); !slices.Contains(args, ref) {
				refs = append(refs, ref)
			}
		}
		return refs, noFiles | cobra.ShellCompDirectiveKeepOrder
	}
}

func suffixed(names []string, suffix string) []string {
	for i := range names {
		names[i] += suffix
	}
	return names
}

// completeVerify offers targets, and what completeReferences does from the slash on.
func (a *app) completeVerify(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if strings.Contains(begun, "/") {
		return a.completeReferences(one, true)(cmd, args, begun)
	}
	return a.completeTargets(one)(cmd, args, begun)
}
