package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Mode is how a plugin runs.
type Mode string

// The two modes.
const (
	Managed   Mode = "managed"   // docker plugin create, set, enable
	Unmanaged Mode = "unmanaged" // a daemon with a socket below /run/docker/plugins
)

const (
	stateDir = "/var/lib/berth"
	dataDir  = "/var/lib/berth/volumes"
)

// unmanagedPlugin is a daemon that the host starts at boot, before its engine.
type unmanagedPlugin struct {
	Name string
	// Env are settings, as NAME=value.
	Env []string
}

// verbs of berthd by plugin name.
func berthdVerb(name string) (string, error) {
	switch name {
	case "berth-net":
		return "network", nil
	case "berth-vol":
		return "volume", nil
	case "berth":
		return "all", nil
	}
	return "", fmt.Errorf("plugin %q is unknown: have berth, berth-net, berth-vol", name)
}

// DriverName is what `docker network create -d` wants for a plugin in this mode.
func DriverName(mode Mode, plugin string) string {
	if mode == Managed {
		return plugin + ":latest"
	}
	return plugin
}

// PluginBuilt returns an error that names the command to run when the plugin is
// not in the build directory.
func PluginBuilt(mode Mode, name string) error {
	dir, err := BuildDir()
	if err != nil {
		return err
	}
	return pluginBuilt(dir, mode, name)
}

func pluginBuilt(dir string, mode Mode, name string) error {
	if _, err := berthdVerb(name); err != nil {
		return err
	}
	file := filepath.Join(dir, "bin", "berthd")
	if mode == Managed {
		file = filepath.Join(dir, "plugin", name, "config.json")
	}
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("plugin %s is not built: run ./scripts/build-plugin: %w", name, err)
	}
	return nil
}

// InstallPlugin installs and starts a plugin out of the build directory. Settings
// are NAME=value: `docker plugin set` when managed, environment when unmanaged.
func (h *Host) InstallPlugin(ctx context.Context, mode Mode, name string, settings ...string) error {
	if mode == Managed {
		if err := h.CreatePlugin(ctx, name); err != nil {
			return err
		}
		return h.EnablePlugin(ctx, name, settings...)
	}
	if err := pluginBuilt(h.opts.BuildDir, mode, name); err != nil {
		return err
	}
	if err := h.makeDataDir(ctx); err != nil {
		return err
	}
	p := unmanagedPlugin{Name: name, Env: settings}
	if err := h.startUnmanaged(ctx, p); err != nil {
		return err
	}
	h.plugins = append(h.plugins, p)
	return h.save()
}

// CreatePlugin is the first half of InstallPlugin for a managed plugin: the engine has
// it afterwards, and it does not run.
func (h *Host) CreatePlugin(ctx context.Context, name string) error {
	if err := pluginBuilt(h.opts.BuildDir, Managed, name); err != nil {
		return err
	}
	if _, err := h.Docker(ctx, "plugin", "create", name, filepath.Join(h.opts.BuildDir, "plugin", name)); err != nil {
		return fmt.Errorf("install %s: %w", name, err)
	}
	return nil
}

// EnablePlugin is the second half of InstallPlugin for a managed plugin.
func (h *Host) EnablePlugin(ctx context.Context, name string, settings ...string) error {
	if err := h.makeDataDir(ctx); err != nil {
		return err
	}
	var steps [][]string
	if len(settings) > 0 {
		steps = append(steps, append([]string{"plugin", "set", name}, settings...))
	}
	steps = append(steps, []string{"plugin", "enable", name})
	for _, args := range steps {
		if _, err := h.Docker(ctx, args...); err != nil {
			return fmt.Errorf("install %s: %w", name, err)
		}
	}
	return nil
}

func (h *Host) makeDataDir(ctx context.Context) error {
	_, err := h.Exec(ctx, "mkdir", "-p", dataDir)
	return err
}

func pluginSocket(name string) string { return "/run/docker/plugins/" + name + ".sock" }

func (h *Host) startUnmanaged(ctx context.Context, p unmanagedPlugin) error {
	berthd := filepath.Join(h.opts.BuildDir, "bin", "berthd")
	verb, err := berthdVerb(p.Name)
	if err != nil {
		return err
	}
	argv := []string{berthd, verb, "--socket", pluginSocket(p.Name), "--state", stateDir}
	if verb != "network" {
		argv = append(argv, "--data", dataDir)
	}
	_, err = call(ctx, h.Dir, request{
		Op: "start", Name: p.Name, Restart: true, Env: p.Env, Log: filepath.Join(h.Dir, "log", p.Name+".log"),
		Argv: argv,
	})
	if err != nil {
		return err
	}
	if err := h.eventually(ctx, 10*time.Second, "test", "-S", pluginSocket(p.Name)); err != nil {
		return fmt.Errorf("%s made no socket: %w: %s", p.Name, err, h.lastLine(p.Name+".log"))
	}
	return nil
}

// StopPlugin stops an unmanaged plugin's daemon; it stays away until StartPlugin
// or a reboot.
func (h *Host) StopPlugin(ctx context.Context, name string) error {
	_, err := call(ctx, h.Dir, request{Op: "stop", Name: name, Signal: syscall.SIGTERM, Grace: 15 * time.Second})
	return err
}

// StartPlugin starts an installed unmanaged plugin that was stopped.
func (h *Host) StartPlugin(ctx context.Context, name string) error {
	i := slices.IndexFunc(h.plugins, func(p unmanagedPlugin) bool { return p.Name == name })
	if i < 0 {
		return fmt.Errorf("plugin %s is not installed unmanaged on %s", name, h.Name)
	}
	return h.startUnmanaged(ctx, h.plugins[i])
}

// KillPlugin sends SIGKILL to every berthd of the host, managed or not, and waits
// until as many others run: dockerd or init starts them again.
func (h *Host) KillPlugin(ctx context.Context) error {
	before, err := h.pids(ctx, "berthd")
	if err != nil {
		return err
	}
	if len(before) == 0 {
		return fmt.Errorf("no berthd runs on %s", h.Name)
	}
	if _, err := call(ctx, h.Dir, request{Op: "signal", Comm: "berthd", Signal: syscall.SIGKILL}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		now, err := h.pids(ctx, "berthd")
		if err != nil {
			return err
		}
		now = slices.DeleteFunc(now, func(pid string) bool { return slices.Contains(before, pid) })
		if len(now) >= len(before) {
			return nil
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("after SIGKILL %d of %d berthd came back within 20s", len(now), len(before))
		}
	}
}

// pids lists the processes of the host with the command name. That is not the name of
// their program's file, which pidof takes too.
func (h *Host) pids(ctx context.Context, comm string) ([]string, error) {
	res, err := h.Exec(ctx, "sh", "-c", `grep -lsx "$0" /proc/[0-9]*/comm | cut -d / -f 3`, comm)
	return strings.Fields(res.Stdout), err
}
