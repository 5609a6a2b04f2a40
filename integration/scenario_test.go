package integration

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/lab"
)

var (
	enginesFlag = flag.String("engines", "", "comma-separated engines to run all scenarios on, instead of the default tier")
	modesFlag   = flag.String("modes", "", "comma-separated modes (managed, unmanaged) to run all scenarios in, instead of the default tier")
	fullFlag    = flag.Bool("full", false, "run every scenario on every engine in every mode")
	driverFlag  = flag.String("driver", "", "bridge or macvlan: run, on Docker's own driver of that name and without plugins, the scenarios that it passes too")
	dirFlag     = flag.String("scenarios", "testdata/scenario", "directory of the scenarios")
)

// running bounds how many scenarios run at once: they wait a good part of their time,
// so that three keep two cores busy. numbered names their hosts.
var (
	running  = make(chan struct{}, 3)
	numbered atomic.Int32
)

// A header is what a scenario's first comment lines ask for.
type header struct {
	// core scenarios also run on another engine and unmanaged by default, slow ones
	// only where engines, modes or everything are asked for.
	core, slow bool
	// wired asks for a LAN with a router and a neighbour.
	wired       bool
	hosts, nics int
	engineArgs  []string
	plugins     []string
	// volumesOn is the file system of the volumes' directory; "" is the host's.
	volumesOn string
	// settings are the network plugin's, as NAME=value.
	settings []string
	// like names the driver of Docker's own that passes the scenario too, on
	// likeEngines if there are any.
	like        string
	likeEngines []string
	// engines and modes, when there are any, are the only ones it can run on.
	engines, modes []string
}

// headerLine is a comment with one word and a colon; others are prose.
var headerLine = regexp.MustCompile(`^#\s*([a-z-]+):\s*(.*?)\s*$`)

// parseHeader reads the "# key: value" lines before the first other line.
func parseHeader(text string) (header, error) {
	h := header{hosts: 1, nics: 1, plugins: []string{"berth-net", "berth-vol"}}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			break
		}
		m := headerLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			continue
		}
		switch value := m[2]; m[1] {
		case "tier":
			if value != "core" && value != "all" && value != "slow" {
				return h, fmt.Errorf("tier %q: want core, all or slow", value)
			}
			h.core, h.slow = value == "core", value == "slow"
		case "hosts":
			if _, err := fmt.Sscan(value, &h.hosts); err != nil || h.hosts < 1 || h.hosts > 9 {
				return h, fmt.Errorf("hosts %q: want 1 to 9", value)
			}
		case "nics":
			if _, err := fmt.Sscan(value, &h.nics); err != nil || h.nics < 1 || h.nics > 9 {
				return h, fmt.Errorf("nics %q: want 1 to 9", value)
			}
		case "lan":
			if value != "yes" && value != "no" {
				return h, fmt.Errorf("lan %q: want yes or no", value)
			}
			h.wired = value == "yes"
		case "volumes-on":
			h.volumesOn = value
		case "engine-args":
			h.engineArgs = strings.Fields(value)
		case "plugins":
			h.plugins = strings.Fields(value)
			if value == "none" {
				h.plugins = nil
			}
		case "settings":
			h.settings = strings.Fields(value)
		case "like":
			driver, engines, _ := strings.Cut(value, " ")
			if !dockersDriver(lab.Mode(driver)) {
				return h, fmt.Errorf("like %q: want bridge or macvlan, and engines where it is not all", value)
			}
			h.like, h.likeEngines = driver, strings.Fields(engines)
		case "engines":
			h.engines = strings.Fields(value)
		case "modes":
			h.modes = strings.Fields(value)
		default:
			return h, fmt.Errorf("header %q is unknown: have tier, like, hosts, lan, nics, volumes-on, engine-args, plugins, settings, engines, modes", m[1])
		}
	}
	return h, nil
}

// ownBridge and ownMacvlan are the modes of scenarios that run on Docker's own drivers.
const (
	ownBridge  lab.Mode = "bridge"
	ownMacvlan lab.Mode = "macvlan"
)

func dockersDriver(m lab.Mode) bool { return m == ownBridge || m == ownMacvlan }

// A run is one way to run a scenario.
type run struct {
	engine string
	mode   lab.Mode
}

// runs lists how a scenario is to be run according to the flags.
func (h header) runs() []run {
	engines, modes := splitFlag(*enginesFlag), splitFlag(*modesFlag)
	chosen := *fullFlag || len(engines)+len(modes) > 0
	if *fullFlag || (!chosen && len(h.plugins) == 0) {
		engines = nil
		for _, e := range lab.Engines() {
			engines = append(engines, e.Version)
		}
	}
	if *fullFlag {
		modes = []string{string(lab.Managed), string(lab.Unmanaged)}
	}
	if len(engines) == 0 {
		engines = []string{"20.10"}
	}
	if len(modes) == 0 {
		modes = []string{string(lab.Managed)}
	}
	if len(h.plugins) == 0 {
		modes = []string{"none"}
	}
	if h.slow && !chosen {
		return nil
	}
	if *driverFlag != "" {
		if h.like != *driverFlag {
			return nil
		}
		chosen, modes = true, []string{*driverFlag}
		h.modes, h.engines = nil, h.likeEngines
	}
	var list []run
	for _, e := range engines {
		for _, m := range modes {
			list = append(list, run{e, lab.Mode(m)})
		}
	}
	if !chosen && h.core && len(h.plugins) > 0 {
		list = append(list, run{"28.5", lab.Managed}, run{"20.10", lab.Unmanaged})
	}
	return slices.DeleteFunc(list, func(r run) bool {
		return len(h.engines) > 0 && !slices.Contains(h.engines, r.engine) ||
			len(h.modes) > 0 && !slices.Contains(h.modes, string(r.mode))
	})
}

func splitFlag(value string) []string {
	return strings.FieldsFunc(value, func(r rune) bool { return r == ',' })
}

func TestScenarios(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(*dirFlag, "*.txtar"))
	assert.NilError(t, err)
	assert.Assert(t, len(files) > 0, "no scenarios in %s", *dirFlag)
	assert.Assert(t, *driverFlag == "" || dockersDriver(lab.Mode(*driverFlag)), "-driver %s: want bridge or macvlan", *driverFlag)
	for _, file := range files {
		text, err := os.ReadFile(file)
		assert.NilError(t, err)
		head, err := parseHeader(string(text))
		assert.NilError(t, err, file)
		name := strings.TrimSuffix(filepath.Base(file), ".txtar")
		for _, r := range head.runs() {
			t.Run(fmt.Sprintf("%s/%s/%s", name, r.engine, r.mode), func(t *testing.T) {
				t.Parallel()
				running <- struct{}{}
				defer func() { <-running }()
				runScenario(t, file, head, r)
			})
		}
	}
}

// runScenario boots the hosts, runs the script and looks for leaks.
func runScenario(t *testing.T, file string, head header, r run) {
	t.Helper()
	s := newScenario(t, head, r)
	testscript.RunT(scriptT{t}, testscript.Params{
		Files:     []string{file},
		Setup:     s.setup,
		Cmds:      s.commands(),
		Condition: s.condition,
	})
	if dockersDriver(r.mode) {
		return // what Docker leaves is not ours to judge
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	left, err := s.leaks(ctx, leakGrace)
	assert.NilError(t, err)
	for _, l := range left {
		t.Errorf("left behind: %s", l)
	}
}

// scriptT runs a script in the test that called, not in a parallel one of its own.
type scriptT struct{ *testing.T }

func (t scriptT) Run(_ string, f func(testscript.T)) { f(t) }
func (t scriptT) Parallel()                          {}
func (t scriptT) Verbose() bool                      { return testing.Verbose() }

// A scenario is a script with its hosts.
type scenario struct {
	header
	run
	lan    *lab.LAN
	hosts  []*lab.Host
	before []lab.Snapshot
	// rebooted has the hosts whose engine has not yet been warmed up again.
	rebooted map[string]bool
	// started has the commands in the background by name.
	started map[string]chan outcome
}

// scenarioStart is how long the hosts of a scenario may take until it can begin.
const scenarioStart = 3 * time.Minute

func newScenario(t *testing.T, head header, r run) *scenario {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), scenarioStart)
	defer cancel()
	start := time.Now()
	assert.NilError(t, os.RemoveAll(filepath.Join(lab.Dir(), "failed", logName(t))))
	if dockersDriver(r.mode) {
		// Without these, engines before 27 leave IPv6 to their proxy.
		head.plugins, head.engineArgs = nil, append(slices.Clone(head.engineArgs), "--experimental", "--ip6tables")
	}
	for _, p := range head.plugins {
		assert.NilError(t, lab.PluginBuilt(r.mode, p))
	}
	like, err := model.like(r, head.plugins)
	assert.NilError(t, err)
	s := &scenario{header: head, run: r, rebooted: map[string]bool{}, started: map[string]chan outcome{}}
	base := fmt.Sprintf("%s%d", lab.TestPrefix(), numbered.Add(1))
	if head.wired || head.hosts > 1 || head.nics > 1 {
		s.lan = lab.NewLAN(t, lab.LANOptions{Name: base, Engine: r.engine})
	}
	for i := range head.hosts {
		h := lab.NewHost(t, lab.Options{
			Name: fmt.Sprintf("%s-h%d", base, i+1), Engine: r.engine, LAN: s.lan, NICs: head.nics, DaemonArgs: head.engineArgs,
			VolumesOn: head.volumesOn, Like: like,
		})
		s.hosts = append(s.hosts, h)
		t.Cleanup(func() { keepFailed(t, h) })
		for _, p := range head.plugins {
			var settings []string
			if p != "berth-vol" {
				settings = head.settings
			}
			if r.mode == lab.Managed {
				assert.NilError(t, h.EnablePlugin(ctx, p, settings...))
			} else {
				assert.NilError(t, h.InstallPlugin(ctx, r.mode, p, settings...))
			}
		}
		s.warmUp(ctx, t, h)
		snap, err := h.Snapshot(ctx)
		assert.NilError(t, err)
		s.before = append(s.before, snap)
	}
	t.Logf("%d host(s) with engine %s ready after %.1fs", head.hosts, r.engine, time.Since(start).Seconds())
	return s
}

// warmUp makes Docker and the volume plugin make what they make once and keep: that
// is not the scenario's to remove. The network plugin takes away all of its own
// with the last network, so it gets no such help.
func (s *scenario) warmUp(ctx context.Context, t *testing.T, h *lab.Host) {
	t.Helper()
	assert.NilError(t, warmUpDocker(ctx, h))
	i := slices.IndexFunc(s.plugins, func(p string) bool { return p == "berth" || p == "berth-vol" })
	if i < 0 {
		return
	}
	for _, args := range [][]string{
		{"volume", "create", "-d", lab.DriverName(s.mode, s.plugins[i]), "warm-up"},
		{"volume", "rm", "warm-up"},
	} {
		_, err := h.Docker(ctx, args...)
		assert.NilError(t, err)
	}
}

// logName is where below failed/ the logs of a test are kept.
func logName(t *testing.T) string {
	t.Helper()
	return strings.ReplaceAll(t.Name(), "/", "_")
}

// warmUpDocker makes Docker make its chains and tables for published ports.
func warmUpDocker(ctx context.Context, h *lab.Host) error {
	_, err := h.Docker(ctx, "run", "--rm", "-p", "9", lab.BusyboxImage, "true")
	return err
}

// keepFailed saves the logs of a host when its test has failed.
func keepFailed(t *testing.T, h *lab.Host) {
	t.Helper()
	if !t.Failed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := h.WriteState(ctx); err != nil {
		t.Log(err)
	}
	dir, err := h.KeepLogs(logName(t))
	if err != nil {
		t.Log(err)
		return
	}
	t.Logf("logs of engine and plugins: %s", dir)
}

// setup gives the script its variables.
func (s *scenario) setup(env *testscript.Env) error {
	env.Setenv("ENGINE", s.engine)
	env.Setenv("MODE", string(s.mode))
	env.Setenv("PAIR", lab.DriverName(s.mode, "berth"))
	build, err := lab.BuildDir()
	if err != nil {
		return err
	}
	env.Setenv("BUILD", build)
	env.Setenv("MANY", "48")
	if *fullFlag {
		env.Setenv("MANY", "200")
	}
	netPlugin, volPlugin := "berth-net", "berth-vol"
	if slices.Contains(s.plugins, "berth") {
		netPlugin, volPlugin = "berth", "berth"
	}
	env.Setenv("NET", lab.DriverName(s.mode, netPlugin))
	env.Setenv("IPAM", lab.DriverName(s.mode, netPlugin))
	if dockersDriver(s.mode) {
		env.Setenv("NET", string(s.mode))
		env.Setenv("IPAM", "default")
	}
	env.Setenv("VOL", lab.DriverName(s.mode, volPlugin))
	if s.lan == nil {
		return nil
	}
	members := map[string]*lab.Host{"ROUTER": s.lan.Router, "NEIGHBOUR": s.lan.Neighbour, "HOST_ADDR": s.hosts[0]}
	for i, h := range s.hosts {
		members[fmt.Sprintf("HOST%d_ADDR", i+1)] = h
	}
	for name, h := range members {
		env.Setenv(name, s.lan.Addr4(h).String())
		env.Setenv(name+"6", s.lan.Addr6(h).String())
	}
	return nil
}

// condition is what a line can begin with in brackets: an engine's version, or berth
// where it is not a driver of Docker's own that is looked at.
func (s *scenario) condition(cond string) (bool, error) {
	if cond == "berth" {
		return !dockersDriver(s.mode), nil
	}
	_, err := lab.EngineByVersion(cond)
	return cond == s.engine, err
}

// leakGrace is how long what was removed may take to vanish.
const leakGrace = 10 * time.Second

// leaks compares all hosts with what they were before the script.
func (s *scenario) leaks(ctx context.Context, within time.Duration) ([]string, error) {
	var left []string
	for i, h := range s.hosts {
		if s.rebooted[h.Name] {
			if err := warmUpDocker(ctx, h); err != nil {
				return nil, err
			}
			s.rebooted[h.Name] = false
		}
		lines, err := h.WaitClean(ctx, s.before[i], within)
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			left = append(left, fmt.Sprintf("h%d %s", i+1, l))
		}
	}
	return left, nil
}
