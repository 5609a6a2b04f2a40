package volplugin

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"gotest.tools/v3/assert"
)

// Two hosts with one root, as over NFS.
func TestAVolumeMadeOnOneHostIsUsedOnTheOther(t *testing.T) {
	root := t.TempDir()
	a, b := newHost(t, root, nil), newHost(t, root, nil)
	assert.NilError(t, a.create("web"))
	assert.DeepEqual(t, b.list(), []string{"web"})
	assert.Equal(t, a.status("web")["uuid"], b.status("web")["uuid"])
	pathA, err := a.mount("web", "id")
	assert.NilError(t, err)
	pathB, err := b.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(pathA, "page"), "hello")
	assert.Equal(t, read(t, filepath.Join(pathB, "page")), "hello")

	// Mounts are facts of one host.
	assert.NilError(t, a.unmount("web", "id"))
	assert.DeepEqual(t, b.mountsBelow(), []string{"web"})
	assert.Equal(t, b.status("web")["mounts"], 1.0)
	assert.Equal(t, a.status("web")["mounts"], 0.0)

	// The other host still has it mounted: its data and its knowledge stay.
	assert.NilError(t, a.remove("web"))
	assert.Equal(t, read(t, filepath.Join(pathB, "page")), "hello")
	assert.Assert(t, b.status("web")["error"] != nil)
	assert.NilError(t, b.unmount("web", "id"))
	assert.DeepEqual(t, b.list(), []string{})
	assert.DeepEqual(t, trash(t, root), []string{"web"})
}

func TestHostsRaceToCreateRemoveAndList(t *testing.T) {
	root := t.TempDir()
	hosts := []*host{newHost(t, root, nil), newHost(t, root, nil), newHost(t, root, nil)}
	var wg sync.WaitGroup
	const names, rounds = 3, 25
	for n, h := range hosts {
		for worker := range 2 {
			random := rand.New(rand.NewPCG(uint64(n), uint64(worker)))
			wg.Go(func() {
				for range rounds {
					name := fmt.Sprintf("v%d", random.IntN(names))
					var err error
					switch random.IntN(5) {
					case 0, 1:
						err = h.create(name)
					case 2:
						err = h.remove(name)
					case 3:
						_, err = h.List(t.Context())
					case 4:
						_, _ = h.get(name) // absent is as good as present
					}
					if err != nil {
						t.Errorf("host %d: %v", n, err)
					}
				}
			})
		}
	}
	wg.Wait()

	// All hosts see the same, every listed volume is whole, and nothing else is left.
	want := hosts[0].list()
	present := map[string]bool{}
	for _, name := range want {
		present[name] = true
		uuid := hosts[0].status(name)["uuid"]
		for _, h := range hosts {
			assert.Equal(t, h.status(name)["uuid"], uuid)
			_, err := h.mount(name, "id")
			assert.NilError(t, err)
		}
	}
	for _, h := range hosts {
		assert.DeepEqual(t, h.list(), want)
	}
	for i := range names {
		name := fmt.Sprintf("v%d", i)
		assert.Equal(t, exists(filepath.Join(root, name)), present[name], "data of %s", name)
	}
	left, err := os.ReadDir(filepath.Join(root, ".berth", "tmp"))
	assert.NilError(t, err)
	assert.Equal(t, len(left), 0)
}

// Of many creates at once one makes the volume, and all succeed.
func TestOneOfManyCreatesWins(t *testing.T) {
	root := t.TempDir()
	hosts := []*host{newHost(t, root, nil), newHost(t, root, nil)}
	for round := range 20 {
		name := fmt.Sprintf("race-%d", round)
		var wg sync.WaitGroup
		for _, h := range hosts {
			wg.Go(func() {
				if err := h.create(name); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		assert.Equal(t, hosts[0].status(name)["uuid"], hosts[1].status(name)["uuid"])
		assert.Equal(t, hosts[0].status(name)["adopted"], false)
	}
}
