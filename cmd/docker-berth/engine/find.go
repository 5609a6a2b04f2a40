package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/filters"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// SocketDir is where Docker expects the sockets of all plugins.
	SocketDir = "/run/docker/plugins"
	// entrypoint tells Berth's plugins apart, whatever they are called.
	entrypoint = "/usr/bin/berthd"
	// answerTime is what a daemon gets to say that it is Berth.
	answerTime = 3 * time.Second
)

// unmanaged are the drivers' names of daemons that run without `docker plugin`.
func unmanaged() []string { return []string{"berth-net", "berth", "berth-vol"} }

// A Plugin is a Berth daemon, or a Docker plugin that would be one if it were
// enabled.
type Plugin struct {
	// Name is the driver's, as `docker network create -d` wants it: with its tag
	// for a managed plugin. It is "" for a socket that the user named.
	Name string
	// ID is that of the managed plugin; "" for a daemon of its own.
	ID      string
	Socket  string
	Enabled bool
	// Services it has, by their names in package control; none when not known.
	Services []string
	// Mounts are the directories of this machine that a managed plugin sees.
	Mounts []Mount
}

// A Mount is a directory of a managed plugin. Source is its path on this machine,
// Destination the one that the daemon sees.
type Mount struct {
	Name, Source, Destination string
}

// Managed reports whether the daemon is started by Docker.
func (p Plugin) Managed() bool { return p.ID != "" }

// has reports whether the plugin may have a service; "" is any.
func (p Plugin) has(service string) bool {
	return service == "" || p.Services == nil || slices.Contains(p.Services, service)
}

// String is what a user calls the plugin.
func (p Plugin) String() string {
	if p.Name == "" {
		return p.Socket
	}
	return p.Name
}

// Plugins lists the Berth plugins that Docker has, enabled or not.
func Plugins(ctx context.Context, api API, socketDir string) ([]Plugin, error) {
	list, err := api.PluginList(ctx, filters.NewArgs())
	if err != nil {
		return nil, fmt.Errorf("list Docker's plugins: %w", err)
	}
	var plugins []Plugin
	for _, p := range list {
		if len(p.Config.Entrypoint) == 0 || p.Config.Entrypoint[0] != entrypoint {
			continue
		}
		plugins = append(plugins, Plugin{
			Name: p.Name, ID: p.ID, Enabled: p.Enabled,
			Socket:   filepath.Join(socketDir, p.ID, p.Config.Interface.Socket),
			Services: services(p.Config.Interface.Types),
			// Settings.Mounts are stale after a restart of Docker.
			Mounts: mounts(p.Config.Mounts),
		})
	}
	slices.SortFunc(plugins, func(a, b Plugin) int { return strings.Compare(a.Name, b.Name) })
	return plugins, nil
}

func mounts(list []types.PluginMount) (mounts []Mount) {
	for _, m := range list {
		if m.Source != nil && *m.Source != "" {
			mounts = append(mounts, Mount{Name: m.Name, Source: filepath.Clean(*m.Source), Destination: filepath.Clean(m.Destination)})
		}
	}
	return mounts
}

// Inside returns the path by which the daemon sees a directory of this machine, which
// is absolute and without links; false when it does not see it.
func (p Plugin) Inside(path string) (string, bool) {
	if !p.Managed() {
		return path, true
	}
	var best Mount
	for _, m := range p.Mounts {
		// The mount that is farther down hides the one above.
		if _, below := below(m.Source, path); below && len(m.Source) > len(best.Source) {
			best = m
		}
	}
	rest, ok := below(best.Source, path)
	if !ok {
		return "", false
	}
	return filepath.Join(best.Destination, rest), true
}

// below returns what leads from dir to path, if path is dir or below it.
func below(dir, path string) (string, bool) {
	if dir == "" {
		return "", false
	}
	rest, err := filepath.Rel(dir, path)
	return rest, err == nil && filepath.IsLocal(rest)
}

func services(types []types.PluginInterfaceType) (services []string) {
	for _, t := range types {
		switch t.Capability {
		case "networkdriver":
			services = append(services, control.NetworkService)
		case "volumedriver":
			services = append(services, control.VolumeService)
		}
	}
	return services
}

// Daemons lists the Berth daemons that answer without being a plugin of Docker's.
// The error is that of a socket that this user may not open.
func Daemons(ctx context.Context, socketDir string) (daemons []Plugin, _ error) {
	var errs []error
	for _, name := range unmanaged() {
		p := Plugin{Name: name, Socket: filepath.Join(socketDir, name+".sock"), Enabled: true}
		info, err := os.Stat(p.Socket)
		if errors.Is(err, fs.ErrPermission) {
			errs = append(errs, fault.Unavailable("%s: permission denied; run the command as root", p.Socket))
			continue
		}
		if err != nil || info.Mode().Type() != fs.ModeSocket {
			continue
		}
		running, err := ask(ctx, p.Socket)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, service := range running.Services {
			p.Services = append(p.Services, service.Name)
		}
		daemons = append(daemons, p)
	}
	return daemons, errors.Join(errs...)
}

func ask(ctx context.Context, socket string) (control.Info, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	client := control.NewClient(socket)
	defer client.Close()
	return client.Info(ctx)
}

// Find returns the one Berth daemon that is meant. name is that of a plugin, with or
// without its tag, the beginning of its ID, or the driver's name of a daemon of its
// own; "" is the only one that has the service, or the only one of all if that is
// "". An API that does not answer leaves the daemons that run without it.
func Find(ctx context.Context, api API, socketDir, name, service string) (Plugin, error) {
	plugins, apiErr := Plugins(ctx, api, socketDir)
	daemons, daemonErr := Daemons(ctx, socketDir)
	all := slices.Concat(plugins, daemons)
	if name != "" {
		return named(all, name, errors.Join(apiErr, daemonErr))
	}
	all = slices.DeleteFunc(all, func(p Plugin) bool { return !p.has(service) })
	enabled := slices.DeleteFunc(slices.Clone(all), func(p Plugin) bool { return !p.Enabled })
	switch len(enabled) {
	case 1:
		return reachable(enabled[0])
	case 0:
		return Plugin{}, none(all, service, errors.Join(apiErr, daemonErr))
	default:
		return Plugin{}, fault.Conflict("there are several Berth plugins: %s; say which with --plugin NAME", names(enabled))
	}
}

// none is the error of finding nothing that is enabled.
func none(disabled []Plugin, service string, err error) error {
	if service != "" {
		service = " that has a " + service + " service"
	}
	switch {
	case len(disabled) > 0:
		return fault.Unavailable("no Berth plugin%s is enabled; enable one with: docker plugin enable %s", service, disabled[0])
	case err != nil:
		return fault.Unavailable("no Berth plugin%s was found: %w (name the daemon's socket with --socket PATH or BERTH_SOCKET)", service, err)
	default:
		return fault.NotFound("no Berth plugin%s is installed, and no such daemon answers in %s (name its socket with --socket PATH or BERTH_SOCKET)", service, SocketDir)
	}
}

func named(all []Plugin, name string, err error) (Plugin, error) {
	var found []Plugin
	for _, p := range all {
		if p.Name == name || p.ID == name {
			return usable(p)
		}
		untagged, _, _ := strings.Cut(p.Name, ":")
		// Docker shows twelve digits; fewer might be a name.
		const shortID = 12
		if p.Managed() && (untagged == name || len(name) >= shortID && strings.HasPrefix(p.ID, name)) {
			found = append(found, p)
		}
	}
	switch {
	case len(found) == 1:
		return usable(found[0])
	case len(found) > 1:
		return Plugin{}, fault.Conflict("--plugin %s is one of several: %s", name, names(found))
	case len(all) > 0:
		return Plugin{}, fault.NotFound("--plugin %s: there is no such Berth plugin, but there is %s", name, names(all))
	default:
		return Plugin{}, none(nil, "", err)
	}
}

func usable(p Plugin) (Plugin, error) {
	if !p.Enabled {
		return Plugin{}, fault.Unavailable("plugin %s is disabled; enable it with: docker plugin enable %s", p, p)
	}
	return reachable(p)
}

// reachable makes words of a socket that Docker has and this machine has not.
func reachable(p Plugin) (Plugin, error) {
	_, err := os.Stat(p.Socket)
	if p.Managed() && errors.Is(err, fs.ErrNotExist) {
		return Plugin{}, fault.Unavailable("plugin %s is enabled, but its socket %s is not on this machine: Docker's engine runs on another one or in a VM; run the command there", p, p.Socket)
	}
	return p, nil
}

func names(plugins []Plugin) string {
	list := make([]string, 0, len(plugins))
	for _, p := range plugins {
		list = append(list, p.String())
	}
	return strings.Join(list, ", ")
}

// CheckLocal is nil when Docker's engine at host can be on this machine. Berth's
// sockets are only there.
func CheckLocal(host, context string) error {
	if strings.HasPrefix(host, "unix://") {
		return nil
	}
	return fault.Invalid("the Docker context %q is the engine at %s, and Berth's socket is only on that engine's machine: run the command there, or name a socket of this machine with --socket PATH", context, host)
}
