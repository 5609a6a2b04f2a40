// Package commands is `docker berth`: one file for each noun. It prints results on
// standard output in the ways that docker's own commands do, and nothing else there.
package commands

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/docker/cli/cli"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

// EnvSocket names the daemon's socket, as --socket does.
const EnvSocket = "BERTH_SOCKET"

// A Docker is the docker command line that the commands are part of. API, Host and
// Context are those of the context that the user has chosen.
type Docker interface {
	In() io.Reader
	Out() io.Writer
	// Err has a method IsTerminal() bool if it may be one.
	Err() io.Writer
	API() engine.API
	// Host is the engine's address, as unix:///var/run/docker.sock.
	Host() string
	Context() string
}

// A Config is what the commands work with.
type Config struct {
	Docker Docker
	// Version is that of the build.
	Version string
	// SocketDir is where the plugins' sockets are; "" is engine.SocketDir.
	SocketDir string
	// Alone says that the commands are a program of their own and not docker's.
	Alone bool
}

// app is what the commands share.
type app struct {
	Config
	plugin, socket string
}

// New returns the command `berth` with all below it.
func New(cfg Config) *cobra.Command {
	if cfg.SocketDir == "" {
		cfg.SocketDir = engine.SocketDir
	}
	a := &app{Config: cfg}
	root := &cobra.Command{
		Use:   "berth",
		Short: "Look at Berth's networks and volumes and keep them in order",
		Long: "Look at Berth's networks and volumes and keep them in order.\n\n" +
			"The daemon is found through Docker's list of plugins, or else in " + engine.SocketDir + ".",
		Args: cli.NoArgs,
		RunE: help,
	}
	if cfg.Alone {
		root.Use = "docker-berth"
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.plugin, "plugin", "", "`NAME` of the Berth plugin, where there are several")
	flags.StringVar(&a.socket, "socket", os.Getenv(EnvSocket), "`PATH` of the daemon's socket on this machine (env "+EnvSocket+")")
	root.AddCommand(
		a.infoCommand(), a.versionCommand(), a.doctorCommand(), a.metricsCommand(), a.portCommand(),
		a.networkCommand(), a.endpointCommand(), a.leaseCommand(), a.poolCommand(),
		a.volumeCommand(), a.snapshotCommand(), a.trashCommand(), a.targetCommand(), a.backupCommand(),
	)
	cobra.CheckErr(root.RegisterFlagCompletionFunc("plugin", a.completePlugins))
	visit(root, func(c *cobra.Command) { c.DisableFlagsInUseLine = true })
	return root
}

func visit(c *cobra.Command, fn func(*cobra.Command)) {
	fn(c)
	for _, sub := range c.Commands() {
		visit(sub, fn)
	}
}

// help is what a command does that only has others below it.
func help(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// find returns the daemon that is meant and has the service, "" for any.
func (a *app) find(ctx context.Context, service string) (engine.Plugin, error) {
	if a.socket != "" {
		return engine.Plugin{Socket: a.socket, Enabled: true}, nil
	}
	if err := engine.CheckLocal(a.Docker.Host(), a.Docker.Context()); err != nil {
		return engine.Plugin{}, err
	}
	return engine.Find(ctx, a.Docker.API(), a.SocketDir, a.plugin, service)
}

// findPlugin is find for those who need the plugin's name or mounts too.
func (a *app) findPlugin(ctx context.Context, service string) (engine.Plugin, error) {
	p, err := a.find(ctx, service)
	if err == nil && a.socket != "" {
		p = a.namedSocket(ctx, !a.remote())
	}
	return p, err
}

// remote reports whether Docker's engine is on another machine.
func (a *app) remote() bool { return engine.CheckLocal(a.Docker.Host(), a.Docker.Context()) != nil }

// connect returns a client of the daemon that find finds. The caller closes it.
func (a *app) connect(ctx context.Context, service string) (*control.Client, error) {
	p, err := a.find(ctx, service)
	if err != nil {
		return nil, err
	}
	if service == control.VolumeService {
		a.makeGood(ctx)
	}
	return control.NewClient(p.Socket), nil
}

// look asks Docker for names. Without them IDs are shown, and the user is told why.
func (a *app) look(ctx context.Context) engine.View {
	view, err := a.tryLook(ctx)
	if err != nil {
		fmt.Fprintf(a.Docker.Err(), "WARNING: names are not shown: %v\n", err)
	}
	return view
}

func (a *app) tryLook(ctx context.Context) (engine.View, error) {
	if err := engine.CheckLocal(a.Docker.Host(), a.Docker.Context()); err != nil {
		return engine.View{}, fmt.Errorf("the Docker context %q is the engine of another machine", a.Docker.Context())
	}
	return engine.Look(ctx, a.Docker.API())
}
