package manifest_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/docker/docker/api/types"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/manifest"
	"github.com/berth-plugin/berth/shared/settings"
)

// table returns the rows of the README's table whose first column has the title,
// each as its cells, without the two lines on top.
func table(t *testing.T, title string) (head []string, rows [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	assert.NilError(t, err)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		inside := strings.HasPrefix(line, "|")
		switch {
		case head != nil && !inside:
			return head, rows
		case head == nil && strings.HasPrefix(line, "| "+title+" |"):
			head = cells(line)
		case head != nil && !strings.HasPrefix(line, "|---"):
			rows = append(rows, cells(line))
		}
	}
	assert.Assert(t, head != nil, "README.md has no table of %s", title)
	return head, rows
}

func cells(line string) []string {
	var out []string
	for _, cell := range strings.Split(strings.Trim(line, "|"), "|") {
		out = append(out, strings.TrimSpace(cell))
	}
	return out
}

// privileges lists what dockerd asks a user to grant, as the README words it.
func privileges(config *types.PluginConfig) []string {
	var list []string
	if config.Network.Type != "" {
		list = append(list, config.Network.Type+" network")
	}
	for _, capability := range config.Linux.Capabilities {
		list = append(list, "`"+capability+"`")
	}
	if config.Linux.AllowAllDevices {
		list = append(list, "all devices")
	}
	for _, mount := range config.Mounts {
		list = append(list, fmt.Sprintf("mount `%s` from `%s`", mount.Name, *mount.Source))
	}
	return list
}

func TestReadmeGivesAReasonForExactlyThePrivilegesAskedFor(t *testing.T) {
	head, rows := table(t, "Privilege")
	for _, s := range shipped {
		config, err := manifest.Load(filepath.Join(root, s.file))
		assert.NilError(t, err)
		column := slices.Index(head, "`"+s.plugin+"`")
		assert.Assert(t, column > 0, "the table has no column for %s", s.plugin)
		var told []string
		for _, row := range rows {
			assert.Assert(t, row[len(row)-1] != "", "%s has no reason", row[0])
			if row[column] == "yes" {
				told = append(told, row[0])
			} else {
				assert.Equal(t, row[column], "no")
			}
		}
		assert.DeepEqual(t, sorted(told), sorted(privileges(config)))
	}
}

func TestReadmeTellsExactlyTheSettingsAndTheirDefaults(t *testing.T) {
	_, rows := table(t, "Setting")
	told := make(map[string][]string) // by plugin
	for _, row := range rows {
		for _, plugin := range strings.Fields(row[2]) {
			told[plugin] = append(told[plugin], row[0]+" "+row[1])
		}
	}
	for _, s := range shipped {
		config, err := manifest.Load(filepath.Join(root, s.file))
		assert.NilError(t, err)
		var shown []string
		for _, env := range config.Env {
			if len(env.Settable) > 0 {
				value := ""
				if *env.Value != "" {
					value = "`" + *env.Value + "`"
				}
				shown = append(shown, "`"+env.Name+"` "+value)
			}
		}
		assert.DeepEqual(t, sorted(told["`"+s.plugin+"`"]), sorted(shown))
	}
}

// An upgrade keeps the old environment, so a default that is only in config.json
// would not reach an upgraded plugin.
func TestShippedDefaultsAreThoseOfTheProgram(t *testing.T) {
	program, err := settings.Read(func(string) string { return "" })
	assert.NilError(t, err)
	for _, s := range shipped {
		config, err := manifest.Load(filepath.Join(root, s.file))
		assert.NilError(t, err)
		env := make(map[string]string)
		for _, e := range config.Env {
			env[e.Name] = *e.Value
		}
		got, err := settings.Read(func(name string) string {
			if name == settings.EnvSysctlDir {
				return ""
			}
			return env[name]
		})
		assert.NilError(t, err)
		assert.DeepEqual(t, got, program)
	}
}

func TestSysctlDirIsWhereTheMountIs(t *testing.T) {
	for _, s := range shipped {
		config, err := manifest.Load(filepath.Join(root, s.file))
		assert.NilError(t, err)
		var mounted, told string
		for _, mount := range config.Mounts {
			if mount.Name == "sysctl" {
				mounted = mount.Destination
			}
		}
		for _, env := range config.Env {
			if env.Name == settings.EnvSysctlDir {
				told = *env.Value
			}
		}
		assert.Equal(t, told, mounted, s.plugin)
	}
}

// All plugins are one program: every setting in a config is one that it reads.
func TestEverySettingIsReadByTheProgram(t *testing.T) {
	read := make(map[string]bool)
	_, err := settings.Read(func(name string) string {
		read[name] = true
		return ""
	})
	assert.NilError(t, err)
	given := make(map[string]bool)
	for _, s := range shipped {
		config, err := manifest.Load(filepath.Join(root, s.file))
		assert.NilError(t, err)
		for _, env := range config.Env {
			given[env.Name] = true
		}
	}
	assert.DeepEqual(t, slices.Sorted(maps.Keys(given)), slices.Sorted(maps.Keys(read)))
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }
