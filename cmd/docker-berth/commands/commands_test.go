package commands

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/cli/cli"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"

	"github.com/berth-plugin/berth/shared/control"
)

// What a user sees, word for word. The files are made by go test -update.
func TestOutput(t *testing.T) {
	for name, args := range map[string]string{
		"network-ls":              "network ls",
		"network-ls-quiet":        "network ls -q --no-trunc",
		"network-ls-filter":       "network ls --filter state=broken",
		"network-ls-template":     "network ls --format table|{{.Name}}|{{.Gateway}}|{{.Created}}",
		"network-prune":           "network prune",
		"endpoint-ls":             "endpoint ls",
		"endpoint-ls-container":   "endpoint ls --filter container=web --format {{.Container}}/{{.Network}}:{{.Ports}}",
		"endpoint-gc":             "endpoint gc --dry-run",
		"port":                    "port",
		"port-container":          "port web",
		"port-network":            "port app10 -q",
		"port-filter":             "port --filter port=8085 -q",
		"port-proto":              "port --filter proto=udp --format {{.Host}}|{{.Target}}|{{.Proxied}}|{{.Mapping}}",
		"version":                 "version --format {{.Client.Version}}/{{.Server.Driver}}/{{.Server.Version}}",
		"info":                    "info --format {{.Driver}}|{{.PluginID}}|{{.StateDir}}|{{range.Services}}{{.Name}}={{.State}}{{end}}|{{json.Settings}}",
		"metrics":                 "metrics",
		"doctor":                  "doctor",
		"doctor-quiet":            "doctor -q",
		"doctor-table":            "doctor --format table",
		"network-inspect-bridges": "network inspect app9 app10 --format {{.Name}}|{{.Bridge}}|{{range.Containers}}{{.Container}}|{{.IPv4}}{{end}}",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			list := strings.Split(args, " ")
			for i := range list {
				list[i] = strings.NewReplacer("table|", "table ", "|", `\t`, "range.", "range .", "json.", "json .").Replace(list[i])
			}
			golden.Assert(t, w.run(list...), name+".golden")
		})
	}
}

func TestJSONIsOneObjectForEachLine(t *testing.T) {
	w := newWorld(t)
	w.wantJSONLines("network ls", "endpoint ls", "port", "doctor", "endpoint gc -n")
	var details []networkDetail
	assert.NilError(t, json.Unmarshal([]byte(w.run("network", "inspect", "aaaa")), &details))
	assert.Equal(t, details[0].Name, "app9")
	assert.Equal(t, details[0].Containers[0].Container, "web")
	assert.Equal(t, details[0].Containers[0].Ports[0].HostPort, uint16(8080))
}

func TestInspectGoesOnAfterAnError(t *testing.T) {
	w := newWorld(t)
	stdout, _, err := w.try("network", "inspect", "nosuch", "app9", "bridge", "--format", "{{.Name}}")
	assert.Equal(t, stdout, "app9\n")
	assert.ErrorContains(t, err, "network nosuch not found")
	assert.ErrorContains(t, err, "network bridge has the driver bridge")
}

// Berth is asked first and Docker then; nothing is removed without --force.
func TestPruneNeedsForce(t *testing.T) {
	w := newWorld(t)
	stdout, stderr, err := w.try("network", "prune")
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(stdout, long("c")) && strings.Contains(stderr, "--force"))
	assert.Equal(t, len(w.removed), 0)

	assert.Equal(t, w.run("network", "prune", "--force"), long("c")+"\n")
	assert.DeepEqual(t, w.removed, []string{long("c")})

	w.removeErr = errors.New("a container is on it")
	stdout, _, err = w.try("network", "prune", "--force")
	assert.Equal(t, stdout, "")
	assert.ErrorContains(t, err, "a container is on it")

	// All networks look forgotten to a Docker that does not answer.
	w.removed, w.apiErr = nil, errNoDocker
	_, _, err = w.try("--socket", filepath.Join(w.dir, pluginID("f"), "berth.sock"), "network", "prune", "--force")
	assert.ErrorContains(t, err, errNoDocker.Error())
	assert.Equal(t, len(w.removed), 0)
}

func TestCollectAsksForOneNetwork(t *testing.T) {
	w := newWorld(t)
	assert.Equal(t, w.run("endpoint", "gc", "-q", "--no-trunc"), long("7")+"\n")
	w.run("endpoint", "gc", "--filter", "network=app9", "-n")
	assert.DeepEqual(t, w.collected, []control.CollectRequest{{}, {Network: long("a"), DryRun: true}})
	_, _, err := w.try("endpoint", "gc", "--filter", "network=nosuch")
	assert.ErrorContains(t, err, "network nosuch not found")
}

// IDs do where there are no names.
func TestSocketWithoutDocker(t *testing.T) {
	w := newWorld(t)
	w.apiErr = errNoDocker
	socket := filepath.Join(w.dir, pluginID("f"), "berth.sock")
	stdout, stderr, err := w.try("--socket", socket, "network", "ls", "-q")
	assert.NilError(t, err)
	assert.Equal(t, stdout, "bbbbbbbbbbbb\naaaaaaaaaaaa\ncccccccccccc\n")
	assert.Assert(t, strings.Contains(stderr, "names are not shown"))
	assert.Equal(t, w.run("--socket", socket, "port", "aaaa", "-q"), "80-89/tcp -> 0.0.0.0:8080-8089\n5353/udp -> [::1]:53\n")
	t.Setenv(EnvSocket, socket)
	assert.Assert(t, strings.Contains(w.run("info"), "network: ready"))

	t.Setenv(EnvSocket, filepath.Join(w.dir, "none.sock"))
	_, _, err = w.try("network", "ls")
	assert.ErrorContains(t, err, "there is no such socket")
}

func TestRemoteContextIsRefused(t *testing.T) {
	w := newWorld(t)
	w.host = "ssh://prod"
	for _, args := range [][]string{{"network", "ls"}, {"info"}, {"port"}, {"doctor"}, {"network", "prune", "--force"}} {
		stdout, _, err := w.try(args...)
		if args[0] == "doctor" {
			assert.ErrorContains(t, err, "1 check failed")
			assert.Assert(t, strings.Contains(stdout, "ssh://prod"))
			continue
		}
		assert.ErrorContains(t, err, "ssh://prod")
	}
	// A socket of this machine and names of another one do not belong together.
	socket := filepath.Join(w.dir, pluginID("f"), "berth.sock")
	stdout, stderr, err := w.try("--socket", socket, "network", "ls", "--format", "{{.Name}}")
	assert.NilError(t, err)
	assert.Equal(t, stdout, "\n\n\n")
	assert.Assert(t, strings.Contains(stderr, "another machine"))
	_, _, err = w.try("--socket", socket, "network", "prune", "--force")
	assert.ErrorContains(t, err, "another machine")
	assert.Equal(t, len(w.removed), 0)
}

func TestWhichPlugin(t *testing.T) {
	w := newWorld(t)
	_, _, err := w.try("--plugin", "nosuch", "info")
	assert.ErrorContains(t, err, "there is berth-net:latest")
	for _, name := range []string{"berth-net", "berth-net:latest", pluginID("f")[:12]} {
		w.run("--plugin", name, "info")
	}

	// One for volumes is not meant by what is of networks.
	volumes := w.newServer(control.VolumeService)
	volumes.Ready(control.VolumeService)
	w.install("berth-vol:latest", pluginID("e"), true, "volumedriver", volumes)
	w.run("network", "ls")
	_, _, err = w.try("info")
	assert.ErrorContains(t, err, "several Berth plugins: berth-net:latest, berth-vol:latest")
	assert.Assert(t, strings.Contains(w.run("--plugin", "berth-vol", "info"), "volume: ready"))
	_, _, err = w.try("--plugin", "berth-vol", "network", "ls")
	assert.ErrorContains(t, err, "serves no networks")

	w.install("mine/berth-net:2", pluginID("9"), true, "networkdriver", w.server)
	_, _, err = w.try("network", "ls")
	assert.ErrorContains(t, err, "several Berth plugins: berth-net:latest, mine/berth-net:2")
	stdout, _, _ := w.try("doctor")
	assert.Assert(t, strings.Contains(stdout, "(several-plugins)"))

	w.plugins = nil
	_, _, err = w.try("network", "ls")
	assert.ErrorContains(t, err, "no Berth plugin that has a network service is installed")
	w.install("berth-net:latest", pluginID("8"), false, "networkdriver", nil)
	for _, args := range [][]string{{"network", "ls"}, {"--plugin", "berth-net", "network", "ls"}} {
		_, _, err = w.try(args...)
		assert.ErrorContains(t, err, "docker plugin enable berth-net:latest")
	}
	// A daemon of its own is found without any plugin, and without Docker.
	w.listen(filepath.Join(w.dir, "berth-net.sock"), w.server)
	w.run("network", "ls")
	w.apiErr = errNoDocker
	w.run("network", "ls")
	w.run("--plugin", "berth-net", "network", "ls")

	w.apiErr = nil
	w.plugins[0].Enabled = true
	_, _, err = w.try("--plugin", "berth-net:latest", "network", "ls")
	assert.ErrorContains(t, err, "is not on this machine")
}

func TestDoctorComparesDockerWithBerth(t *testing.T) {
	w := newWorld(t)
	find := func(id string) (found []string) {
		stdout, _, _ := w.try("doctor", "--format", "{{.ID}}|{{.Status}}|{{.Summary}}|{{json .Cure}}")
		for line := range strings.Lines(stdout) {
			if name, rest, _ := strings.Cut(line, "|"); name == id {
				found = append(found, strings.TrimSpace(rest))
			}
		}
		return found
	}
	assert.DeepEqual(t, find("network-unknown-to-docker"),
		[]string{`warn|Berth has the network cccccccccccc (bthcccccccccccc), and Docker does not know it|"docker berth network prune --force"`})
	w.berth, w.endpoints = w.berth[:2], w.endpoints[:2]
	assert.DeepEqual(t, find("agreement"), []string{`ok|Docker and Berth agree on 2 networks and 2 endpoints|""`})
	stdout, _, err := w.try("doctor")
	assert.NilError(t, err, stdout)

	w.networks = append(w.networks, network.Summary{
		ID: long("3"), Name: "lo st", Driver: "berth-net:latest", Scope: "local", Internal: true,
		IPAM: network.IPAM{Driver: "berth-net:latest", Config: []network.IPAMConfig{{Subnet: "10.8.0.0/24", Gateway: "10.8.0.1"}}}, Options: map[string]string{"mode": "bridge"},
	})
	assert.DeepEqual(t, find("network-unknown-to-berth"), []string{
		`fail|Docker has the network lo st, and Berth does not know it|"docker network rm 'lo st'\ndocker network create -d berth-net:latest --ipam-driver berth-net:latest --internal --subnet 10.8.0.0/24 --gateway 10.8.0.1 -o mode=bridge 'lo st'"`,
	})
	w.networks[len(w.networks)-1].Driver = "berth-net"
	assert.DeepEqual(t, find("driver-name"), []string{
		`fail|network lo st has the driver berth-net, which no enabled plugin has|"docker network rm 'lo st'\ndocker network create -d berth-net:latest --ipam-driver berth-net:latest --internal --subnet 10.8.0.0/24 --gateway 10.8.0.1 -o mode=bridge 'lo st'"`,
	})
	w.networks = w.networks[:3]
	w.containers = append(w.containers, container.Summary{ID: long("4"), Names: []string{"/stray"}, NetworkSettings: on(long("a"), long("0"))})
	assert.DeepEqual(t, find("endpoint-unknown-to-berth"), []string{`fail|container stray is on network app9, and Berth does not know it there|"docker restart stray"`})
	w.containers = w.containers[:2]

	w.server.Refuse(control.NetworkService, errors.New("the state is damaged"))
	assert.DeepEqual(t, find("network-service"), []string{`fail|the network service cannot start: the state is damaged|""`})
	_, _, err = w.try("doctor")
	var status cli.StatusError
	assert.Assert(t, errors.As(err, &status))
	assert.Equal(t, status.StatusCode, 1)
	w.server.SetNetworks(w)

	w.plugins[0].Enabled = false
	assert.DeepEqual(t, find("plugin"), []string{`fail|plugin berth-net:latest is disabled|"docker plugin enable berth-net:latest"`})
	w.apiErr = errNoDocker
	assert.Equal(t, len(find("docker-api")), 1)
}

func TestWrongUse(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		args, want string
		status     int
	}{
		{"network ls --nosuch", "unknown flag", 125},
		{"network ls --filter color=red", "invalid filter", 1},
		{"network ls extra", "accepts no arguments", 1},
		{"network frob", "unknown command", 1},
		{"frob", "unknown command", 1},
		{"network inspect", "requires at least 1 argument", 1},
		{"network ls --format {{.Nosuch}}", "Nosuch", 1},
		{"info --format {{", "template", 64},
		{"port nosuch", "no running container and no Berth network nosuch", 1},
		{"port web app9", "accepts at most 1 arg", 1},
	} {
		_, _, err := w.try(strings.Split(c.args, " ")...)
		assert.ErrorContains(t, err, c.want, c.args)
		status := 1
		var coded cli.StatusError
		if errors.As(err, &coded) {
			status = coded.StatusCode
		}
		assert.Equal(t, status, c.status, c.args)
	}
}

func TestNameOfTwoThings(t *testing.T) {
	w := newWorld(t)
	w.containers[0].Names = []string{"/app9"}
	_, _, err := w.try("port", "app9")
	assert.ErrorContains(t, err, "--filter container=app9 or --filter network=app9")
	assert.Equal(t, len(strings.Split(strings.TrimSpace(w.run("port", "-q", "--filter", "network=app9")), "\n")), 2)
}

func TestCompletion(t *testing.T) {
	w := newWorld(t)
	offered := func(args ...string) []string {
		lines := strings.Split(w.run(append([]string{"__complete"}, args...)...), "\n")
		return lines[:len(lines)-2] // the directive and the end
	}
	assert.DeepEqual(t, offered("network", "inspect", ""), []string{"app9", "app10"})
	assert.DeepEqual(t, offered("network", "inspect", "app9", ""), []string{"app10"})
	assert.DeepEqual(t, offered("port", ""), []string{"db", "web", "app9", "app10"})
	assert.DeepEqual(t, offered("port", "web", ""), []string{})
	assert.DeepEqual(t, offered("--plugin", ""), []string{"berth-net:latest"})
	w.apiErr = errNoDocker
	assert.DeepEqual(t, offered("network", "inspect", ""), []string{})
}

func TestPausedDir(t *testing.T) {
	for _, c := range []struct {
		state, home, want string
		uid               int
	}{
		{"/s", "/home/u", "/s/docker-berth/paused", 0},
		{"relative", "/home/u", "/home/u/.local/state/docker-berth/paused", 1000},
		{"", "/root", "/var/lib/berth/cli/paused", 0},
		{"", "", "/var/lib/berth/cli/paused", 1000},
	} {
		env := map[string]string{"XDG_STATE_HOME": c.state, "HOME": c.home}
		assert.Equal(t, pausedDir(func(name string) string { return env[name] }, c.uid), c.want)
	}
}
