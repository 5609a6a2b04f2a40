package netplugin

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A dockerd remembers what a real one would: the networks and containers that it
// was told are there. It forgets what fails to go away.
type dockerd struct {
	env        *testEnv
	networks   map[string]*dockerNet
	containers map[string]*container
	next       int
}

func (m *dockerd) name(prefix string) string {
	m.next++
	return fmt.Sprint(prefix, m.next)
}

func (m *dockerd) anyNetwork(t *rapid.T) *dockerNet {
	if len(m.networks) == 0 {
		return nil
	}
	return m.networks[rapid.SampledFrom(slices.Sorted(maps.Keys(m.networks))).Draw(t, "network")]
}

func (m *dockerd) anyContainer(t *rapid.T) (string, *container) {
	if len(m.containers) == 0 {
		return "", nil
	}
	name := rapid.SampledFrom(slices.Sorted(maps.Keys(m.containers))).Draw(t, "container")
	return name, m.containers[name]
}

// may does something during which the daemon may die, and starts it again then.
func (m *dockerd) may(fn func()) {
	if killed(fn) {
		m.env.restart()
	}
	m.env.host.steps = 0
}

// Whatever dockerd asks, whatever fails and whenever the daemon dies: no two live
// containers have one address, and in the end records and host agree.
func TestNoAddressIsEverOnTwoContainers(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// Each check has its own state directory, which goes with the test.
		e := newEnv(t)
		m := &dockerd{env: e, networks: make(map[string]*dockerNet), containers: make(map[string]*container)}
		anyTrouble := rapid.SampledFrom([]trouble{"", "", failBefore, failAfter, killBefore, killAfter})
		rt.Repeat(map[string]func(*rapid.T){
			"trouble ahead": func(t *rapid.T) {
				e.host.at(rapid.IntRange(1, 2).Draw(t, "step"), anyTrouble.Draw(t, "what"))
			},
			"network create": func(t *rapid.T) {
				if len(m.networks) >= 3 {
					return
				}
				name := m.name("n")
				subnet := rapid.SampledFrom([]string{"", "", "10.1.0.0/29", "10.1.0.0/28", "10.2.0.0/30"}).Draw(t, "subnet")
				m.may(func() {
					if n, err := e.createNetwork(name, subnet, nil); err == nil {
						m.networks[name] = n
					}
				})
			},
			"network rm": func(t *rapid.T) {
				n := m.anyNetwork(t)
				for _, c := range m.containers {
					if c.net == n {
						return // dockerd refuses
					}
				}
				if n == nil {
					return
				}
				maps.DeleteFunc(m.networks, func(_ string, other *dockerNet) bool { return other == n })
				m.may(func() { _ = e.removeNetwork(n) })
			},
			"run": func(t *rapid.T) {
				n := m.anyNetwork(t)
				if n == nil {
					return
				}
				name := m.name("c")
				m.may(func() {
					if c, err := e.run(n, name, ""); err == nil {
						m.containers[name] = c
					}
				})
			},
			"stop": func(t *rapid.T) {
				name, c := m.anyContainer(t)
				if c == nil {
					return
				}
				delete(m.containers, name)
				m.may(func() { _ = e.stop(c) })
			},
			"container dies unheard": func(t *rapid.T) {
				name, c := m.anyContainer(t)
				if c == nil {
					return
				}
				delete(m.containers, name)
				e.host.mu.Lock()
				delete(e.host.endpoints, c.endpoint)
				e.host.mu.Unlock()
			},
			"reboot": func(*rapid.T) {
				e.host.steps = 0
				e.host.reboot()
				clear(m.containers)
				e.restart()
			},
			"daemon restart": func(*rapid.T) {
				e.host.steps = 0
				e.restart()
			},
			"time goes by": func(t *rapid.T) {
				e.host.steps = 0
				e.t0 = e.t0.Add(time.Duration(rapid.IntRange(1, 12).Draw(t, "minutes")) * time.Minute)
				e.d.tick(e.t.Context())
			},
			"": func(t *rapid.T) {
				// The host itself refuses two endpoints with one address.
				if len(e.host.illegal) > 0 {
					t.Fatal(e.host.illegal)
				}
				holders := make(map[string]string)
				for name, c := range m.containers {
					key := c.net.id + c.addr
					if other, twice := holders[key]; twice {
						t.Fatalf("%s and %s have %s", name, other, c.addr)
					}
					holders[key] = name
					if _, ok := e.host.endpoints[c.endpoint]; !ok {
						t.Fatalf("%s has lost its link", name)
					}
				}
			},
		})
		// Everything can be taken away in the end.
		e.host.steps = 0
		e.d.tick(e.t.Context())
		var errs []error
		for _, c := range m.containers {
			errs = append(errs, e.stop(c))
		}
		for _, n := range m.networks {
			errs = append(errs, e.removeNetwork(n))
		}
		if err := errors.Join(errs...); err != nil {
			rt.Fatal(err)
		}
		for range 2 {
			e.t0 = e.t0.Add(time.Hour)
			e.d.tick(e.t.Context())
		}
		// Endpoints whose containers died count for no one.
		for _, problem := range e.problems() {
			rt.Error(problem)
		}
	})
}
