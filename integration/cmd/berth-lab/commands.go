package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/integration/lab"
)

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "berth-lab",
		Short:         "Simulated hosts with Docker Engines on this machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(fetchCommand(), upCommand(), downCommand(), lsCommand(), envCommand(), engineCommand(), rebootCommand(),
		dockerCommand(), execCommand(), baseImageCommand(), recordCommand())
	return root
}

func fetchCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "fetch [ENGINE...]",
		Short: "Fill the cache with the Debian roots of engines, all of them by default",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				for _, e := range lab.Engines() {
					args = append(args, e.Version)
				}
			}
			for _, version := range args {
				engine, err := lab.EngineByVersion(version)
				if err != nil {
					return err
				}
				said, err := engine.Fetch(cmd.Context(), cmd.ErrOrStderr())
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s\t%s\t%s\n", version, engine.Root(), said)
			}
			return nil
		},
	}
}

func upCommand() *cobra.Command {
	opts := lab.Options{Detached: true}
	var withLAN, noBusybox bool
	cmd := &cobra.Command{
		Use:   "up NAME",
		Short: "Boot a host with an engine; it stays until `berth-lab down NAME`",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			opts.Name = args[0]
			engine, err := lab.EngineByVersion(opts.Engine)
			if err != nil {
				return err
			}
			if _, err := engine.Fetch(ctx, cmd.ErrOrStderr()); err != nil {
				return err
			}
			if withLAN {
				l, err := lab.MakeLAN(ctx, lab.LANOptions{Name: opts.Name, Engine: opts.Engine, Detached: true})
				if err != nil {
					return err
				}
				opts.LAN = l
			}
			h, err := lab.New(ctx, opts)
			if err == nil && !noBusybox {
				err = h.ImportBusybox(ctx)
			}
			if err != nil {
				return errors.Join(err, down(opts.Name, false))
			}
			fmt.Fprintln(cmd.OutOrStdout(), h.Socket())
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.Engine, "engine", "20.10", "engine version: 20.10, 26.1 or 28.5")
	flags.BoolVar(&withLAN, "lan", false, "join the host to a LAN of its own with a router and a neighbour (hosts NAME-rt and NAME-nb)")
	flags.BoolVar(&noBusybox, "no-busybox", false, "do not import the image busybox:latest")
	flags.BoolVar(&opts.LiveRestore, "live-restore", false, "start dockerd with --live-restore")
	flags.StringVar(&opts.VolumesOn, "volumes-on", "", "file system of the directory of volumes, `btrfs or xfs`; the disk of the host by default")
	flags.StringArrayVar(&opts.DaemonArgs, "daemon-arg", nil, "further argument for dockerd (repeatable)")
	return cmd
}

func downCommand() *cobra.Command {
	var all, keepDisk bool
	cmd := &cobra.Command{
		Use:   "down {NAME | --all}",
		Short: "Cut a host's power and remove it, its LAN and its disk",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if all == (len(args) == 1) {
				return errors.New("give either a name or --all")
			}
			if !all {
				return down(args[0], keepDisk)
			}
			names, err := lab.Hosts()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range names {
				errs = append(errs, lab.Remove(name, keepDisk))
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every host there is")
	cmd.Flags().BoolVar(&keepDisk, "keep-disk", false, "leave the host's directory")
	return cmd
}

// down removes a host and the LAN that `up --lan` made for it.
func down(name string, keepDisk bool) error {
	names, err := lab.Hosts()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if n == name || n == name+"-rt" || n == name+"-nb" {
			errs = append(errs, lab.Remove(n, keepDisk))
		}
	}
	return errors.Join(errs...)
}

func lsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List hosts",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			names, err := lab.Hosts()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tENGINE\tSTATE\tSERVICES\tDIRECTORY")
			for _, name := range names {
				fmt.Fprintln(w, describe(cmd, name))
			}
			return w.Flush()
		},
	}
}

func describe(cmd *cobra.Command, name string) string {
	h, err := lab.Open(name)
	if err != nil {
		return name + "\t?\tbroken\t\t" + filepath.Join(lab.Dir(), name)
	}
	state, services := "off", ""
	if h.Running() {
		state = "up"
		list, err := h.Services(cmd.Context())
		if err != nil {
			state = "broken"
		}
		var names []string
		for _, s := range list {
			if s.PID != 0 {
				names = append(names, s.Name)
			}
		}
		services = strings.Join(names, ",")
	}
	return strings.Join([]string{name, h.EngineVersion(), state, services, h.Dir}, "\t")
}

func envCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "env NAME",
		Short: "Print the path of the host's Docker socket",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := lab.Open(args[0])
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), h.Socket())
			}
			return err
		},
	}
}

func engineCommand() *cobra.Command {
	return &cobra.Command{
		Use:       "engine NAME {start|stop|kill|restart}",
		Short:     "Start, stop (SIGTERM), kill (SIGKILL) or restart a host's dockerd",
		Args:      cobra.ExactArgs(2),
		ValidArgs: []string{"start", "stop", "kill", "restart"},
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := lab.Open(args[0])
			if err != nil {
				return err
			}
			return h.Engine(cmd.Context(), args[1])
		},
	}
}

func rebootCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reboot NAME",
		Short: "Cut a host's power and boot it again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := lab.Open(args[0])
			if err != nil {
				return err
			}
			return h.Reboot(cmd.Context())
		},
	}
}

func dockerCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "docker NAME -- ARGS...",
		Short: "Run the docker CLI of the host's engine in the host",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			// Without buildx, which Debian lacks, only the classic builder works.
			return inHost(cmd, args[0], append([]string{"docker"}, args[1:]...), "DOCKER_BUILDKIT=0")
		},
	}
}

func execCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "exec NAME -- COMMAND...",
		Short: "Run a command in a host",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inHost(cmd, args[0], args[1:])
		},
	}
}

// inHost runs a command with this process's own standard files and exit code.
func inHost(cmd *cobra.Command, name string, argv []string, env ...string) error {
	h, err := lab.Open(name)
	if err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	code, err := h.Run(cmd.Context(), lab.Command{Argv: argv, Env: env, Dir: dir,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	if err == nil && code != 0 {
		err = exitCode(code)
	}
	return err
}

func baseImageCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "base-image NAME",
		Short: "Give a host's engine debian:bookworm-slim and golang:1.26-bookworm without a registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := lab.Open(args[0])
			if err != nil {
				return err
			}
			return h.ImportBaseImages(cmd.Context(), cmd.ErrOrStderr())
		},
	}
}

func recordCommand() *cobra.Command {
	var listen, to string
	cmd := &cobra.Command{
		Use:   "record NAME --listen SOCKET --to SOCKET",
		Short: "Put a recorder before an unmanaged plugin's socket and print where it writes",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := lab.Open(args[0])
			if err != nil {
				return err
			}
			file, err := h.Record(cmd.Context(), listen, to)
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), file)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "socket to make in the host, below /run/docker/plugins")
	cmd.Flags().StringVar(&to, "to", "", "socket of the real plugin in the host")
	for _, f := range []string{"listen", "to"} {
		if err := cmd.MarkFlagRequired(f); err != nil {
			panic(err)
		}
	}
	return cmd
}
