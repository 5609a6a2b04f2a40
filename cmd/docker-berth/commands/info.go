package commands

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/flags"
	"github.com/docker/cli/templates"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

// daemonInfo is what `info` prints.
type daemonInfo struct {
	// Driver is the name for `docker network create -d`, PluginID that of a plugin
	// that Docker manages; both are "" when they are not known.
	Driver, PluginID string
	// ControlSocket is the path on this machine.
	ControlSocket string
	control.Info
}

func (a *app) infoCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "info [OPTIONS]", Short: "Display the daemon's settings and state", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.info(cmd.Context(), format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

func (a *app) info(ctx context.Context, format string) error {
	p, err := a.find(ctx, "")
	if err != nil {
		return err
	}
	if a.socket != "" {
		p = a.namedSocket(ctx, engine.CheckLocal(a.Docker.Host(), a.Docker.Context()) == nil)
	}
	info, err := a.ask(ctx, p)
	if err != nil {
		return err
	}
	if format != "" {
		return printAs(a.Docker.Out(), format, info)
	}
	out := a.Docker.Out()
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(out, "%s: %s\n", name, value)
		}
	}
	line("Version", info.Version)
	line("Driver", info.Driver)
	line("Plugin ID", info.PluginID)
	line("Socket", info.ControlSocket)
	line("PID", fmt.Sprint(info.PID))
	line("Started", at(info.Started)+" ("+ago(info.Started)+")")
	line("State directory", info.StateDir)
	line("Data directory", info.DataDir)
	fmt.Fprintln(out, "Services:")
	for _, s := range info.Services {
		fmt.Fprintf(out, " %s: %s\n", s.Name, serviceLine(s))
	}
	fmt.Fprintln(out, "Settings:")
	for _, s := range info.Settings {
		fmt.Fprintf(out, " %s=%s\n", s.Name, s.Value)
	}
	return nil
}

func serviceLine(s control.Service) string {
	line := fmt.Sprintf("%s (since %s)", s.State, ago(s.Since))
	if s.Reason != "" {
		line += ": " + s.Reason
	}
	return line
}

// ask returns what the daemon tells of itself and what is known of its plugin.
func (a *app) ask(ctx context.Context, p engine.Plugin) (daemonInfo, error) {
	client := control.NewClient(p.Socket)
	defer client.Close()
	info, err := client.Info(ctx)
	if err != nil {
		return daemonInfo{}, err
	}
	return daemonInfo{Driver: p.Name, PluginID: p.ID, ControlSocket: p.Socket, Info: info}, nil
}

// printAs prints a value as JSON or by a template.
func printAs(out io.Writer, format string, value any) error {
	if format == "json" {
		format = "{{json .}}"
	}
	tmpl, err := templates.Parse(format)
	if err != nil {
		return cli.StatusError{StatusCode: 64, Status: "template parsing error: " + err.Error()}
	}
	if err := tmpl.Execute(out, value); err != nil {
		return fmt.Errorf("template parsing error: %w", err)
	}
	fmt.Fprintln(out)
	return nil
}

// versions is what `version` prints.
type versions struct {
	Client clientVersion
	// Server is nil when no daemon answers.
	Server *serverVersion `json:",omitempty"`
}

type clientVersion struct {
	Version, GoVersion string
}

type serverVersion struct {
	Driver, Version, GoVersion string
}

func (a *app) versionCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "version [OPTIONS]", Short: "Show the versions of this command and of the daemon", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.version(cmd.Context(), format) },
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", flags.InspectFormatHelp)
	return cmd
}

// version prints the client's version even when there is no daemon, and fails then.
func (a *app) version(ctx context.Context, format string) error {
	v := versions{Client: clientVersion{Version: a.Version, GoVersion: runtime.Version()}}
	p, askErr := a.find(ctx, "")
	if askErr == nil {
		var info daemonInfo
		if info, askErr = a.ask(ctx, p); askErr == nil {
			v.Server = &serverVersion{Driver: info.Driver, Version: info.Version, GoVersion: info.GoVersion}
		}
	}
	out := a.Docker.Out()
	if format != "" {
		if err := printAs(out, format, v); err != nil {
			return err
		}
		return askErr
	}
	fmt.Fprintf(out, "Client:\n Version:    %s\n Go version: %s\n", v.Client.Version, v.Client.GoVersion)
	if v.Server == nil {
		return askErr
	}
	fmt.Fprintf(out, "\nServer: %s\n Version:    %s\n Go version: %s\n", named(v.Server.Driver, "berthd"), v.Server.Version, v.Server.GoVersion)
	return nil
}

func (a *app) metricsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "metrics", Short: "Print the daemon's metrics in the text format of Prometheus", Args: cli.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.connect(cmd.Context(), "")
			if err != nil {
				return err
			}
			defer client.Close()
			text, err := client.Metrics(cmd.Context())
			if err != nil {
				return err
			}
			_, err = a.Docker.Out().Write(text)
			return err
		},
	}
}
