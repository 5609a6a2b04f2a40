package integration

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/berth-plugin/berth/integration/lab"
)

// commandTimeout bounds every command of a script.
const commandTimeout = 2 * time.Minute

// An action is a command of the scripts: h is the host it is about.
type action func(ctx context.Context, s *scenario, h *lab.Host, args []string) (lab.Result, error)

// actions are the commands that may stand alone or behind `on`, `?` and `eventually`.
func actions() map[string]action {
	return map[string]action{
		"docker":    runDocker,
		"host":      runInHost,
		"neighbour": runInNeighbour,
		"router":    runInRouter,
		"engine":    runEngine,
		"plugin":    runPlugin,
		"reboot": func(ctx context.Context, s *scenario, h *lab.Host, _ []string) (lab.Result, error) {
			s.rebooted[h.Name] = true
			return lab.Result{}, h.Reboot(ctx)
		},
		"dhcp-server":     runDHCPServer,
		"stop-everything": stopEverything,
		"leakcheck":       runLeakCheck,
	}
}

// commands are all commands that scripts have beyond testscript's own.
func (s *scenario) commands() map[string]func(*testscript.TestScript, bool, []string) {
	cmds := map[string]func(*testscript.TestScript, bool, []string){}
	add := func(name string, tolerant bool) {
		cmds[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			full := args
			if !tolerant {
				full = append([]string{name}, args...)
			}
			ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
			defer cancel()
			start := time.Now()
			res, err := s.do(ctx, full)
			show(ts, res)
			if took := time.Since(start); took > time.Second {
				ts.Logf("(%.1fs)", took.Seconds())
			}
			conclude(ts, neg, tolerant, err)
		}
	}
	for name := range actions() {
		add(name, false)
	}
	add("on", false)
	add("eventually", false)
	add("?", true)
	cmds["envfrom"] = envFrom
	cmds["write"] = s.write
	cmds["start"] = s.start
	cmds["finish"] = s.finish
	return cmds
}

// write is `write PATH FILE`: a file of the script (or stdout) appears on the first
// host, in a directory that is made for it.
func (s *scenario) write(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 || !filepath.IsAbs(args[0]) {
		ts.Fatalf("usage: write PATH FILE, with an absolute path")
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	var stderr strings.Builder
	code, err := s.hosts[0].Run(ctx, lab.Command{
		Argv:   []string{"sh", "-c", `mkdir -p "${0%/*}" && cat > "$0"`, args[0]},
		Stdin:  strings.NewReader(ts.ReadFile(args[1])),
		Stderr: &stderr,
	})
	if err != nil || code != 0 {
		ts.Fatalf("write %s: exit code %d: %v: %s", args[0], code, err, stderr.String())
	}
}

// An outcome is how a command in the background ended.
type outcome struct {
	lab.Result
	err error
}

// start is `start NAME COMMAND`: the command runs beside those that follow.
func (s *scenario) start(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || s.started[args[0]] != nil {
		ts.Fatalf("usage: start NAME COMMAND, each name once")
	}
	done := make(chan outcome, 1)
	s.started[args[0]] = done
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		res, err := s.do(ctx, args[1:])
		done <- outcome{res, err}
	}()
}

// finish is `finish NAME`: it waits for what start began and ends as that did.
func (s *scenario) finish(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || s.started[args[0]] == nil {
		ts.Fatalf("usage: finish NAME, of a command that was started")
	}
	o := <-s.started[args[0]]
	delete(s.started, args[0])
	show(ts, o.Result)
	conclude(ts, neg, false, o.err)
}

// envFrom is `envfrom FILE`: every line NAME=value of the file (or of stdout)
// becomes a variable of the script.
func envFrom(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: envfrom FILE")
	}
	for line := range strings.Lines(ts.ReadFile(args[0])) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || name == "" || value == "" {
			ts.Fatalf("envfrom: %q is not NAME=value", line)
		}
		ts.Setenv(name, value)
	}
}

// show gives the output to the script's stdout and stderr commands.
func show(ts *testscript.TestScript, res lab.Result) {
	fmt.Fprint(ts.Stdout(), res.Stdout)
	fmt.Fprint(ts.Stderr(), res.Stderr)
}

// conclude decides whether the script goes on.
func conclude(ts *testscript.TestScript, neg, tolerant bool, err error) {
	var exit *lab.ExitError
	switch {
	case err == nil && neg:
		ts.Fatalf("unexpected success")
	case err == nil || tolerant && errors.As(err, &exit):
	case !neg:
		ts.Fatalf("%v", err)
	case !errors.As(err, &exit):
		// The command was not even run; that proves nothing.
		ts.Fatalf("want a failing command, have: %v", err)
	}
}

// do runs a command line: [on HOST] [eventually ...] ACTION ARGS.
func (s *scenario) do(ctx context.Context, args []string) (lab.Result, error) {
	h := s.hosts[0]
	if len(args) > 2 && args[0] == "on" {
		var n int
		if _, err := fmt.Sscanf(args[1], "h%d", &n); err != nil || n < 1 || n > len(s.hosts) {
			return lab.Result{}, fmt.Errorf("on %s: have h1 to h%d", args[1], len(s.hosts))
		}
		h, args = s.hosts[n-1], args[2:]
	}
	if len(args) > 0 && args[0] == "eventually" {
		return s.eventually(ctx, h, args[1:])
	}
	if len(args) == 0 || actions()[args[0]] == nil {
		return lab.Result{}, fmt.Errorf("no such command: %s", strings.Join(args, " "))
	}
	return actions()[args[0]](ctx, s, h, args[1:])
}

// eventually repeats [-t DURATION] [-stdout REGEXP] [!] ACTION ARGS until it is so.
func (s *scenario) eventually(ctx context.Context, h *lab.Host, args []string) (lab.Result, error) {
	within, want, neg := 20*time.Second, regexp.MustCompile(""), false
	for len(args) > 1 && strings.HasPrefix(args[0], "-") {
		var err error
		switch args[0] {
		case "-t":
			within, err = time.ParseDuration(args[1])
		case "-stdout":
			want, err = regexp.Compile("(?m)" + args[1])
		default:
			err = fmt.Errorf("eventually: unknown flag %s", args[0])
		}
		if err != nil {
			return lab.Result{}, err
		}
		args = args[2:]
	}
	if len(args) > 0 && args[0] == "!" {
		neg, args = true, args[1:]
	}
	if len(args) == 0 || actions()[args[0]] == nil {
		return lab.Result{}, fmt.Errorf("eventually: no such command: %s", strings.Join(args, " "))
	}
	deadline := time.Now().Add(within)
	for {
		res, err := actions()[args[0]](ctx, s, h, args[1:])
		var exit *lab.ExitError
		if err != nil && !errors.As(err, &exit) {
			return res, err
		}
		if (err != nil) == neg && want.MatchString(res.Stdout) {
			return res, nil
		}
		if time.Now().After(deadline) {
			if err == nil {
				err = &lab.ExitError{Argv: args, Result: res}
			}
			return res, fmt.Errorf("not within %s: %w", within, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func runDocker(ctx context.Context, _ *scenario, h *lab.Host, args []string) (lab.Result, error) {
	return h.Docker(ctx, args...)
}

func runInHost(ctx context.Context, _ *scenario, h *lab.Host, args []string) (lab.Result, error) {
	return h.Exec(ctx, args...)
}

var errNoLAN = errors.New("the scenario has no `# lan: yes`")

func runInNeighbour(ctx context.Context, s *scenario, _ *lab.Host, args []string) (lab.Result, error) {
	if s.lan == nil {
		return lab.Result{}, errNoLAN
	}
	return s.lan.Neighbour.Exec(ctx, args...)
}

func runInRouter(ctx context.Context, s *scenario, _ *lab.Host, args []string) (lab.Result, error) {
	if s.lan == nil {
		return lab.Result{}, errNoLAN
	}
	return s.lan.Router.Exec(ctx, args...)
}

// runDHCPServer is `dhcp-server start [RANGE [ARGS]]` or `dhcp-server stop`, on the router.
func runDHCPServer(ctx context.Context, s *scenario, _ *lab.Host, args []string) (lab.Result, error) {
	switch {
	case s.lan == nil:
		return lab.Result{}, errNoLAN
	case len(args) == 1 && args[0] == "stop":
		return lab.Result{}, s.lan.StopDHCP(ctx)
	case len(args) == 1 && args[0] == "start":
		return lab.Result{}, s.lan.StartDHCP(ctx, "")
	case len(args) > 1 && args[0] == "start":
		return lab.Result{}, s.lan.StartDHCP(ctx, args[1], args[2:]...)
	}
	return lab.Result{}, errors.New("dhcp-server: want start, with a range and arguments perhaps, or stop")
}

// runEngine is `engine stop|start|kill|restart [live-restore|no-live-restore]`.
func runEngine(ctx context.Context, _ *scenario, h *lab.Host, args []string) (lab.Result, error) {
	if len(args) > 1 {
		switch args[1] {
		case "live-restore":
			h.SetLiveRestore(true)
		case "no-live-restore":
			h.SetLiveRestore(false)
		default:
			return lab.Result{}, fmt.Errorf("engine: want live-restore or no-live-restore, have %s", args[1])
		}
	}
	if len(args) == 0 {
		return lab.Result{}, errors.New("engine: want start, stop, kill or restart")
	}
	return lab.Result{}, h.Engine(ctx, args[0])
}

// runPlugin is `plugin kill` or `plugin install|enable|disable|restart NAME [SETTING=VALUE...]`.
func runPlugin(ctx context.Context, s *scenario, h *lab.Host, args []string) (lab.Result, error) {
	switch {
	case len(args) == 1 && args[0] == "kill":
		return lab.Result{}, h.KillPlugin(ctx)
	case len(args) < 2:
		return lab.Result{}, errors.New("plugin: want kill, or install, enable, disable, restart and a name")
	case args[0] == "install":
		return lab.Result{}, h.InstallPlugin(ctx, s.mode, args[1], args[2:]...)
	case len(args) > 2:
		return lab.Result{}, fmt.Errorf("plugin %s: settings go with install only, or with docker plugin set", args[0])
	case args[0] == "restart":
		if res, err := switchPlugin(ctx, s.mode, h, "disable", args[1]); err != nil {
			return res, err
		}
		return switchPlugin(ctx, s.mode, h, "enable", args[1])
	case args[0] == "enable" || args[0] == "disable":
		return switchPlugin(ctx, s.mode, h, args[0], args[1])
	}
	return lab.Result{}, fmt.Errorf("plugin: unknown verb %s", args[0])
}

func switchPlugin(ctx context.Context, mode lab.Mode, h *lab.Host, verb, name string) (lab.Result, error) {
	switch {
	case mode == lab.Managed && verb == "disable":
		return h.Docker(ctx, "plugin", "disable", "-f", name)
	case mode == lab.Managed:
		return h.Docker(ctx, "plugin", "enable", name)
	case verb == "disable":
		return lab.Result{}, h.StopPlugin(ctx, name)
	}
	return lab.Result{}, h.StartPlugin(ctx, name)
}

// stopEverything removes all containers, networks and volumes of all hosts.
func stopEverything(ctx context.Context, s *scenario, _ *lab.Host, _ []string) (lab.Result, error) {
	var errs []error
	for _, h := range s.hosts {
		for _, kind := range []struct {
			list, remove []string
			keep         []string
		}{
			{list: []string{"ps", "-aq"}, remove: []string{"rm", "-f", "-v"}},
			{list: []string{"network", "ls", "--format", "{{.Name}}"}, remove: []string{"network", "rm"}, keep: []string{"bridge", "host", "none"}},
			{list: []string{"volume", "ls", "-q"}, remove: []string{"volume", "rm"}},
		} {
			res, err := h.Docker(ctx, kind.list...)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			names := slices.DeleteFunc(strings.Fields(res.Stdout), func(n string) bool { return slices.Contains(kind.keep, n) })
			if len(names) == 0 {
				continue
			}
			_, err = h.Docker(ctx, append(kind.remove, names...)...)
			errs = append(errs, err)
		}
	}
	return lab.Result{}, errors.Join(errs...)
}

// runLeakCheck is `leakcheck [-t DURATION]`: how long leftovers may take to go.
func runLeakCheck(ctx context.Context, s *scenario, _ *lab.Host, args []string) (lab.Result, error) {
	within := leakGrace
	if len(args) > 0 {
		d, err := time.ParseDuration(args[len(args)-1])
		if err != nil || len(args) != 2 || args[0] != "-t" {
			return lab.Result{}, errors.New("usage: leakcheck [-t DURATION]")
		}
		within = d
	}
	left, err := s.leaks(ctx, within)
	if err != nil || len(left) == 0 {
		return lab.Result{}, err
	}
	res := lab.Result{ExitCode: 1, Stderr: strings.Join(left, "\n") + "\n"}
	return res, &lab.ExitError{Argv: []string{"leakcheck"}, Result: res}
}
