package commands

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/opts"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup/convoy"
)

func (a *app) backupImportCommand() *cobra.Command {
	var req control.ImportRequest
	var from control.ConvoyRequest
	options := opts.NewMapOpts(nil, nil)
	cmd := &cobra.Command{
		Use: "import [OPTIONS] NAME [FILE|-|URL]", Short: "Make a volume of a tar archive, or of a backup of convoy's", Args: cli.RequiresRangeArgs(1, 2),
		Long: "Make a volume with the content of a tar archive, of FILE or standard input, and print its name.\n" +
			"The archive may be compressed with zstd or gzip. The volume of an archive that docker berth\n" +
			"backup export has made gets the options that the exported one had, without those that say\n" +
			"where it was (root and engine), where -o says nothing else. All other archives are the\n" +
			"content of the volume, with --strip N without the first N parts of each path.\n\n" +
			"With --convoy, or the URL that convoy shows of a backup (vfs:///DIR?backup=...), the volume is\n" +
			"made of a backup that convoy's driver vfs has made. DIR is a directory as the daemon sees it.\n\n" +
			"No container gets the volume before it is whole. Of an archive that is damaged or cut off no\n" +
			"volume is made. What an archive lacks, or the volume cannot store, is told on standard error.",
		Example: "  docker berth backup import db db.tar.zst\n  docker berth backup import old --strip 1 < dbdata.tar\n" +
			"  docker berth backup import db --convoy /backup/convoy --volume db",
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name, req.Options = args[0], options.GetAll()
			file := "-"
			if len(args) > 1 {
				file = args[1]
			}
			ctx, done := interruptible(cmd)
			if from.Directory == "" && !convoy.IsURL(file) {
				if from.Volume != "" || from.Backup != "" {
					return fault.Invalid("--volume and --backup are for --convoy DIR")
				}
				return done(a.importFile(ctx, req, file))
			}
			if req.Strip != 0 {
				return fault.Invalid("--strip %d is for archives, not for backups of convoy's", req.Strip)
			}
			if len(args) > 1 {
				if from.Directory != "" || from.Volume != "" || from.Backup != "" {
					return fault.Invalid("%s: want either a file, a URL or --convoy DIR", file)
				}
				ref, err := convoy.ParseURL(file)
				if err != nil {
					return err
				}
				from.Directory, from.Volume, from.Backup = ref.Dir, ref.Volume, ref.Backup
			}
			if !filepath.IsAbs(from.Directory) {
				return fault.Invalid("--convoy %q: want the absolute path of a directory, as the daemon sees it", from.Directory)
			}
			from.Name, from.Options = req.Name, req.Options
			return done(a.importConvoy(ctx, from))
		},
	}
	set := cmd.Flags()
	set.IntVar(&req.Strip, "strip", 0, "Cut `N` leading parts off each path in the archive")
	set.StringVar(&from.Directory, "convoy", "", "Import a backup of convoy's from `DIR`, as the daemon sees it")
	set.StringVar(&from.Volume, "volume", "", "Convoy's name of the `VOLUME`")
	set.StringVar(&from.Backup, "backup", "", "Convoy's name of the `BACKUP`")
	set.VarP(options, "opt", "o", "Options of the new volume, as docker volume create takes them")
	return cmd
}

// importFile sends a file, "-" for standard input.
func (a *app) importFile(ctx context.Context, req control.ImportRequest, file string) error {
	if req.Strip < 0 {
		return fault.Invalid("--strip %d: want 0 or more", req.Strip)
	}
	archive := a.Docker.In()
	if file != "-" {
		opened, err := os.Open(file)
		if err != nil {
			return fault.Invalid("%w", err)
		}
		defer opened.Close()
		archive = opened
	} else if isTerminal(archive) {
		return fault.Invalid("standard input is a terminal: redirect it, or name a file")
	}
	return a.importBy(ctx, req.Name, func(client *control.Client, show func(control.Progress)) (control.Import, error) {
		return client.ImportVolume(ctx, req, archive, show)
	})
}

func (a *app) importConvoy(ctx context.Context, req control.ConvoyRequest) error {
	return a.importBy(ctx, req.Name, func(client *control.Client, show func(control.Progress)) (control.Import, error) {
		return client.ImportConvoy(ctx, req, show)
	})
}

func (a *app) importBy(ctx context.Context, name string, call func(*control.Client, func(control.Progress)) (control.Import, error)) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := a.checkFree(ctx, name); err != nil {
		return err
	}
	show, end := a.progress("importing " + name)
	done, err := call(client, show)
	end()
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), done.Volume.Name)
	tellLost(a.Docker.Err(), done)
	if done.Missing > 0 {
		return cli.StatusError{StatusCode: exitIncomplete, Status: fmt.Sprintf("volume %s is incomplete: %d files could not be read when the archive was made, and are not in it", done.Volume.Name, done.Missing)}
	}
	return nil
}

// tellLost tells what the volume could not store.
func tellLost(w io.Writer, done control.Import) {
	if done.Lost == 0 {
		return
	}
	fmt.Fprintf(w, "WARNING: the file system of volume %s cannot store %d extended attributes of the archive, among them:\n", done.Volume.Name, done.Lost)
	for _, some := range done.LostSome {
		fmt.Fprintln(w, some)
	}
}
