// Command bench compares Berth with Docker's own drivers in one and the same
// engine, in turns: first Berth, then Docker, then Docker and Berth again. It speaks
// to the engine's API, so that the docker command's own start is not part of the
// times.
//
//	go run ./integration/cmd/bench [-engine 20.10] [-rounds 20] [...] [PART]...
//
// Each part has a lab host of its own, which is gone at its end. The results are
// Markdown tables on standard output, and with -json all the numbers behind them.
//
// The binary is also what runs inside the hosts and containers: the load, the empty
// plugin, and the look at the processes. It is built without cgo for that.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/berth-plugin/berth/integration/lab"
)

func main() {
	if lab.Reexec() {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := command(ctx, os.Args[1:])
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// command does what the arguments say.
func command(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case probeCommand:
			return printFootprint(os.Stdout)
		case loadCommand:
			return runLoad(ctx, args[1:], os.Stdout)
		case pairsCommand:
			return runPairs(ctx, args[1:], os.Stdout)
		case holdCommand:
			return holdAddresses(ctx, args[1:], os.Stdout)
		case volumeCallsCommand:
			return runVolumeCalls(ctx, args[1:], os.Stdout)
		case volumeGetsCommand:
			return runVolumeGets(ctx, args[1:], os.Stdout)
		case treeCommand:
			return makeTree(ctx, args[1:])
		case costCommand:
			return runCost(ctx, args[1:], os.Stdout)
		case ticksCommand:
			return runTicks(ctx, args[1:], os.Stdout)
		case recoverCommand:
			return awaitAddresses(ctx, args[1:], os.Stdout)
		case emptyCommand:
			return serveEmpty(ctx, args[1:])
		}
	}
	s, err := parseSettings(args)
	if err != nil {
		return err
	}
	return run(ctx, s)
}

// settings are the command line.
type settings struct {
	engine string
	parts  []string
	rounds int
	mode   lab.Mode
	// same puts Docker on both sides.
	same     bool
	json     string
	ports    portSettings
	networks int
	// files is how many files each process of the hosts may have open.
	files int
	bulk  bulkSettings
	data  dataSettings
	// addresses are for the part "ipam".
	addresses addressSettings
	// volumes and files are for the parts "volumes" and "snapshots".
	volumes int
	tree    treeSettings
	// big is how many MiB the large file of the part "backups" has.
	big int
	// together is how many containers the part "macvlan" starts at the same moment.
	together int
}

// roundsOr is the number of rounds, that of the part if none was given.
func (s settings) roundsOr(usual int) int {
	if s.rounds == 0 {
		return usual
	}
	return s.rounds
}

// A part is one kind of measurement.
type part struct {
	name string
	// measure returns what it has measured also with an error, or nil.
	measure func(context.Context, settings) (*report, error)
}

func parts() []part {
	return []part{{"basic", measureBasic}, {"ports", measurePorts}, {"start", measureStart}, {"data", measureData},
		{"ipam", measureAddresses}, {"macvlan", measureMacvlan}, {"volumes", measureVolumes}, {"snapshots", measureSnapshots}, {"backups", measureBackups}}
}

func parseSettings(args []string) (settings, error) {
	s := settings{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&s.engine, "engine", "20.10", "engine `VERSION` of the lab")
	f.IntVar(&s.rounds, "rounds", 0, "`NUMBER` of measurements of each kind and driver, 0 for what suits the part")
	mode := f.String("mode", string(lab.Managed), "how Berth runs: managed or unmanaged")
	f.BoolVar(&s.same, "same", false, "Docker on both sides: shows how far from 1 a ratio is by chance")
	f.StringVar(&s.json, "json", "", "`FILE` to append all numbers to, one JSON object for each part and engine")
	counts := f.String("ports", "0,1,100,1000", "ports: `NUMBERS` of ports to publish")
	f.IntVar(&s.ports.many, "many", 20000, "ports: `NUMBER` of ports that only Berth publishes, 0 for none")
	f.DurationVar(&s.ports.budget, "docker-budget", 90*time.Second,
		"ports: Docker starts no further round with a number of ports that has taken it this `TIME`")
	f.IntVar(&s.networks, "networks", 500, "start: `NUMBER` of networks that exist at once, 0 for none")
	f.IntVar(&s.bulk.containers, "containers", 200, "start: `NUMBER` of containers started together, 0 for none")
	f.IntVar(&s.bulk.workers, "workers", 16, "start: how `MANY` of them at once")
	f.IntVar(&s.bulk.rounds, "bulk-rounds", 2, "start: `NUMBER` of rounds of these")
	dataCounts := f.String("data-ports", "10,1000,5000", "data: `NUMBERS` of ports that are published meanwhile")
	f.IntVar(&s.ports.dockerMost, "docker-most", 1000, "ports, data: `NUMBER` of ports above which Docker is left out")
	f.BoolVar(&s.data.proxy, "userland-proxy", false, "data: leave Docker its userland proxy")
	f.DurationVar(&s.data.stream, "stream", time.Second, "data: `TIME` that one stream is sent for")
	f.IntVar(&s.data.passes, "passes", 2, "data: how often the rounds begin anew with a new container")
	f.IntVar(&s.addresses.clients, "clients", 64, "ipam: `NUMBER` of clients at once")
	f.IntVar(&s.addresses.rate, "rate", 5000, "ipam: `NUMBER` of pairs a second that calls are also timed with, 0 for none")
	f.DurationVar(&s.addresses.time, "pairs", 4*time.Second, "ipam: `TIME` that pairs are measured for")
	f.IntVar(&s.addresses.recovered, "recovered", 100000, "ipam: `NUMBER` of addresses that are held when berthd is killed")
	held := f.String("held", usualHeld, "ipam: `NUMBERS` of addresses held, rising")
	f.IntVar(&s.together, "together", 200, "macvlan: `NUMBER` of containers started at the same moment, 0 for none")
	f.IntVar(&s.volumes, "volumes", 10000, "volumes: `NUMBER` of volumes that there are")
	f.IntVar(&s.tree.files, "files", 68000, "snapshots, backups: `NUMBER` of files in the volume")
	f.IntVar(&s.tree.megabytes, "megabytes", 846, "snapshots, backups: `NUMBER` of megabytes (10^6 bytes) in them")
	f.IntVar(&s.big, "big", 2048, "backups: `NUMBER` of MiB in the large file")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	var err error
	if s.addresses.held, err = parseCounts("held", *held); err != nil {
		return s, err
	}
	if s.ports.counts, err = parseCounts("ports", *counts); err != nil {
		return s, err
	}
	if s.data.counts, err = parseCounts("data-ports", *dataCounts); err != nil {
		return s, err
	}
	if s.mode = lab.Mode(*mode); s.mode != lab.Managed && s.mode != lab.Unmanaged {
		return s, fmt.Errorf("-mode %s: want managed or unmanaged", *mode)
	}
	for name, n := range map[string]int{"workers": s.bulk.workers, "bulk-rounds": s.bulk.rounds, "passes": s.data.passes, "clients": s.addresses.clients, "big": s.big} {
		if n < 1 {
			return s, fmt.Errorf("-%s %d: want at least 1", name, n)
		}
	}
	for name, n := range map[string]int{"rounds": s.rounds, "many": s.ports.many, "networks": s.networks, "containers": s.bulk.containers} {
		if n < 0 || n > maxPorts {
			return s, fmt.Errorf("-%s %d: want 0 to %d", name, n, maxPorts)
		}
	}
	s.parts = f.Args()
	return s, nil
}

// parseCounts reads numbers of ports or addresses, separated by commas.
func parseCounts(name, text string) ([]int, error) {
	most := maxPorts
	if name == "held" {
		most = maxHeld
	}
	var counts []int
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 0 || n > most {
			return nil, fmt.Errorf("-%s %s: want numbers from 0 to %d, separated by commas", name, text, most)
		}
		counts = append(counts, n)
	}
	return counts, nil
}

// chosen are the parts that were asked for, all of them when none was.
func chosen(names []string) ([]part, error) {
	if len(names) == 0 {
		return parts(), nil
	}
	var found []part
	for _, name := range names {
		before := len(found)
		for _, p := range parts() {
			if p.name == name {
				found = append(found, p)
			}
		}
		if len(found) == before {
			return nil, fmt.Errorf("part %q: want basic, ports, start, data, ipam, macvlan, volumes, snapshots or backups", name)
		}
	}
	return found, nil
}

// run measures part by part and prints each when it is done. One that fails keeps
// none of the others from being measured.
func run(ctx context.Context, s settings) error {
	list, err := chosen(s.parts)
	if err != nil {
		return err
	}
	if s.files, err = raiseFileLimit(); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	var errs []error
	for _, p := range list {
		begin := time.Now()
		r, err := p.measure(ctx, s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
		if ctx.Err() != nil {
			break
		}
		// What was measured before an error counts.
		if r == nil {
			continue
		}
		r.Part, r.Began, r.Seconds = p.name, begin.UTC(), time.Since(begin).Seconds()
		r.Processors = runtime.NumCPU()
		fmt.Print(r.markdown())
		progress("%s took %.0f s", p.name, r.Seconds)
		if s.json != "" {
			errs = append(errs, r.appendTo(s.json))
		}
	}
	return errors.Join(errs...)
}

// raiseFileLimit gives the hosts the limit of open files that services have under
// systemd, and returns the one that they have got: in a container there may be no
// right to raise it.
func raiseFileLimit() (int, error) {
	const usual = 512 << 10
	limit := syscall.Rlimit{}
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max >= usual {
		return int(min(limit.Max, maxLimit)), err
	}
	err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: usual, Max: usual})
	if errors.Is(err, syscall.EPERM) {
		return int(limit.Max), nil
	}
	return usual, err
}

// maxLimit is enough for anything; no limit at all is a number that fits no int.
const maxLimit = 1 << 30

// progress says on standard error what is going on, for parts take minutes.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

// appendTo writes all the numbers.
func (r *report) appendTo(file string) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	return errors.Join(err, f.Close())
}
