package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/lab"
)

// shortVolumeKills is how often the plugin is killed without -full, fullVolumeKills
// with it.
const (
	shortVolumeKills = 8
	fullVolumeKills  = 200
)

// The volume plugin is killed over and over while volumes are cloned, snapshotted, rolled
// back, removed, brought back and deleted for good. Whatever was answered has been done,
// whatever was not has been done or left alone, each volume and snapshot that is there is
// whole, and nothing is left in the end.
func TestPluginIsKilledWhileVolumesChange(t *testing.T) {
	t.Parallel()
	running <- struct{}{}
	defer func() { <-running }()
	kills := *killsFlag
	switch {
	case kills > 0:
	case *fullFlag:
		kills = fullVolumeKills
	default:
		kills = shortVolumeKills
	}
	s := newScenario(t, header{hosts: 1, nics: 1, plugins: []string{"berth-vol"}, volumesOn: "btrfs"}, run{"20.10", lab.Managed})
	h := s.hosts[0]
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute+time.Duration(kills)*10*time.Second)
	defer cancel()

	lives := []*life{
		{options: []string{"-o", "engine=btrfs"}},
		{options: []string{"-o", "engine=image", "-o", "size=64M", "-o", "fs=ext4"}},
		{options: []string{"-o", "engine=dir"}},
	}
	for i, l := range lives {
		l.host, l.seed = h, fmt.Sprintf("seed%d", i)
		assert.NilError(t, l.plant(ctx, lab.DriverName(lab.Managed, "berth-vol")))
	}
	working, stop := context.WithCancel(ctx)
	defer stop()
	var work sync.WaitGroup
	for _, l := range lives {
		work.Go(func() { l.err = l.live(ctx, working) })
	}
	enabled := 0
	for range kills {
		pause(ctx, dockerdSleep+time.Duration(rand.IntN(1000))*time.Millisecond)
		if h.KillPlugin(ctx) == nil {
			continue
		}
		// On a slow machine dockerd still looked away, see dockerdSleep.
		enabled++
		_, err := s.eventually(ctx, h, []string{"-t", "60s", "docker", "plugin", "enable", "berth-vol"})
		assert.NilError(t, err)
	}
	t.Logf("%d kills, after %d of them dockerd gave the plugin up until it was enabled again", kills, enabled)
	stop()
	work.Wait()
	for _, l := range lives {
		t.Logf("%v: %d steps, %d of them cut off: %v", l.options, l.steps, l.cut, l.ended)
		assert.Check(t, l.err, "%v", l.options)
	}
	assert.NilError(t, wholeVolumes(ctx, s, h))

	_, err := stopEverything(ctx, s, h, nil)
	assert.NilError(t, err)
	_, err = h.Exec(ctx, "docker", "berth", "trash", "purge", "-f", "--all")
	assert.NilError(t, err)
	left, err := s.leaks(ctx, 90*time.Second)
	assert.NilError(t, err)
	for _, l := range left {
		t.Errorf("left behind: %s", l)
	}
	// Records that were on their way to their place stay in tmp for a day; no data does.
	res, err := h.Exec(ctx, "sh", "-c", "cd /var/lib/berth/volumes/.berth && find snapshots trash images -mindepth 1"+
		" && find tmp -mindepth 1 '(' -type d -o -size +64k ')' && { losetup -a | grep -F images/life || true; }")
	assert.NilError(t, err)
	assert.Equal(t, res.Stdout, "")
}

// Where a volume is.
const (
	nowhere = "nowhere"
	there   = "there"
	inTrash = "in the trash"
)

// A life is that of one volume after the other, each a clone of a seed, through the
// commands of users.
type life struct {
	host    *lab.Host
	seed    string
	options []string

	number int
	at     string
	steps  int
	// cut counts the steps that did not succeed, ended those that did, by what they are.
	cut   int
	ended map[string]int
	err   error
}

// plant makes the volume that all others begin as.
func (l *life) plant(ctx context.Context, driver string) error {
	create := append([]string{"volume", "create", "-d", driver}, l.options...)
	for _, args := range [][]string{
		append(create, l.seed),
		{"run", "--rm", "-v", l.seed + ":/x", lab.BusyboxImage, "sh", "-c", "for i in $(seq 200); do echo $i > /x/$i; done; ls /x | wc -l"},
	} {
		if _, err := l.host.Docker(ctx, args...); err != nil {
			return err
		}
	}
	_, err := l.host.Exec(ctx, "docker", "berth", "snapshot", "create", l.seed, "s1")
	l.at, l.ended = nowhere, map[string]int{}
	return err
}

// A step is a command, the words that tell what it does, and where the volume is when it
// has ended well.
type step struct {
	to   string
	what string
	argv []string
}

// next chooses what to do with the volume where it is.
func (l *life) next() step {
	name := fmt.Sprintf("life-%s-%d", l.seed, l.number)
	berth := func(to string, args ...string) step {
		return step{to, strings.Join(args[:2], " "), append([]string{"docker", "berth"}, args...)}
	}
	var steps []step
	switch l.at {
	case nowhere:
		l.number++
		name = fmt.Sprintf("life-%s-%d", l.seed, l.number)
		steps = []step{berth(there, slices.Concat([]string{"volume", "clone"}, l.options, []string{l.seed + "@s1", name})...)}
	case there:
		snapshot := fmt.Sprintf("s%d", rand.IntN(3))
		steps = []step{
			berth(there, "snapshot", "create", name, snapshot),
			berth(there, "snapshot", "create", name, snapshot),
			berth(there, "snapshot", "rm", name+"@"+snapshot),
			berth(there, "volume", "rollback", name, snapshot),
			{inTrash, "volume rm", []string{"docker", "volume", "rm", name}},
		}
	case inTrash:
		steps = []step{
			berth(there, "trash", "restore", name),
			berth(nowhere, "trash", "purge", "-f", name),
		}
	}
	return steps[rand.IntN(len(steps))]
}

// live takes steps until working ends. What fails, fails; but then the volume is where it
// was or where it was to go.
func (l *life) live(ctx, working context.Context) error {
	for working.Err() == nil {
		s := l.next()
		l.steps++
		_, err := l.host.Exec(ctx, s.argv...)
		if err == nil {
			l.at = s.to
			l.ended[s.what]++
			continue
		}
		var exit *lab.ExitError
		if !errors.As(err, &exit) {
			return err
		}
		l.cut++
		at, err := l.find(ctx)
		if err != nil {
			return err
		}
		if at != l.at && at != s.to {
			return fmt.Errorf("%v failed, and the volume that was %s is %s: %w", s.argv, l.at, at, exit)
		}
		l.at = at
	}
	// An answer is one that holds.
	at, err := l.find(ctx)
	if err == nil && at != l.at {
		err = fmt.Errorf("the volume %d of %s is %s and not %s", l.number, l.seed, at, l.at)
	}
	return err
}

// find tells where the volume is, as soon as the plugin can tell and has ended what an
// earlier one has begun.
func (l *life) find(ctx context.Context) (string, error) {
	name := fmt.Sprintf("life-%s-%d", l.seed, l.number)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		volumes, err := l.host.Exec(ctx, "docker", "berth", "volume", "ls", "--format", "{{.Name}} {{.State}}")
		if err == nil {
			removed, failure := l.host.Exec(ctx, "docker", "berth", "trash", "ls", "--format", "{{.Name}}")
			has := func(text, line string) bool { return slices.Contains(strings.Split(text, "\n"), line) }
			switch err = failure; {
			case err != nil:
			case has(volumes.Stdout, name+" ready"):
				return there, nil
			case strings.Contains(volumes.Stdout, name+" "):
				err = fmt.Errorf("volume %s is not ready:\n%s", name, volumes.Stdout)
			case has(removed.Stdout, name):
				return inTrash, nil
			default:
				return nowhere, nil
			}
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("where volume %s is: %w", name, err)
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// wholeVolumes looks into all volumes and snapshots.
func wholeVolumes(ctx context.Context, s *scenario, h *lab.Host) error {
	var names []string
	for _, kind := range []string{"volume", "snapshot"} {
		res, err := s.eventually(ctx, h, []string{"host", "docker", "berth", kind, "ls", "-q"})
		if err != nil {
			return err
		}
		names = append(names, strings.Fields(res.Stdout)...)
	}
	args := []string{"docker", "run", "--rm"}
	for i, name := range names {
		args = append(args, "-v", fmt.Sprintf("%s:/v/%d", name, i))
	}
	args = append(args, lab.BusyboxImage, "sh", "-c", "for d in /v/*; do (cd $d; echo $(ls | wc -l) $(cat $(seq 200) | md5sum)); done | sort | uniq -c; seq 200 | md5sum")
	res, err := s.eventually(ctx, h, args)
	if err != nil {
		return err
	}
	// How often, how many files, and the sum of what is in them, with a dash; at last the
	// sum that it should be.
	have := strings.Fields(res.Stdout)
	sum := have[max(0, len(have)-2):]
	if want := slices.Concat([]string{fmt.Sprint(len(names)), "200"}, sum, sum); !slices.Equal(have, want) {
		return fmt.Errorf("of %v: want %v, have %v", names, want, have)
	}
	return nil
}
