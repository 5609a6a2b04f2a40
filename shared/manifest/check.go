package manifest

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/docker/docker/api/types"
)

// maxSocketName keeps the whole path below the 108 bytes of a unix address:
// dockerd dials /run/docker/plugins/<64 hex digits>/<socket>.
const maxSocketName = 22

var (
	socketPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*\.sock$`)
	mountPattern  = regexp.MustCompile(`^[a-z][a-z-]*$`)
	envPattern    = regexp.MustCompile(`^BERTH_[A-Z_]+$`)
)

// A findings list collects what is wrong, one line each.
type findings []error

func (f *findings) addf(format string, args ...any) {
	*f = append(*f, fmt.Errorf(format, args...))
}

// Check judges a decoded config: what dockerd needs, what it would misread, and
// the privileges that Berth allows itself. All findings are joined, one line
// each.
func Check(config *types.PluginConfig) error {
	var found findings
	checkProcess(config, &found)
	checkPrivileges(config, &found)
	checkMounts(config, &found)
	checkEnv(config, &found)
	return errors.Join(found...)
}

func checkProcess(config *types.PluginConfig, found *findings) {
	if config.Description == "" {
		found.addf("description: empty, it is what `docker plugin ls` shows")
	}
	if !strings.HasPrefix(config.Documentation, "https://") {
		found.addf("documentation: %q is no https address", config.Documentation)
	}
	socket := config.Interface.Socket
	if !socketPattern.MatchString(socket) || len(socket) > maxSocketName {
		found.addf("interface.socket: %q is not a file name of at most %d characters ending in .sock", socket, maxSocketName)
	}
	// Any other scheme makes dockerd build no client at all for the plugin.
	if scheme := config.Interface.ProtocolScheme; scheme != "" && scheme != "moby.plugins.http/v1" {
		found.addf("interface.protocolScheme: %q is neither empty nor moby.plugins.http/v1", scheme)
	}
	if len(config.Entrypoint) == 0 || !path.IsAbs(config.Entrypoint[0]) {
		found.addf("entrypoint: %q does not begin with an absolute path", config.Entrypoint)
	}
	if !path.IsAbs(config.WorkDir) {
		found.addf("workdir: %q is not absolute", config.WorkDir)
	}
	// dockerd splits a set value at every single space, without quoting.
	if config.Args.Name != "" || config.Args.Description != "" || config.Args.Value != nil || config.Args.Settable != nil {
		found.addf("args: not allowed, a setting is an env entry")
	}
	if config.User != (types.PluginConfigUser{}) {
		found.addf("user: dockerd ignores it, the process would run as root all the same")
	}
	if config.Rootfs != nil {
		found.addf("rootfs: is written by dockerd, not by us")
	}
}

func checkPrivileges(config *types.PluginConfig, found *findings) {
	network := implements(config, "networkdriver") || implements(config, "ipamdriver")
	volumes := implements(config, "volumedriver")

	// A network driver works in the host's network namespace, and a volume driver
	// reaches file servers from it.
	if config.Network.Type != "host" {
		found.addf("network.type: %q, want host", config.Network.Type)
	}

	var want []string
	if network {
		want = append(want, "CAP_NET_ADMIN")
	}
	if volumes {
		want = append(want, "CAP_SYS_ADMIN")
	}
	got := slices.Clone(config.Linux.Capabilities)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		found.addf("linux.capabilities: %v, want exactly %v for these types", config.Linux.Capabilities, want)
	}
	// Loop devices are made as they are needed, and a list could not name them.
	if config.Linux.AllowAllDevices != volumes {
		found.addf("linux.allowAllDevices: %t, want true exactly when there is a volume driver", config.Linux.AllowAllDevices)
	}
	if len(config.Linux.Devices) > 0 {
		found.addf("linux.devices: dockerd would not enable the plugin on a host that lacks one")
	}
	if config.PidHost {
		found.addf("pidHost: not allowed, the host's processes are none of Berth's business")
	}
	if config.IpcHost {
		found.addf("ipcHost: not allowed")
	}
	if volumes != (config.PropagatedMount != "") {
		found.addf("propagatedMount: %q, want one exactly when there is a volume driver", config.PropagatedMount)
	}
	if config.PropagatedMount != "" && !cleanAbs(config.PropagatedMount) {
		found.addf("propagatedMount: %q is not a clean absolute path", config.PropagatedMount)
	}
}

func checkMounts(config *types.PluginConfig, found *findings) {
	required := []string{"state"}
	if implements(config, "volumedriver") {
		required = append(required, "data")
	}
	names := make(map[string]bool)
	for i, mount := range config.Mounts {
		name := fmt.Sprintf("mounts[%d] %q", i, mount.Name)
		if !mountPattern.MatchString(mount.Name) {
			found.addf("%s: the name is not lower-case letters and dashes", name)
		}
		if names[mount.Name] {
			found.addf("%s: the name is used twice", name)
		}
		names[mount.Name] = true
		if mount.Description == "" {
			found.addf("%s: no description", name)
		}
		if mount.Source == nil || !cleanAbs(*mount.Source) {
			found.addf("%s: the source is not a clean absolute path", name)
		}
		if !cleanAbs(mount.Destination) {
			found.addf("%s: destination %q is not a clean absolute path", name, mount.Destination)
		}
		if mount.Type != "bind" {
			found.addf("%s: type %q, want bind", name, mount.Type)
		}
		if !slices.Contains(mount.Options, "bind") && !slices.Contains(mount.Options, "rbind") {
			found.addf("%s: options %v have neither bind nor rbind", name, mount.Options)
		}
		if len(mount.Settable) > 0 && !slices.Equal(mount.Settable, []string{"source"}) {
			found.addf("%s: settable %v, only the source can be", name, mount.Settable)
		}
		if slices.Contains(required, mount.Name) && len(mount.Settable) == 0 {
			found.addf("%s: its source must be settable", name)
		}
		// dockerd leaks mounts when one contains the other.
		if p := config.PropagatedMount; p != "" && (within(p, mount.Destination) || within(mount.Destination, p)) {
			found.addf("%s: destination %q overlaps propagatedMount %q", name, mount.Destination, p)
		}
	}
	for _, name := range required {
		if !names[name] {
			found.addf("mounts: %q is missing", name)
		}
	}
}

func checkEnv(config *types.PluginConfig, found *findings) {
	names := make(map[string]bool)
	for i, env := range config.Env {
		name := fmt.Sprintf("env[%d] %q", i, env.Name)
		if !envPattern.MatchString(env.Name) {
			found.addf("%s: the name does not look like BERTH_NAME", name)
		}
		if names[env.Name] {
			found.addf("%s: the name is used twice", name)
		}
		names[env.Name] = true
		if env.Description == "" {
			found.addf("%s: no description", name)
		}
		if env.Value == nil {
			found.addf("%s: no default value", name)
		}
		if len(env.Settable) > 0 && !slices.Equal(env.Settable, []string{"value"}) {
			found.addf("%s: settable %v, only the value can be", name, env.Settable)
		}
	}
}

// cleanAbs tells whether p is absolute and says each step once.
func cleanAbs(p string) bool { return path.IsAbs(p) && path.Clean(p) == p }

// within tells whether p is dir or lies below it.
func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}
