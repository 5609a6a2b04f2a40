package manifest_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/manifest"
)

// root is the top of the repository, seen from this package.
const root = "../.."

// shipped names the plugins and their files.
var shipped = []struct{ plugin, file string }{
	{"berth", "config.json"},
	{"berth-net", "netplugin/config.json"},
	{"berth-vol", "volplugin/config.json"},
}

func TestShippedConfigsPass(t *testing.T) {
	for _, s := range shipped {
		_, err := manifest.Load(filepath.Join(root, s.file))
		assert.Check(t, err, s.file)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	assert.NilError(t, os.WriteFile(path, []byte("{"), 0o600))
	_, err := manifest.Load(path)
	assert.ErrorContains(t, err, path)
	assert.ErrorContains(t, err, "not a plugin config")

	_, err = manifest.Load(path + ".gone")
	assert.ErrorIs(t, err, os.ErrNotExist)
}

// edit applies change to the decoded pair config and encodes it again.
func edit(t *testing.T, change func(config map[string]any)) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(root, "config.json"))
	assert.NilError(t, err)
	var config map[string]any
	assert.NilError(t, json.Unmarshal(raw, &config))
	change(config)
	raw, err = json.Marshal(config)
	assert.NilError(t, err)
	return raw
}

// at walks into objects and lists: at(config, "mounts", 0).
func at(v any, steps ...any) map[string]any {
	for _, step := range steps {
		switch step := step.(type) {
		case string:
			v = v.(map[string]any)[step]
		case int:
			v = v.([]any)[step]
		}
	}
	return v.(map[string]any)
}

func TestFindings(t *testing.T) {
	type object = map[string]any
	type list = []any
	cases := []struct {
		name   string
		change func(object)
		want   string
	}{
		{"unknown key", func(c object) { c["entrypiont"] = list{} }, `unknown field "entrypiont"`},
		{"unknown key in a mount", func(c object) { at(c, "mounts", 0)["src"] = "/x" }, `unknown field "src"`},
		{"unknown key in env", func(c object) { at(c, "env", 0)["default"] = "x" }, `unknown field "default"`},
		{"no types", func(c object) { delete(at(c, "interface"), "types") }, "interface.types: empty"},
		{"type without version", func(c object) { at(c, "interface")["types"] = list{"docker.volumedriver"} }, `"docker.volumedriver" is none of`},
		{"short type", func(c object) { at(c, "interface")["types"] = list{""} }, `"" is none of`},
		{"type in capitals", func(c object) { at(c, "interface")["types"] = list{"docker.VolumeDriver/1.0"} }, "is none of"},
		{"type twice", func(c object) {
			at(c, "interface")["types"] = list{"docker.volumedriver/1.0", "docker.volumedriver/1.0"}
		}, "listed twice"},
		{"no description", func(c object) { c["description"] = "" }, "description: empty"},
		{"documentation is no address", func(c object) { c["documentation"] = "see README" }, "documentation:"},
		{"socket with a directory", func(c object) { at(c, "interface")["socket"] = "x/berth.sock" }, "interface.socket"},
		{"socket name too long", func(c object) { at(c, "interface")["socket"] = strings.Repeat("b", 18) + ".sock" }, "at most 22"},
		{"other scheme", func(c object) { at(c, "interface")["protocolScheme"] = "http/2" }, "protocolScheme"},
		{"no entrypoint", func(c object) { c["entrypoint"] = list{} }, "entrypoint"},
		{"relative entrypoint", func(c object) { c["entrypoint"] = list{"berthd"} }, "entrypoint"},
		{"no workdir", func(c object) { delete(c, "workdir") }, "workdir"},
		{"args", func(c object) { c["args"] = object{"name": "args"} }, "args: not allowed"},
		{"user", func(c object) { c["user"] = object{"UID": 1000} }, "user: dockerd ignores it"},
		{"rootfs", func(c object) { c["rootfs"] = object{"type": "layers"} }, "rootfs: is written by dockerd"},
		{"network driver without host network", func(c object) { at(c, "network")["type"] = "" }, "want host"},
		{"volume driver without host network", func(c object) {
			at(c, "interface")["types"] = list{"docker.volumedriver/1.0"}
			at(c, "linux")["capabilities"] = list{"CAP_SYS_ADMIN"}
			at(c, "network")["type"] = ""
		}, "want host"},
		{"a capability too many", func(c object) {
			at(c, "linux")["capabilities"] = list{"CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}
		}, "want exactly [CAP_NET_ADMIN CAP_SYS_ADMIN]"},
		{"a capability too few", func(c object) { at(c, "linux")["capabilities"] = list{"CAP_NET_ADMIN"} }, "want exactly"},
		{"no devices for volumes", func(c object) { at(c, "linux")["allowAllDevices"] = false }, "linux.allowAllDevices"},
		{"all devices for networks", func(c object) {
			at(c, "interface")["types"] = list{"docker.networkdriver/1.0", "docker.ipamdriver/1.0"}
			at(c, "linux")["capabilities"] = list{"CAP_NET_ADMIN"}
			delete(c, "propagatedMount")
		}, "linux.allowAllDevices"},
		{"a device", func(c object) { at(c, "linux")["devices"] = list{object{"name": "fuse", "path": "/dev/fuse"}} }, "linux.devices"},
		{"host pids", func(c object) { c["pidhost"] = true }, "pidHost"},
		{"host ipc", func(c object) { c["ipchost"] = true }, "ipcHost"},
		{"volumes without propagated mount", func(c object) { delete(c, "propagatedMount") }, "propagatedMount"},
		{"relative propagated mount", func(c object) { c["propagatedMount"] = "mnt" }, "propagatedMount"},
		{"mount without a name", func(c object) { at(c, "mounts", 0)["name"] = "" }, `mounts[0] ""`},
		{"mount named twice", func(c object) { at(c, "mounts", 1)["name"] = "state" }, "used twice"},
		{"mount without description", func(c object) { delete(at(c, "mounts", 0), "description") }, `mounts[0] "state": no description`},
		{"mount without source", func(c object) { at(c, "mounts", 0)["source"] = nil }, "the source is not"},
		{"mount with empty source", func(c object) { at(c, "mounts", 0)["source"] = "" }, "the source is not"},
		{"relative destination", func(c object) { at(c, "mounts", 0)["destination"] = "state" }, "destination"},
		{"tmpfs", func(c object) { at(c, "mounts", 0)["type"] = "tmpfs" }, "want bind"},
		{"neither bind nor rbind", func(c object) { at(c, "mounts", 0)["options"] = list{"rw"} }, "neither bind nor rbind"},
		{"settable options", func(c object) { at(c, "mounts", 0)["settable"] = list{"options"} }, "only the source"},
		{"fixed state", func(c object) { delete(at(c, "mounts", 0), "settable") }, "must be settable"},
		{"mount below propagated mount", func(c object) { at(c, "mounts", 0)["destination"] = "/mnt/berth-volumes/state" }, "overlaps"},
		{"mount above propagated mount", func(c object) { at(c, "mounts", 0)["destination"] = "/mnt" }, "overlaps"},
		{"no state", func(c object) { c["mounts"] = c["mounts"].([]any)[1:] }, `"state" is missing`},
		{"no data", func(c object) { c["mounts"] = c["mounts"].([]any)[:1] }, `"data" is missing`},
		{"env of another program", func(c object) { at(c, "env", 0)["name"] = "DEBUG" }, "BERTH_NAME"},
		{"env named twice", func(c object) { at(c, "env", 1)["name"] = "BERTH_LOG_LEVEL" }, "used twice"},
		{"env without description", func(c object) { at(c, "env", 0)["description"] = "" }, "no description"},
		{"env without default", func(c object) { delete(at(c, "env", 0), "value") }, "no default value"},
		{"env with settable name", func(c object) { at(c, "env", 0)["settable"] = list{"name"} }, "only the value"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := manifest.Parse(edit(t, c.change))
			assert.ErrorContains(t, err, c.want)
		})
	}
}

func TestEveryFindingIsOneLine(t *testing.T) {
	_, err := manifest.Parse(edit(t, func(c map[string]any) {
		c["description"], c["workdir"], c["pidhost"] = "", "", true
	}))
	assert.Equal(t, len(strings.Split(err.Error(), "\n")), 3, err)
}

func TestTextAfterTheObjectIsRefused(t *testing.T) {
	raw := edit(t, func(map[string]any) {})
	_, err := manifest.Parse(append(raw, "{}"...))
	assert.ErrorContains(t, err, "not a plugin config")
}

func FuzzParse(f *testing.F) {
	for _, s := range shipped {
		raw, err := os.ReadFile(filepath.Join(root, s.file))
		assert.NilError(f, err)
		f.Add(raw)
	}
	f.Add([]byte(`{"interface":{"types":["x"]}}`))
	f.Add([]byte(`{"Interface":{"types":["docker.volumedriver/1.0"]},"interface":{"TYPES":[""]}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		config, err := manifest.Parse(raw)
		if err != nil {
			return
		}
		// What passes once passes again in the form that dockerd would store.
		raw, err = json.Marshal(config)
		assert.NilError(t, err)
		_, err = manifest.Parse(raw)
		assert.NilError(t, err)
	})
}
