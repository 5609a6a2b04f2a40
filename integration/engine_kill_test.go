package integration

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/lab"
)

var killsFlag = flag.Int("kills", 0, "how often the engine is killed while containers start (0 is 5, or 100 with -full), and the plugin while volumes change (0 is 8, or 200 with -full)")

// The engine is killed over and over while containers start on a LAN. Whatever dockerd
// has forgotten of them, no address is given to two, none is lost for good, and nothing
// is left in the end.
func TestEngineIsKilledWhileContainersStart(t *testing.T) {
	t.Parallel()
	running <- struct{}{}
	defer func() { <-running }()
	kills := *killsFlag
	switch {
	case kills > 0:
	case *fullFlag:
		kills = 100
	default:
		kills = 5
	}
	s := newScenario(t, header{wired: true, hosts: 1, nics: 1, plugins: []string{"berth-net"}}, run{"20.10", lab.Managed})
	h := s.hosts[0]
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute+time.Duration(kills)*20*time.Second)
	defer cancel()
	net := lab.DriverName(lab.Managed, "berth-net")
	// Sixteen addresses: room for those that start, and for few that would be lost.
	_, err := h.Docker(ctx, "network", "create", "-d", net, "--ipam-driver", net, "--subnet", "198.51.100.0/24",
		"--ip-range", "198.51.100.64/28", "--gateway", s.lan.Addr4(s.lan.Router).String(), "-o", "parent=eth0", "lan")
	assert.NilError(t, err)

	ran := 0
	for kill := range kills {
		started := startWhile(ctx, h, kill, func() {
			pause(ctx, time.Duration(200+rand.IntN(2300))*time.Millisecond)
			assert.NilError(t, h.KillEngine(ctx))
		})
		ran += started
		assert.NilError(t, h.StartEngine(ctx))
		assert.NilError(t, differentAddresses(ctx, h))
		// Every other time all are removed, so that addresses come round.
		if kill%2 == 1 {
			assert.NilError(t, removeContainers(ctx, h))
		}
	}
	assert.NilError(t, removeContainers(ctx, h))
	t.Logf("%d containers were started before %d kills", ran, kills)

	// As many as there are addresses start: those of containers that dockerd knows no
	// more are found out when there is no other. It also forgets containers that it has
	// created and not started; these wait for ever, with their link and its address.
	waiting, err := waitingContainers(ctx, h)
	assert.NilError(t, err)
	t.Logf("forgotten by dockerd, with an address: %v", waiting)
	assert.Assert(t, len(waiting) < 16)
	for range 16 - len(waiting) {
		_, err := s.eventually(ctx, h, []string{"-t", "150s", "docker", "run", "-d", "--network", "lan", lab.BusyboxImage, "hold"})
		assert.NilError(t, err)
	}
	assert.NilError(t, differentAddresses(ctx, h))
	_, err = stopEverything(ctx, s, h, nil)
	assert.NilError(t, err)
	left, err := s.leaks(ctx, time.Minute)
	assert.NilError(t, err)
	for _, l := range beyondDocker(left) {
		t.Errorf("left behind: %s", l)
	}
}

// startWhile starts containers, which end by themselves if dockerd forgets them, by
// several workers until something was done to the engine, and returns how many have
// started.
func startWhile(ctx context.Context, h *lab.Host, round int, do func()) int {
	const workers = 3
	working, stop := context.WithCancel(ctx)
	var (
		work    sync.WaitGroup
		mu      sync.Mutex
		started int
	)
	for w := range workers {
		work.Go(func() {
			for i := 0; working.Err() == nil && i < 3; i++ {
				_, err := h.Docker(ctx, "run", "-d", "--name", fmt.Sprintf("k%d-%d-%d", round, w, i), "--network", "lan", lab.BusyboxImage, "sleep", "20")
				if err == nil {
					mu.Lock()
					started++
					mu.Unlock()
				}
			}
		})
	}
	do()
	stop()
	work.Wait()
	return started
}

// differentAddresses looks for an address that two running containers have: what the
// kernel has is what counts.
func differentAddresses(ctx context.Context, h *lab.Host) error {
	res, err := h.Exec(ctx, "sh", "-c", `docker ps -q | while read id; do docker exec $id ip -o -4 addr show eth0; done | awk '{print $4}' | sort | uniq -d`)
	if err == nil && strings.TrimSpace(res.Stdout) != "" {
		err = fmt.Errorf("given twice: %s", res.Stdout)
	}
	return err
}

// waitingContainers are the addresses in containers that runc waits to be told to start.
// There is none that dockerd knows: it has removed all it had.
func waitingContainers(ctx context.Context, h *lab.Host) ([]string, error) {
	res, err := h.Exec(ctx, "sh", "-c", `for p in /proc/[0-9]*; do
		case $(cat $p/comm 2>/dev/null) in runc:*INIT*) nsenter --net=$p/ns/net ip -o -4 addr show scope global ;; esac
	done | awk '{print $4}'`)
	return strings.Fields(res.Stdout), err
}

func removeContainers(ctx context.Context, h *lab.Host) error {
	_, err := h.Exec(ctx, "sh", "-c", "docker ps -aq | xargs -r docker rm -f")
	return err
}
