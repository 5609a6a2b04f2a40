package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/lab"
)

func TestSettingsHaveDefaults(t *testing.T) {
	s, err := parseSettings([]string{"-rounds", "3", "-ports", "0,7", "ports", "data"})
	assert.NilError(t, err)
	assert.DeepEqual(t, s.parts, []string{"ports", "data"})
	assert.DeepEqual(t, s.ports.counts, []int{0, 7})
	assert.DeepEqual(t, s.data.counts, []int{10, 1000, 5000})
	assert.Equal(t, s.mode, lab.Managed)
	assert.Equal(t, s.roundsOr(9), 3)
	assert.Equal(t, settings{}.roundsOr(9), 9)
	assert.Equal(t, s.ports.budget, 90*time.Second)
}

func TestWrongSettingsAreNamed(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-ports 1,x", "-ports 1,x: want numbers from 0 to 40000"},
		{"-data-ports 40001", "-data-ports 40001: want"},
		{"-mode some", "-mode some: want managed or unmanaged"},
		{"-rounds -1", "-rounds -1: want 0 to"},
		{"-workers 0", "-workers 0: want at least 1"},
		{"-big 0", "-big 0: want at least 1"},
		{"-many 50000", "-many 50000: want 0 to 40000"},
	} {
		_, err := parseSettings(strings.Fields(c.args))
		assert.ErrorContains(t, err, c.want)
	}
	_, err := chosen([]string{"port"})
	assert.ErrorContains(t, err, `part "port": want basic, ports, start, data, ipam, macvlan, volumes, snapshots or backups`)
}

func TestNoPartMeansAll(t *testing.T) {
	all, err := chosen(nil)
	assert.NilError(t, err)
	assert.Equal(t, len(all), 9)
	some, err := chosen([]string{"data", "basic"})
	assert.NilError(t, err)
	assert.Equal(t, some[0].name+" "+some[1].name, "data basic")
}

func TestSidesTakeTurnsInBeingFirst(t *testing.T) {
	assert.Equal(t, turns(0), [2]int{0, 1})
	assert.Equal(t, turns(1), [2]int{1, 0})
	assert.Equal(t, turns(2), [2]int{0, 1})
}

func TestRoundsAreDealtOut(t *testing.T) {
	assert.DeepEqual(t, split(5, 2), []int{3, 2})
	assert.DeepEqual(t, split(2, 5), []int{1, 1})
	assert.DeepEqual(t, split(4, dataSettings{passes: 2}.passesWith(fewPorts)), []int{1, 1, 1, 1})
	assert.DeepEqual(t, split(4, dataSettings{passes: 2}.passesWith(fewPorts+1)), []int{2, 2})
}

func TestBindingsAreARange(t *testing.T) {
	m := publication{first: 20000, n: 3, shift: 10}.bindings()
	assert.Equal(t, len(m), 3)
	assert.Equal(t, m["20010/tcp"][0].HostPort, "20000")
	assert.Equal(t, m["20012/tcp"][0].HostPort, "20002")
	assert.Equal(t, len(publication{}.bindings()), 0)
}

func TestSubnetsOfManyNetworksDiffer(t *testing.T) {
	assert.Equal(t, manySubnet(0).String(), "10.100.0.0/24")
	assert.Equal(t, manySubnet(499).String(), "10.101.243.0/24")
}

func TestPortsAreComparedWithNone(t *testing.T) {
	m := portMeasurement{table: &grid{Columns: []string{"Berth", "Docker"}}}
	for column, values := range [][2]float64{{0.2, 0.5}, {0.3, 70}} {
		m.table.add("start, 0 ports", inSeconds, column, values[0])
		m.table.add("start, 1000 ports", inSeconds, column, values[1])
	}
	m.overNone([]int{0, 1000})
	l := m.table.find("start, 1000 ports more than none")
	assert.Equal(t, inSeconds.format(middle(l.Values[0])), "300.0 ms")
	assert.Equal(t, inSeconds.format(middle(l.Values[1])), "69.7 s")
}

func TestGrowthComparesWithTheFewestPorts(t *testing.T) {
	m := dataMeasurement{settings: dataSettings{counts: []int{1000, 10}}, table: &grid{Columns: []string{"Berth", "Docker"}},
		sources: []source{{label: "from a neighbour"}}}
	m.table.add(workName("new connections", "from a neighbour", 10), inRate, 0, 8000)
	m.table.add(workName("new connections", "from a neighbour", 10), inRate, 1, 8000)
	m.table.add(workName("new connections", "from a neighbour", 1000), inRate, 0, 7920)
	m.table.add(workName("new connections", "from a neighbour", 1000), inRate, 1, 2000)
	assert.Equal(t, m.growth().markdown(), "| Work | Berth | Docker | Ratio |\n|---|---:|---:|---:|\n"+
		"| new connections, from a neighbour, 1000 ports over 10 | 0.99 | 0.25 | 3.96 |\n")
}

const rollup = `55d0c0000000-7ffd00000000 ---p 00000000 00:00 0                          [rollup]
Rss:               20480 kB
Pss:                1024 kB
Pss_Anon:            900 kB
`

func TestMemoryOfAProcess(t *testing.T) {
	pss, rss, err := rollupBytes(strings.NewReader(rollup))
	assert.NilError(t, err)
	assert.Equal(t, pss, 1<<20)
	assert.Equal(t, rss, 20<<20)
}

const slab = `slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables
TCPv6                 13     26   2496   13    8 : tunables    0    0    0 : slabdata      1      1      0
bio-376               21     21    384   21    2 : tunables    0    0    0 : slabdata      1      1      0
filp                 100    200    192   21    1 : tunables    0    0    0 : slabdata     38     38      0
`

func TestMemoryOfSockets(t *testing.T) {
	n, err := slabBytes(strings.NewReader(slab))
	assert.NilError(t, err)
	assert.Equal(t, n, 13*2496+100*192)
}

func TestFootprintCountsProcesses(t *testing.T) {
	f, err := takeFootprint("/proc")
	assert.NilError(t, err)
	assert.Assert(t, f.Processes > 1, "%+v", f)
	assert.Assert(t, f.Kernel > 0, "%+v", f)
}

func TestManyPortsAreAsManyAsFilesMayBeOpen(t *testing.T) {
	assert.Equal(t, fitting(20000), 9750)
	assert.Equal(t, fitting(100), 0)
	assert.Assert(t, fitting(512<<10) > maxPorts)
}

func TestProcessesOfATree(t *testing.T) {
	p, err := parseStat("7 (a) b (c) S 3 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 100 1000000 25 18446744073709551615 1 1\n")
	assert.NilError(t, err)
	assert.Equal(t, p, process{name: "a) b (c", parent: 3, ticks: 100, memory: 25 * os.Getpagesize()})
	for _, text := range []string{"", "7 (a", "7 (a) S 3 7", "7 (a) S x 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 100 1000000 25 1"} {
		_, err := parseStat(text)
		assert.Assert(t, err != nil, "%q", text)
	}
	all := processes{
		1: {name: "init"}, 2: {name: "berthd", parent: 1, memory: 10}, 3: {name: "restic", parent: 2, memory: 20},
		4: {name: "dockerd", parent: 1, memory: 40}, 5: {name: "docker", parent: 9, memory: 80},
	}
	ours := all.below(func(pid int, p process) bool { return p.name == "berthd" || pid == 5 })
	assert.Equal(t, ours.memory(), 110)
}

func TestACostIsThatOfTheCommand(t *testing.T) {
	const spent = 200 * time.Millisecond
	var out bytes.Buffer
	self, err := os.Executable()
	assert.NilError(t, err)
	t.Setenv(spendingEnv, spent.String())
	assert.NilError(t, runCost(t.Context(), []string{"no-such-process", self}, &out))
	var c cost
	assert.NilError(t, json.Unmarshal(out.Bytes(), &c))
	assert.Assert(t, c.CPU >= spent.Seconds(), "%+v", c)
	assert.Assert(t, c.Memory >= spentMemory, "%+v", c)

	err = runCost(t.Context(), []string{"no-such-process", "false"}, &out)
	assert.ErrorContains(t, err, "false: exit status 1")
}

// spendingEnv makes the test's own program use the processor for a time, and spentMemory.
const (
	spendingEnv = "BENCH_TEST_SPEND"
	spentMemory = 64 << 20
)

func TestMain(m *testing.M) {
	text := os.Getenv(spendingEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	most, err := time.ParseDuration(text)
	if err != nil {
		os.Exit(1)
	}
	held := make([]byte, spentMemory)
	for {
		for i := 0; i < len(held); i += 512 {
			held[i]++
		}
		var used syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
			os.Exit(1)
		}
		if time.Duration(used.Utime.Nano()+used.Stime.Nano()) > most {
			os.Exit(0)
		}
	}
}

func TestTheLongestTimeBetweenTwoWrites(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ticks")
	out := make(chan string, 1)
	go func() {
		var b bytes.Buffer
		if err := runTicks(t.Context(), []string{file}, &b); err != nil {
			b.WriteString(err.Error())
		}
		out <- b.String()
	}()
	for {
		if info, err := os.Stat(file); err == nil && info.Size() > 5*8 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	assert.NilError(t, syscall.Kill(os.Getpid(), syscall.SIGTERM))
	var longest float64
	text := <-out
	assert.NilError(t, json.Unmarshal([]byte(text), &longest), text)
	assert.Assert(t, longest > 0.0005, longest)
}
