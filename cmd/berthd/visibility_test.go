package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
)

// plugin is a plugin's file system with the processes that were started in it.
type plugin struct {
	file   string
	seen   bool
	known  bool
	starts int
}

// process starts the plugin, age ago.
func (p *plugin) process(age time.Duration) *visibility {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &visibility{
		seen: func() (bool, bool, error) { return p.seen, p.known, nil },
		log:  logrus.NewEntry(log), file: p.file, begin: time.Now().Add(-age),
		startAnew: func() { p.starts++ },
	}
}

func newPlugin(t *testing.T) *plugin {
	return &plugin{file: filepath.Join(t.TempDir(), "starts"), known: true}
}

func TestPluginThatIsSeenIsLeftAlone(t *testing.T) {
	p := newPlugin(t)
	p.seen = true
	assert.NilError(t, p.process(0).check())
	assert.Equal(t, p.starts, 0)
}

func TestWithoutTheHostsMountsNothingIsDone(t *testing.T) {
	p := newPlugin(t)
	p.known = false
	assert.NilError(t, p.process(0).check())
	assert.Equal(t, p.starts, 0)
}

func TestUnseenPluginStartsAnewOnce(t *testing.T) {
	p := newPlugin(t)
	first := p.process(0)
	for range 3 {
		assert.Assert(t, errdefs.IsUnavailable(first.check()))
	}
	assert.Equal(t, p.starts, 1)
	p.seen = true
	assert.NilError(t, p.process(0).check())

	// The next time is a first time again.
	p.seen = false
	assert.Assert(t, errdefs.IsUnavailable(p.process(0).check()))
	assert.Equal(t, p.starts, 2)
}

func TestSecondStartWaitsUntilDockerListens(t *testing.T) {
	p := newPlugin(t)
	assert.Assert(t, errdefs.IsUnavailable(p.process(0).check()))
	assert.Assert(t, errdefs.IsUnavailable(p.process(0).check()))
	assert.Equal(t, p.starts, 1, "dockerd would disable the plugin")
	assert.Assert(t, errdefs.IsUnavailable(p.process(lookAway+time.Second).check()))
	assert.Equal(t, p.starts, 2)
}

func TestHostThatCannotTellIsNotAskedForEver(t *testing.T) {
	p := newPlugin(t)
	for range 2 {
		assert.Assert(t, errdefs.IsUnavailable(p.process(time.Minute).check()))
	}
	for range 3 {
		assert.NilError(t, p.process(time.Minute).check())
	}
	assert.Equal(t, p.starts, 2)
}

func TestDamagedCountIsBounded(t *testing.T) {
	p := newPlugin(t)
	assert.NilError(t, os.WriteFile(p.file, []byte("x"), 0o600))
	assert.Assert(t, errdefs.IsUnavailable(p.process(time.Minute).check()))
	assert.NilError(t, p.process(time.Minute).check())
	assert.Equal(t, p.starts, 1)
}
