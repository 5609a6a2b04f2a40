package commands

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/opts"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

func (a *app) backupRestoreCommand() *cobra.Command {
	var paths []string
	var inPlace bool
	options := opts.NewMapOpts(nil, nil)
	cmd := &cobra.Command{
		Use: "restore [OPTIONS] REFERENCE [NEW]", Short: "Make a volume with the data of a backup", Args: cli.RequiresRangeArgs(1, 2),
		Long: "Make a volume with the data of a backup, named NEW or as it was, and print its name. It has\n" +
			"the options of the volume that was backed up, without those that say where it was (root and\n" +
			"engine), where -o says nothing else. An interrupted restore leaves nothing behind.\n\n" +
			"With --in-place the volume is there already and its data is replaced. What it had before\n" +
			"becomes a snapshot, whose name is printed: docker berth volume rollback undoes the restore.\n" +
			"Stop the containers that use the volume first. With --path only that is replaced, and all\n" +
			"else stays as it is; directories above it that are gone are made anew.",
		Example: "  docker berth backup restore nas/db@latest db-test\n  docker berth backup restore nas/db@2026-01-31 --in-place\n" +
			"  docker berth backup restore nas/db --in-place --path etc/app.conf\n" +
			"  docker berth backup restore nas/db conf --path etc --path var/lib/app.conf",
		ValidArgsFunction: a.completeReferences(one, true),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := control.RestoreRequest{Reference: args[0], InPlace: inPlace, Options: options.GetAll()}
			ref, err := backup.ParseReference(args[0])
			if err != nil {
				return err
			}
			if req.Name = ref.Volume; len(args) > 1 {
				req.Name = args[1]
			}
			if inPlace && len(req.Options) > 0 {
				return fault.Invalid("--opt is for a new volume: docker berth volume set changes the options of one that is there")
			}
			if req.Paths, err = restorePaths(paths); err != nil {
				return err
			}
			ctx, done := interruptible(cmd)
			return done(a.restoreBackup(ctx, req))
		},
	}
	set := cmd.Flags()
	set.BoolVar(&inPlace, "in-place", false, "Replace the data of a volume that is there")
	set.StringArrayVar(&paths, "path", nil, "Restore only `PATH` in the volume and what is below it; may be repeated")
	set.VarP(options, "opt", "o", "Options of the new volume, as docker volume create takes them")
	return cmd
}

// restorePaths gives paths the form that the daemon takes: relative to the volume's top.
func restorePaths(paths []string) (clean []string, _ error) {
	for _, p := range paths {
		if slices.Contains(strings.Split(p, "/"), "..") || path.Clean("/"+p) == "/" {
			return nil, fault.Invalid("--path %q: want a path below the top of the volume, as etc/app.conf", p)
		}
		clean = append(clean, path.Clean("/" + p)[1:])
	}
	return clean, nil
}

func (a *app) restoreBackup(ctx context.Context, req control.RestoreRequest) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if req.InPlace {
		// The daemon refuses it too, and does not know the names.
		if running := runningNames(a.users(ctx)[req.Name]); running != "" {
			return fault.Conflict("volume %s is used by %s: stop that first, or restore to a new volume", req.Name, running)
		}
	} else if err := a.checkFree(ctx, req.Name); err != nil {
		return fmt.Errorf("%w; give the restored one another name, or use --in-place: docker berth backup restore %s NEW", err, req.Reference)
	}
	show, end := a.progress("restoring " + req.Name)
	done, err := client.RestoreBackup(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	if done.Kept == nil {
		fmt.Fprintln(a.Docker.Out(), done.Volume.Name)
		return nil
	}
	what := "the data"
	if len(req.Paths) > 0 {
		what = strings.Join(req.Paths, ", ")
	}
	fmt.Fprintf(a.Docker.Err(), "Volume %s has %s of %s. What it had before is the snapshot:\n", done.Volume.Name, what, done.Backup.Reference)
	fmt.Fprintln(a.Docker.Out(), refOf(*done.Kept))
	return nil
}
