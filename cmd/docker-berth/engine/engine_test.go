package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"gotest.tools/v3/assert"
)

// answers is a Docker engine that answers what is set.
type answers struct {
	API        // what no test here needs
	plugins    types.PluginsListResponse
	networks   []network.Summary
	containers []container.Summary
	version    types.Version
	err        error
}

func (a answers) PluginList(context.Context, filters.Args) (types.PluginsListResponse, error) {
	return a.plugins, a.err
}

func (a answers) NetworkList(context.Context, network.ListOptions) ([]network.Summary, error) {
	return a.networks, a.err
}

func (a answers) ContainerList(context.Context, container.ListOptions) ([]container.Summary, error) {
	return a.containers, a.err
}

func (a answers) ServerVersion(context.Context) (types.Version, error) { return a.version, a.err }

func plugin(name, entrypoint string, capabilities ...string) *types.Plugin {
	p := &types.Plugin{Name: name, ID: "id-of-" + name, Enabled: true}
	if entrypoint != "" {
		p.Config.Entrypoint = []string{entrypoint}
	}
	p.Config.Interface.Socket = "berth.sock"
	for _, c := range capabilities {
		p.Config.Interface.Types = append(p.Config.Interface.Types, types.PluginInterfaceType{Prefix: "docker", Capability: c, Version: "1.0"})
	}
	return p
}

func TestPluginsAreToldByTheirEntrypoint(t *testing.T) {
	api := answers{plugins: types.PluginsListResponse{
		plugin("mine:1", "/usr/bin/berthd", "networkdriver", "ipamdriver", "volumedriver"),
		plugin("berth-net:latest", "/other/program", "networkdriver"),
		plugin("no-entrypoint:latest", ""),
	}}
	plugins, err := Plugins(t.Context(), api, "/run/docker/plugins")
	assert.NilError(t, err)
	assert.DeepEqual(t, plugins, []Plugin{{
		Name: "mine:1", ID: "id-of-mine:1", Enabled: true, Socket: "/run/docker/plugins/id-of-mine:1/berth.sock", Services: []string{"network", "volume"},
	}})
}

func TestSocketThatIsNotBerthsIsNamed(t *testing.T) {
	dir := t.TempDir()
	// Neither a file nor a folder by that name is a daemon.
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "berth.sock"), nil, 0o600))
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "berth-vol.sock"), 0o700))
	daemons, err := Daemons(t.Context(), dir)
	assert.NilError(t, err)
	assert.Equal(t, len(daemons), 0)
}

func TestLook(t *testing.T) {
	api := answers{
		networks: []network.Summary{{ID: "n1", Name: "front"}},
		containers: []container.Summary{
			{ID: "c1", Names: []string{"/other/alias", "/web"}, NetworkSettings: &container.NetworkSettingsSummary{Networks: map[string]*network.EndpointSettings{
				"front": {EndpointID: "e1", NetworkID: "n1"}, "stopped": {}, "none": nil,
			}}},
			{ID: "c2", Names: []string{"/host"}},
		},
	}
	view, err := Look(t.Context(), api)
	assert.NilError(t, err)
	assert.Equal(t, view.Network("n1"), "front")
	assert.Equal(t, view.Network("n2"), "")
	assert.Equal(t, view.Container("e1"), "web")
	assert.Equal(t, view.On["e1"], "n1")
	assert.Equal(t, len(view.Containers), 1)
	api.err = errors.New("down")
	view, err = Look(t.Context(), api)
	assert.ErrorContains(t, err, "down")
	assert.Assert(t, !view.Known)
}

func TestTellsNames(t *testing.T) {
	for apiVersion, want := range map[string]bool{"1.41": false, "1.51": false, "1.52": true, "1.53": true, "2.0": true, "": false} {
		tells, version, err := TellsNames(t.Context(), answers{version: types.Version{Version: "x", APIVersion: apiVersion}})
		assert.NilError(t, err)
		assert.Equal(t, tells, want, apiVersion)
		assert.Equal(t, version, "x")
	}
	_, _, err := TellsNames(t.Context(), answers{err: errors.New("down")})
	assert.ErrorContains(t, err, "ask for Docker's version: down")
}

func TestCheckLocal(t *testing.T) {
	assert.NilError(t, CheckLocal("unix:///run/docker.sock", "default"))
	for _, host := range []string{"tcp://10.0.0.1:2376", "ssh://prod", "npipe:////./pipe/docker_engine"} {
		assert.ErrorContains(t, CheckLocal(host, "prod"), host)
	}
}

func TestInsideOfAPlugin(t *testing.T) {
	data, state, none := "/var/lib/berth/volumes/", "/var/lib/berth", ""
	p := plugin("berth-vol:latest", "/usr/bin/berthd", "volumedriver")
	p.Config.Mounts = []types.PluginMount{
		{Name: "state", Source: &state, Destination: "/state"}, {Name: "data", Source: &data, Destination: "/data"},
		{Name: "none", Source: &none, Destination: "/none"}, {Name: "unset", Destination: "/unset"},
	}
	plugins, err := Plugins(t.Context(), answers{plugins: types.PluginsListResponse{p}}, "/run")
	assert.NilError(t, err)
	for path, want := range map[string]string{
		"/var/lib/berth/volumes": "/data", "/var/lib/berth/volumes/a/b": "/data/a/b", "/var/lib/berth/vol": "/state/vol", "/var/lib/berth": "/state",
		"/var/lib/berthold": "", "/": "", "/srv": "", "/var/lib": "",
	} {
		inside, ok := plugins[0].Inside(path)
		assert.Equal(t, inside, want, path)
		assert.Equal(t, ok, want != "", path)
	}
	inside, ok := Plugin{Name: "berth-vol"}.Inside("/srv/x")
	assert.Assert(t, ok && inside == "/srv/x", "a daemon of its own sees what this machine has")
}
