// Command berthd is the daemon behind Docker's Berth plugins: `berthd network`
// serves networks and addresses, `berthd volume` volumes, `berthd all` both on one
// socket. It runs as the entrypoint of a managed plugin or on its own.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/quiesce"
	"github.com/berth-plugin/berth/shared/settings"
	"github.com/berth-plugin/berth/volplugin/backup/restic"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

// version is set by the linker.
var version = "dev"

const socketDir = "/run/docker/plugins"

func main() {
	if filesystem.Watchdog() || quiesce.Init() {
		return
	}
	restic.Child()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "berthd:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "berthd",
		Short:         "Network, IPAM and volume plugins for Docker",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(
		serveCommand("network", "berth-net", "Serve networks and their addresses", true, false),
		serveCommand("volume", "berth-vol", "Serve volumes", false, true),
		serveCommand("all", "berth", "Serve networks, addresses and volumes on one socket", true, true),
	)
	return root
}

func serveCommand(use, driver, short string, network, volume bool) *cobra.Command {
	d := daemon{network: network, volume: volume}
	cmd := &cobra.Command{
		Use:                   use + " [OPTIONS]",
		Short:                 short,
		Args:                  cobra.NoArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for name, path := range map[string]*string{"socket": &d.socket, "state": &d.stateDir, "data": &d.dataDir, "mounts": &d.mountsDir, "host-mounts": &d.hostMounts, "docker-socket": &d.dockerSocket} {
				if *path != "" && !filepath.IsAbs(*path) {
					return fmt.Errorf("--%s %q: want an absolute path", name, *path)
				}
			}
			// A plugin's standard error is all shown as errors by dockerd, which
			// adds the time as well.
			logger := logrus.New()
			logger.SetOutput(os.Stdout)
			logger.SetFormatter(&logrus.TextFormatter{DisableColors: true})
			d.log = logrus.NewEntry(logger)
			d.settings, d.settingsErr = settings.Read(os.Getenv)
			if d.settingsErr == nil {
				logger.SetLevel(d.settings.LogLevel)
			}
			return d.run(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&d.socket, "socket", filepath.Join(socketDir, driver+".sock"), "socket `PATH`; Docker calls the driver like the file, without .sock")
	flags.StringVar(&d.stateDir, "state", "/var/lib/berth", "`DIR` of Berth's own records")
	if volume {
		flags.StringVar(&d.dataDir, "data", "/var/lib/berth/volumes", "`DIR` of the volumes' data")
		flags.StringVar(&d.mountsDir, "mounts", "", "`DIR` where mounted volumes appear; a managed plugin needs its propagated mount here, without it Docker is given the data directories themselves")
		flags.StringVar(&d.hostMounts, "host-mounts", "", "`FILE` with the mounts of the host, /proc/1/mountinfo as the host has it; with it a plugin whose mounts do not reach the host starts itself anew")
		flags.StringVar(&d.dockerSocket, "docker-socket", "", "`PATH` of Docker's socket, or of the directory in which it is docker.sock; with it hooks of containers are run when a volume is backed up")
	}
	return cmd
}
