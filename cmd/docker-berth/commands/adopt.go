package commands

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/opts"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// dataMount is the mount of a managed plugin that the default root is on.
const dataMount = "data"

func (a *app) volumeAdoptCommand() *cobra.Command {
	var keep bool
	options := opts.NewMapOpts(nil, nil)
	cmd := &cobra.Command{
		Use: "adopt [OPTIONS] SOURCE NAME", Short: "Make a volume of data that is there already", Args: cli.ExactArgs(2),
		Long: "Make a volume of data that is there already, and print its name. SOURCE is\n\n" +
			"  - the name of a volume of Docker's driver local: its data is copied, and the local\n" +
			"    volume stays as it is. NAME must be another one, since Docker has names once.\n" +
			"  - an absolute path, or a path below the root that begins with ./ or is no local\n" +
			"    volume's name: the directory becomes the data, and is moved unless it is called\n" +
			"    NAME already. --copy leaves it as it is.\n\n" +
			"A managed plugin sees its mounts and nothing else of the machine. For data elsewhere\n" +
			"the command says what to run.",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, done := interruptible(cmd)
			return done(a.adoptVolume(ctx, args[0], args[1], keep, options.GetAll()))
		},
	}
	cmd.Flags().BoolVar(&keep, "copy", false, "Copy the data and leave the source as it is")
	cmd.Flags().VarP(options, "opt", "o", "Options of the volume, as docker volume create takes them")
	return cmd
}

func (a *app) adoptVolume(ctx context.Context, source, name string, keep bool, options map[string]string) error {
	p, err := a.findPlugin(ctx, control.VolumeService)
	if err != nil {
		return err
	}
	req := control.AdoptRequest{Name: name, Source: source, Copy: keep, Options: options}
	path, local, err := a.localData(ctx, source)
	if err != nil {
		return err
	}
	switch {
	case local:
		req.Copy = true
	case filepath.IsAbs(source):
		path = source
	default:
		req.Source = filepath.Clean(source)
	}
	if err := a.checkFree(ctx, name); err != nil {
		return err
	}
	if path != "" {
		if req.Source, err = inside(p, path, name); err != nil {
			return err
		}
	}
	client := control.NewClient(p.Socket)
	defer client.Close()
	show, end := a.progress("adopting " + source)
	v, err := client.AdoptVolume(ctx, req, show)
	end()
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), v.Name)
	return nil
}

// localData returns where the data of a volume of Docker's own driver is; false when
// the source is no such volume.
func (a *app) localData(ctx context.Context, source string) (path string, ok bool, _ error) {
	if strings.Contains(source, "/") || a.remote() {
		return "", false, nil
	}
	v, err := a.Docker.API().VolumeInspect(ctx, source)
	switch {
	case fault.Kind(err) == "notfound":
		return "", false, nil
	case err != nil:
		return "", false, fmt.Errorf("ask Docker for the volume %s: %w", source, err)
	case v.Driver != "local":
		return "", false, nil
	case v.Options["type"] != "" || v.Options["device"] != "":
		return "", false, fault.Invalid("volume %s is a mount of %s: make a Berth volume with the same options instead (docker volume create -o type=… -o device=…)", source, v.Options["device"])
	}
	users, err := a.tryUsers(ctx)
	if err != nil {
		return "", false, err
	}
	if running := runningNames(users[source]); running != "" {
		return "", false, fault.Conflict("volume %s is used by %s: stop that first", source, running)
	}
	return v.Mountpoint, true, nil
}

// inside returns the path by which the daemon sees a directory of this machine. The
// error says how its data gets to where the daemon sees it.
func inside(p engine.Plugin, path, name string) (string, error) {
	if whole, err := filepath.EvalSymlinks(path); err == nil {
		path = whole
	}
	if seen, ok := p.Inside(filepath.Clean(path)); ok {
		return seen, nil
	}
	for _, m := range p.Mounts {
		if m.Name == dataMount {
			to := filepath.Join(m.Source, name)
			return "", fault.Invalid("plugin %s does not see %s, but only its mounts. Copy the data to its root and adopt it there:\n"+
				"  cp -a --reflink=auto %s %s\n  docker berth volume adopt ./%s %s", p, path, quoted(path), quoted(to), name, name)
		}
	}
	return "", fault.Invalid("plugin %s does not see %s, but only its mounts", p, path)
}
