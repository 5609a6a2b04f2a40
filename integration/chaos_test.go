package integration

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/lab"
)

var (
	chaosFlag = flag.Duration("chaos", 40*time.Second, "how long the chaos test kills things at random")
	seedFlag  = flag.Uint64("chaos-seed", 0, "seed of the chaos test, to repeat one; 0 is the time")
)

// dockerdSleep is for how long dockerd looks away after it has started a plugin
// again. One that is killed in that half second is not started a third time: its
// end is only heard when dockerd has given it up and disabled it.
const dockerdSleep = time.Second

// chaosVolumes is how many volumes the containers of the chaos test write to.
const chaosVolumes = 3

// chaosPort is the first host port that they publish, each worker's containers one of
// their own.
const chaosPort = 18000

// chaosWorkers is how many containers run at the same time.
const chaosWorkers = 2

// dockersOwn is what a dockerd that is killed leaves behind without any plugin, too.
var dockersOwn = []string{
	// It forgets shims of containers that were starting, with the process that waits for
	// the word to become the container's own,
	"processes: containerd-shim",
	"processes: runc:[2:INIT]",
	// and the layer that it mounts for a moment to prepare a container's file system:
	// about one in sixty kills while containers were being created.
	"mounts: /var/lib/docker/overlay2/ID-init/merged from / type overlay",
}

// beyondDocker are the leftovers that are not dockerd's own.
func beyondDocker(left []string) []string {
	return slices.DeleteFunc(left, func(l string) bool {
		return slices.ContainsFunc(dockersOwn, func(end string) bool { return strings.HasSuffix(l, end) })
	})
}

// Containers come and go on a network, each publishing a port and writing a line to a
// volume, while the plugins and the engine are killed and the machine loses power,
// all at random. In the end there is no address that two containers have, no port
// that is taken by none, no line that was written and is gone, no volume that became
// a local one, and nothing left behind.
func TestChaos(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with -chaos-seed %d", seed)
	c := &chaos{
		scenario: newScenario(t, header{hosts: 1, plugins: []string{"berth-net", "berth-vol"}}, run{"20.10", lab.Managed}),
		random:   rand.New(rand.NewPCG(seed, 0)),
		written:  map[string][]string{},
	}
	c.net, c.vol = lab.DriverName(lab.Managed, "berth-net"), lab.DriverName(lab.Managed, "berth-vol")
	h := c.hosts[0]
	ctx, cancel := context.WithTimeout(context.Background(), *chaosFlag+5*time.Minute)
	defer cancel()

	c.must(t, ctx, "network", "create", "-d", c.net, "--ipam-driver", c.net, "--subnet", "203.0.113.0/27", "web")
	for i := range chaosVolumes {
		c.must(t, ctx, "volume", "create", "-d", c.vol, volumeName(i))
	}

	var work sync.WaitGroup
	working, stop := context.WithTimeout(ctx, *chaosFlag)
	defer stop()
	for worker := range chaosWorkers {
		random := rand.New(rand.NewPCG(seed, uint64(worker)+1))
		work.Go(func() { c.work(working, worker, random) })
	}
	for working.Err() == nil {
		if err := c.strike(working, h); err != nil && working.Err() == nil {
			t.Fatal(err)
		}
		pause(working, dockerdSleep+time.Duration(c.random.IntN(2000))*time.Millisecond)
	}
	work.Wait()
	t.Logf("%d containers ran, %d did not; struck: %v", c.ran, c.failed, c.struck)
	assert.Assert(t, c.ran > 0, "no container ever ran")

	// The machine is left alone; everything must come back by itself.
	c.recover(t, ctx, h)
	c.checkAddresses(t, ctx)
	c.checkVolumes(t, ctx)

	_, err := stopEverything(ctx, c.scenario, h, nil)
	assert.NilError(t, err)
	left, err := c.leaks(ctx, time.Minute)
	assert.NilError(t, err)
	for _, l := range beyondDocker(left) {
		t.Errorf("left behind: %s", l)
	}
}

type chaos struct {
	*scenario
	net, vol string
	random   *rand.Rand
	struck   []string

	mu          sync.Mutex // guards all following fields
	written     map[string][]string
	ran, failed int
}

func volumeName(i int) string { return fmt.Sprintf("data%d", i) }

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (c *chaos) must(t *testing.T, ctx context.Context, args ...string) lab.Result {
	t.Helper()
	res, err := c.hosts[0].Docker(ctx, args...)
	assert.NilError(t, err)
	return res
}

// work runs and removes containers until ctx ends. What fails, fails: only what a
// container has acknowledged counts.
func (c *chaos) work(ctx context.Context, worker int, random *rand.Rand) {
	h := c.hosts[0]
	for n := 0; ctx.Err() == nil; n++ {
		name, volume := fmt.Sprintf("w%d-%d", worker, n), volumeName(random.IntN(chaosVolumes))
		line := name + " was here"
		command, cancel := context.WithTimeout(context.WithoutCancel(ctx), 40*time.Second)
		res, err := h.Docker(command, "run", "--name", name, "--network", "web", "-v", volume+":/x",
			"-p", fmt.Sprintf("%d:80", chaosPort+worker), lab.BusyboxImage,
			"sh", "-c", fmt.Sprintf("echo %s >> /x/log && sync /x/log && echo done", line))
		c.mu.Lock()
		if err == nil && strings.Contains(res.Stdout, "done") {
			c.ran++
			c.written[volume] = append(c.written[volume], line)
		} else {
			c.failed++
		}
		c.mu.Unlock()
		if random.IntN(3) > 0 {
			_, _ = h.Docker(command, "rm", "-f", name) // the last clean-up removes what is left
		}
		cancel()
		pause(ctx, time.Duration(random.IntN(300))*time.Millisecond)
	}
}

// strike does one of the things that hosts have to live with.
func (c *chaos) strike(ctx context.Context, h *lab.Host) error {
	strikes := []struct {
		name   string
		weight int
		do     func(context.Context) error
	}{
		{"plugin kill", 6, h.KillPlugin},
		{"engine kill", 2, func(ctx context.Context) error { return errors.Join(h.KillEngine(ctx), h.StartEngine(ctx)) }},
		{"engine restart", 1, h.RestartEngine},
		{"reboot", 1, h.Reboot},
	}
	total := 0
	for _, s := range strikes {
		total += s.weight
	}
	pick := c.random.IntN(total)
	for _, s := range strikes {
		if pick -= s.weight; pick < 0 {
			c.struck = append(c.struck, s.name)
			// A strike is not cut short: half a reboot is the lab's failure.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			if err := s.do(ctx); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			return nil
		}
	}
	return nil
}

// recover waits until a new container has the network, every port and every volume.
func (c *chaos) recover(t *testing.T, ctx context.Context, h *lab.Host) {
	t.Helper()
	args := []string{"run", "--rm", "--network", "web", "-p", fmt.Sprintf("%d-%d:80-81", chaosPort, chaosPort+chaosWorkers-1)}
	for i := range chaosVolumes {
		args = append(args, "-v", volumeName(i)+":/"+volumeName(i))
	}
	args = append(args, lab.BusyboxImage, "true")
	_, err := c.eventually(ctx, h, append([]string{"-t", "60s", "docker"}, args...))
	assert.NilError(t, err)
}

// checkAddresses fills a part of the pool and looks for an address that two have.
func (c *chaos) checkAddresses(t *testing.T, ctx context.Context) {
	t.Helper()
	for i := range 8 {
		c.must(t, ctx, "run", "-d", "--name", fmt.Sprintf("last%d", i), "--network", "web", lab.BusyboxImage, "sleep", "3600")
	}
	res := c.must(t, ctx, "network", "inspect", "web")
	var networks []struct {
		Containers map[string]struct{ Name, IPv4Address, MacAddress string }
	}
	assert.NilError(t, json.Unmarshal([]byte(res.Stdout), &networks))
	assert.Equal(t, len(networks), 1)
	seen := map[netip.Addr]string{}
	for _, container := range networks[0].Containers {
		prefix, err := netip.ParsePrefix(container.IPv4Address)
		assert.NilError(t, err, "%s", container.Name)
		if other, ok := seen[prefix.Addr()]; ok {
			t.Errorf("%s and %s both have %s", other, container.Name, prefix)
		}
		seen[prefix.Addr()] = container.Name
	}
	assert.Assert(t, len(seen) >= 8, "%v", seen)
}

// checkVolumes looks for every acknowledged line.
func (c *chaos) checkVolumes(t *testing.T, ctx context.Context) {
	t.Helper()
	for i := range chaosVolumes {
		name := volumeName(i)
		driver := c.must(t, ctx, "volume", "inspect", "-f", "{{.Driver}}", name)
		assert.Equal(t, strings.TrimSuffix(strings.TrimSpace(driver.Stdout), ":latest"), strings.TrimSuffix(c.vol, ":latest"))
		if len(c.written[name]) == 0 {
			continue
		}
		res := c.must(t, ctx, "run", "--rm", "-v", name+":/x", lab.BusyboxImage, "cat", "/x/log")
		have := strings.Split(res.Stdout, "\n")
		for _, line := range c.written[name] {
			assert.Check(t, slices.Contains(have, line), "volume %s lost %q", name, line)
		}
	}
}
