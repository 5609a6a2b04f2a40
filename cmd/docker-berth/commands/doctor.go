package commands

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/flags"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

func (a *app) doctorCommand() *cobra.Command {
	var (
		format string
		quiet  bool
	)
	cmd := &cobra.Command{
		Use: "doctor [OPTIONS]", Short: "Check the host, the daemon, and whether Docker and Berth agree", Args: cli.NoArgs,
		Long: "Check the host, the daemon, and whether Docker and Berth agree, and print what is found\n" +
			"with the command that cures it. The exit status is 1 when something does not work.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd.Context(), format, quiet) },
	}
	cmd.Flags().StringVar(&format, "format", "", flags.FormatHelp)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Only display what is not in order")
	return cmd
}

// diagnosis is a finding with the plugin that it is about, "" for all.
type diagnosis struct {
	plugin string
	control.Finding
}

func (a *app) doctor(ctx context.Context, format string, quiet bool) error {
	all := a.diagnose(ctx)
	failed := 0
	for _, d := range all {
		if d.Status == control.StatusFail {
			failed++
		}
	}
	if quiet {
		all = slices.DeleteFunc(all, func(d diagnosis) bool { return d.Status == control.StatusOK })
	}
	if err := a.writeDiagnosis(all, format); err != nil {
		return err
	}
	switch failed {
	case 0:
		return nil
	case 1:
		return cli.StatusError{StatusCode: 1, Status: "1 check failed"}
	default:
		return cli.StatusError{StatusCode: 1, Status: fmt.Sprintf("%d checks failed", failed)}
	}
}

// diagnose looks at each daemon that is meant. What keeps it from looking is a
// finding.
func (a *app) diagnose(ctx context.Context) []diagnosis {
	var (
		all      []diagnosis
		plugins  []engine.Plugin
		view     engine.View
		findings = func(plugin string, list ...control.Finding) {
			for _, f := range list {
				all = append(all, diagnosis{plugin, f})
			}
		}
	)
	local := engine.CheckLocal(a.Docker.Host(), a.Docker.Context())
	switch {
	case a.socket != "":
		plugins = []engine.Plugin{a.namedSocket(ctx, local == nil)}
	case local != nil:
		findings("", control.Finding{ID: "docker-context", Status: control.StatusFail, Summary: local.Error()})
		return all
	default:
		found, apiErr := engine.Plugins(ctx, a.Docker.API(), a.SocketDir)
		findings("", checkAPI(apiErr))
		daemons, err := engine.Daemons(ctx, a.SocketDir)
		if err != nil {
			findings("", control.Finding{ID: "daemon", Status: control.StatusFail, Summary: err.Error()})
		}
		// Which plugins there are is only known of a Docker that answers.
		if found = slices.Concat(found, daemons); apiErr == nil || len(found) > 0 {
			findings("", checkPlugins(found)...)
		}
		if plugins = enabled(found); a.plugin != "" {
			p, err := engine.Find(ctx, a.Docker.API(), a.SocketDir, a.plugin, "")
			if err != nil {
				findings("", control.Finding{ID: "plugin", Status: control.StatusFail, Summary: err.Error()})
				return all
			}
			plugins = []engine.Plugin{p}
		}
	}
	if local == nil {
		var err error
		if view, err = a.tryLook(ctx); err != nil && a.socket != "" {
			findings("", checkAPI(err))
		}
	}
	for _, p := range plugins {
		findings(p.String(), a.examine(ctx, p, view)...)
	}
	if view.Known && a.plugin == "" && a.socket == "" {
		findings("", checkDrivers(plugins, view)...)
	}
	return all
}

// namedSocket is the plugin of a socket that the user named, if Docker has it.
func (a *app) namedSocket(ctx context.Context, local bool) engine.Plugin {
	if local {
		plugins, err := engine.Plugins(ctx, a.Docker.API(), a.SocketDir)
		if err == nil {
			for _, p := range plugins {
				if p.Socket == a.socket {
					return p
				}
			}
		}
	}
	name := a.socket[strings.LastIndex(a.socket, "/")+1:]
	return engine.Plugin{Name: strings.TrimSuffix(name, ".sock"), Socket: a.socket, Enabled: true}
}

// examine asks one daemon for its findings and compares its records with Docker's.
func (a *app) examine(ctx context.Context, p engine.Plugin, view engine.View) []control.Finding {
	client := control.NewClient(p.Socket)
	defer client.Close()
	findings, err := client.Doctor(ctx)
	if err != nil {
		f := control.Finding{ID: "daemon", Status: control.StatusFail, Summary: fmt.Sprintf("the daemon of %s does not answer: %v", p, err)}
		if p.Managed() {
			f.Cure = fmt.Sprintf("docker plugin disable -f %s && docker plugin enable %[1]s", p)
		}
		return []control.Finding{f}
	}
	if !view.Known {
		return findings
	}
	networks, err := client.Networks(ctx)
	if err != nil {
		return findings // the findings have the reason
	}
	endpoints, err := client.Endpoints(ctx, "")
	if err != nil {
		return findings
	}
	// What was made or removed since Docker was asked is no disagreement.
	again, err := a.tryLook(ctx)
	if err != nil {
		return findings
	}
	return append(findings, compare(p, networks, endpoints, view, again)...)
}

func enabled(plugins []engine.Plugin) []engine.Plugin {
	return slices.DeleteFunc(slices.Clone(plugins), func(p engine.Plugin) bool { return !p.Enabled })
}

func (a *app) writeDiagnosis(all []diagnosis, format string) error {
	if format != "" {
		o := &listOptions{format: format, noTrunc: true}
		var rows []formatter.SubContext
		for _, d := range all {
			rows = append(rows, &findingRow{d: d})
		}
		return o.write(a.Docker.Out(), layout{
			table: `{{.Status}}\t{{.ID}}\t{{.Summary}}`,
			header: formatter.SubHeaderContext{
				"Status": "STATUS", "ID": "CHECK", "Plugin": "PLUGIN", "Summary": "FOUND", "Detail": "DETAIL", "Cure": "CURE",
			},
		}, rows)
	}
	out := a.Docker.Out()
	for i, d := range all {
		if i == 0 || d.plugin != all[i-1].plugin {
			fmt.Fprintf(out, "%s:\n", cmp.Or(d.plugin, "Docker"))
		}
		fmt.Fprintf(out, "%-5s %s (%s)\n", d.Status, d.Summary, d.ID)
		if d.Status == control.StatusOK {
			continue
		}
		if d.Detail != "" {
			fmt.Fprintf(out, "      %s\n", d.Detail)
		}
		for line := range strings.Lines(d.Cure) {
			fmt.Fprintf(out, "      $ %s\n", strings.TrimSuffix(line, "\n"))
		}
	}
	return nil
}

// findingRow is a finding in a list. Its methods are the fields of templates.
type findingRow struct {
	formatter.HeaderContext
	d diagnosis
}

// MarshalJSON gives all fields.
func (r *findingRow) MarshalJSON() ([]byte, error) { return formatter.MarshalJSON(r) }

// Plugin is the one that the finding is about; "" for all.
func (r *findingRow) Plugin() string { return r.d.plugin }

// ID names the check.
func (r *findingRow) ID() string { return r.d.ID }

// Status is ok, warn or fail.
func (r *findingRow) Status() string { return string(r.d.Status) }

// Summary is what was found.
func (r *findingRow) Summary() string { return r.d.Summary }

// Detail is what follows from it.
func (r *findingRow) Detail() string { return r.d.Detail }

// Cure is the command that puts it right.
func (r *findingRow) Cure() string { return r.d.Cure }
