package lab

import (
	"fmt"
	"os"
	"testing"

	"gotest.tools/v3/assert"
)

func TestMain(m *testing.M) {
	if Reexec() {
		return
	}
	if err := RemoveOrphans(); err != nil {
		fmt.Fprintln(os.Stderr, "remove what a killed test left:", err)
		os.Exit(1)
	}
	code := m.Run()
	left, err := LeftBehind(TestPrefix())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "left behind on the machine:", l)
		code = 1
	}
	os.Exit(code)
}

func TestMirrorIsFoundInBothAptFormats(t *testing.T) {
	for _, c := range []struct{ name, sources, want string }{
		{"one line", "# deb http://no.example/debian x\ndeb http://deb.example.org/debian bookworm main\n", "http://deb.example.org/debian"},
		{"options", "deb [arch=amd64 signed-by=/k] https://m.example.org/debian/ sid main\n", "https://m.example.org/debian"},
		{"deb822", "Types: deb\nURIs: http://m.example.org/debian\nSuites: bookworm\n", "http://m.example.org/debian"},
		{"other archives", "deb http://m.example.org/debian-security x main\ndeb https://apt.example.org/node_20.x y main\n", ""},
		{"nothing", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			assert.Equal(t, mirrorIn(c.sources), c.want)
		})
	}
}

func TestUnknownEngineIsRefusedWithTheKnownOnes(t *testing.T) {
	_, err := EngineByVersion("19.03")
	assert.ErrorContains(t, err, `engine "19.03" is unknown: have 20.10, 26.1, 28.5`)
}

func TestMissingRootNamesTheCommandThatFetchesIt(t *testing.T) {
	t.Setenv("BERTH_LAB_CACHE", t.TempDir())
	for _, e := range Engines() {
		assert.ErrorContains(t, e.Cached(), "berth-lab fetch "+e.Version)
	}
}

func TestHostNamesThatCannotBePathsAreRefused(t *testing.T) {
	for _, name := range []string{"", "../x", "A", "a_b", "-a", "a/b", "abcdefghijklmnopqrstu"} {
		_, err := New(t.Context(), Options{Name: name, Engine: "20.10"})
		assert.ErrorContains(t, err, fmt.Sprintf("host name %q", name))
		assert.ErrorContains(t, Remove(name, false), fmt.Sprintf("host name %q", name))
	}
}

func TestMissingPluginNamesTheCommandThatBuildsIt(t *testing.T) {
	dir := t.TempDir()
	assert.ErrorContains(t, pluginBuilt(dir, Managed, "berth-net"), "run ./scripts/build-plugin")
	assert.ErrorContains(t, pluginBuilt(dir, Unmanaged, "berth-vol"), "run ./scripts/build-plugin")
	assert.ErrorContains(t, pluginBuilt(dir, Managed, "other"), `plugin "other" is unknown`)
}
