package volplugin

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/presence"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// newSharingHost starts a host whose root others have too, with images.
func newSharingHost(t *testing.T, root string) *host {
	t.Helper()
	local := t.TempDir()
	return newHost(t, root, func(c *Config) {
		c.Local = local
		c.shared = func(*volume.Root) (bool, error) { return true, nil }
	})
}

// peersOf is a host's presence on its default root.
func peersOf(t *testing.T, h *host) *presence.Presence {
	t.Helper()
	s := h.byKey(homeKey)
	root, err := s.open()
	assert.NilError(t, err)
	defer root.Close()
	p, err := s.peers(root)
	assert.NilError(t, err)
	return p
}

// seize takes a volume's lease from whoever has it.
func seize(t *testing.T, h *host, name string) {
	t.Helper()
	_, err := peersOf(t, h).Acquire(t.Context(), h.status(name)["uuid"].(string), true)
	assert.NilError(t, err)
}

// awaitCut waits until a host has noticed that it has lost a volume, and has acted.
func awaitCut(t *testing.T, h *host, name string) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		status := h.status(name)
		if text, _ := status["error"].(string); status["lease"] == "lost" && strings.Contains(text, "was shut down on this host") {
			return poll.Success()
		}
		return poll.Continue("%v", status)
	}, poll.WithTimeout(20*time.Second))
}

// lossy makes an image volume that host a has mounted, with an open file in it.
func lossy(t *testing.T) (a, b *host, program *os.File) {
	t.Helper()
	root := t.TempDir()
	a, b = newSharingHost(t, root), newSharingHost(t, root)
	assert.NilError(t, a.create("db", "engine=image", "size=32M", "fs=ext4"))
	path, err := a.mount("db", "one")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "kept"), "kept")
	program, err = os.Create(filepath.Join(path, "open"))
	assert.NilError(t, err)
	t.Cleanup(func() { _ = program.Close() })
	assert.NilError(t, unix.Syncfs(int(program.Fd())))
	return a, b, program
}

func TestWhoHasLostTheLeaseWritesNoMore(t *testing.T) {
	a, b, program := lossy(t)
	_, err := b.mount("db", "two")
	assert.Equal(t, fault.Kind(err), "conflict", "%v", err)

	uuid := a.status("db")["uuid"].(string)
	a.byKey(homeKey).leaseChanged(uuid, presence.Doubtful, "the root does not answer")
	assert.Equal(t, a.status("db")["lease"], "doubtful")
	_, err = program.WriteString("still written")
	assert.NilError(t, err)
	assert.NilError(t, program.Sync(), "a doubt stops nothing")

	seize(t, b, "db")
	assert.NilError(t, peersOf(t, a).Beat(t.Context()))
	awaitCut(t, a, "db")
	_, err = program.WriteString("too late")
	if err == nil {
		err = program.Sync()
	}
	assert.ErrorIs(t, err, unix.EIO)
	assert.NilError(t, testutil.CollectAndCompare(a.Metrics(), strings.NewReader(`
# HELP berth_volume_lease_trouble 1 of an exclusive volume whose lease is in doubt (state doubtful) or lost (state lost) on this host, as long as it is.
# TYPE berth_volume_lease_trouble gauge
berth_volume_lease_trouble{state="lost",volume="db"} 1
`), "berth_volume_lease_trouble"))
	// The other host has it, and this one gets it in no way.
	_, err = a.mount("db", "three")
	assert.Equal(t, fault.Kind(err), "conflict", "%v", err)

	// The container is stopped here and started there, and later here again.
	assert.NilError(t, program.Close())
	assert.NilError(t, a.unmount("db", "one"))
	assert.Assert(t, a.status("db")["lease"] == nil)
	path, err := b.mount("db", "two")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "kept")), "kept")
	assert.Equal(t, read(t, filepath.Join(path, "open")), "still written")
	write(t, filepath.Join(path, "kept"), "by the other host")
	assert.NilError(t, b.unmount("db", "two"))
	path, err = a.mount("db", "four")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "kept")), "by the other host")
	assert.NilError(t, a.unmount("db", "four"))
}

// The lease may be free again while containers still have what was shut down.
func TestWhatWasShutDownIsNotHandedOutAgain(t *testing.T) {
	a, b, program := lossy(t)
	seize(t, b, "db")
	assert.NilError(t, peersOf(t, a).Beat(t.Context()))
	awaitCut(t, a, "db")
	assert.NilError(t, peersOf(t, b).Release(t.Context(), b.status("db")["uuid"].(string)))
	_, err := a.mount("db", "two")
	assert.Equal(t, fault.Kind(err), "conflict", "%v", err)
	assert.ErrorContains(t, err, "stop its containers")
	assert.Equal(t, a.status("db")["lease"], "lost")
	assert.NilError(t, program.Close())
	assert.NilError(t, a.unmount("db", "one"))
	_, err = a.mount("db", "two")
	assert.NilError(t, err)
	assert.NilError(t, a.unmount("db", "two"))
}

// A lease may be lost while no berthd runs.
func TestALeaseThatWasLostMeanwhileIsNoticedAtStart(t *testing.T) {
	a, b, program := lossy(t)
	a.stop()
	seize(t, b, "db")
	a.start()
	awaitCut(t, a, "db")
	_, err := program.WriteString("too late")
	if err == nil {
		err = program.Sync()
	}
	assert.ErrorIs(t, err, unix.EIO)
	assert.NilError(t, program.Close())
	assert.NilError(t, a.unmount("db", "one"))
	_, err = b.mount("db", "two")
	assert.NilError(t, err)
	assert.NilError(t, b.unmount("db", "two"))

	// What was not lost is this host's still, and the others know.
	_, err = a.mount("db", "three")
	assert.NilError(t, err)
	a.restart()
	lease, err := peersOf(t, b).Lease(t.Context(), a.status("db")["uuid"].(string))
	assert.NilError(t, err)
	assert.Assert(t, lease.Host == a.ledger.hostID && lease.Alive && !lease.Stopped, "%+v", lease)
	assert.Assert(t, a.status("db")["lease"] == nil)
	assert.NilError(t, a.unmount("db", "three"))
}

// The trash deletes leases with what they are of, whoever empties it.
func TestTheTrashDeletesLeases(t *testing.T) {
	root := t.TempDir()
	h := newSharingHost(t, root)
	leases := func() int {
		files, err := filepath.Glob(filepath.Join(root, ".berth/leases/*"))
		assert.NilError(t, err)
		return len(files)
	}
	for _, empty := range []func(){
		func() { h.expire(t.Context()) },
		func() {
			_, err := h.PurgeTrash(t.Context(), control.PurgeTrashRequest{All: true}, quiet)
			assert.NilError(t, err)
		},
	} {
		assert.NilError(t, h.create("db", "exclusive=true", "trash.keep=1h"))
		_, err := h.mount("db", "one")
		assert.NilError(t, err)
		assert.NilError(t, h.unmount("db", "one"))
		assert.NilError(t, h.remove("db"))
		assert.Equal(t, leases(), 1, "the volume may come back")
		h.cfg.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
		h.restart()
		empty()
		assert.DeepEqual(t, trash(t, root), []string{})
		assert.Equal(t, leases(), 0)
		h.cfg.Now = nil
		h.restart()
	}
}
