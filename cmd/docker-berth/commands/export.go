package commands

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func (a *app) backupExportCommand() *cobra.Command {
	var req control.ExportRequest
	var output string
	cmd := &cobra.Command{
		Use: "export [OPTIONS] VOLUME[@SNAPSHOT]", Short: "Write a volume or one of its snapshots as a tar archive", Args: cli.ExactArgs(1),
		Long: "Write a volume as a tar archive to standard output or to a file, from a snapshot that is made\n" +
			"for it and removed afterwards, or one of its snapshots. The archive has the volume as data, and\n" +
			"manifest.json, of which docker berth backup import makes the same volume.\n\n" +
			"An exit status of 0 says that the archive is whole. With --output FILE there is no file\n" +
			"otherwise, and what was there stays. When files could not be read their names are printed on\n" +
			"standard error, and the exit status is 3.",
		Example:           "  docker berth backup export db > db.tar.zst\n  docker berth backup export db@before --compress none | ssh nas docker berth backup import db",
		ValidArgsFunction: a.completeClone,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Volume, req.Snapshot, _ = strings.Cut(args[0], "@")
			if req.Compress != control.CompressZstd && req.Compress != control.CompressNone {
				return fault.Invalid("--compress %q: want %s or %s", req.Compress, control.CompressZstd, control.CompressNone)
			}
			if output == "" && isTerminal(a.Docker.Out()) {
				return fault.Invalid("standard output is a terminal: redirect it, or name a file with --output FILE")
			}
			ctx, done := interruptible(cmd)
			return done(a.exportVolume(ctx, req, output))
		},
	}
	set := cmd.Flags()
	set.StringVarP(&output, "output", "O", "", "Write to `FILE`, which is replaced when the archive is whole")
	set.StringVar(&req.Compress, "compress", control.CompressZstd, "`METHOD` of compression: zstd or none")
	complete(cmd, "compress", control.CompressZstd, control.CompressNone)
	return cmd
}

// isTerminal tells whether people see what is written to a stream, or type what is read
// from it.
func isTerminal(stream any) bool {
	terminal, ok := stream.(interface{ IsTerminal() bool })
	return ok && terminal.IsTerminal()
}

func (a *app) exportVolume(ctx context.Context, req control.ExportRequest, output string) error {
	client, err := a.connect(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	defer client.Close()
	show, end := a.progress("exporting " + req.Volume)
	defer end()
	var done control.Export
	write := func(w io.Writer) (err error) {
		done, err = client.ExportVolume(ctx, req, w, show)
		return err
	}
	if output == "" {
		err = write(a.Docker.Out())
	} else {
		err = replaceFile(output, write)
	}
	end()
	if err != nil {
		return fmt.Errorf("%w; what was written is not whole", err)
	}
	if done.MissingCount == 0 {
		return nil
	}
	for _, missing := range done.Missing {
		fmt.Fprintln(a.Docker.Err(), missing)
	}
	return cli.StatusError{StatusCode: exitIncomplete, Status: fmt.Sprintf("the archive of volume %s is incomplete: %s", done.Volume, missingWords(len(done.Missing)))}
}

// replaceFile gives a file the content that write writes, or leaves it as it is.
func replaceFile(path string, write func(io.Writer) error) error {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return fault.Invalid("--output %s: want the path of a file", path)
	}
	file, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(0o600), renameio.WithExistingPermissions())
	if err != nil {
		return fmt.Errorf("--output %s: %w", path, err)
	}
	err = write(file)
	if err == nil {
		err = file.CloseAtomicallyReplace()
	}
	return errors.Join(err, file.Cleanup())
}
