// Command docker-berth is `docker berth`: a plugin of the docker command line when
// docker runs it, and a program of its own, with the same commands and docker's
// global options, when a user does.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli-plugins/metadata"
	"github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/commands"
	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/quiesce"
)

// version is set by the linker.
var version = "dev"

func main() {
	if quiesce.Init() {
		return
	}
	if !plugin.RunningStandalone() {
		plugin.Run(func(docker command.Cli) *cobra.Command {
			return commands.New(commands.Config{Docker: dockerCLI{docker}, Version: version})
		}, metadata.Metadata{
			// Docker's command line before 28.4.1 takes no other one.
			SchemaVersion:    "0.1.0",
			Vendor:           "Berth",
			Version:          version,
			ShortDescription: "Berth's networks and volumes: ports, addresses, snapshots, checks",
			URL:              "https://github.com/berth-plugin/berth",
		})
		return
	}
	if err := runAlone(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		status := 1
		var coded cli.StatusError
		if errors.As(err, &coded) && coded.StatusCode != 0 {
			status = coded.StatusCode
		}
		os.Exit(status)
	}
}

// runAlone runs the commands without docker, whose global options it knows too.
func runAlone() error {
	docker, err := command.NewDockerCli()
	if err != nil {
		return err
	}
	root := commands.New(commands.Config{Docker: dockerCLI{docker}, Version: version, Alone: true})
	root.SilenceUsage, root.SilenceErrors, root.TraverseChildren = true, true, true
	opts, flags := cli.SetupPluginRootCommand(root)
	top := cli.NewTopLevelCommand(root, docker, opts, flags)
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return top.Initialize() }
	root.SetOut(docker.Out())
	root.SetErr(docker.Err())
	return root.Execute()
}

// dockerCLI is what the commands need of docker's command line. It connects when
// it is first asked.
type dockerCLI struct{ cli command.Cli }

func (d dockerCLI) In() io.Reader   { return d.cli.In() }
func (d dockerCLI) Out() io.Writer  { return d.cli.Out() }
func (d dockerCLI) Err() io.Writer  { return d.cli.Err() }
func (d dockerCLI) API() engine.API { return d.cli.Client() }
func (d dockerCLI) Host() string    { return d.cli.DockerEndpoint().Host }
func (d dockerCLI) Context() string { return d.cli.CurrentContext() }
