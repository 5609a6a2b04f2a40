package restic_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/internal/restictest"
)

func TestOnAServer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	assert.NilError(t, os.Rename(restictest.Repository(t), filepath.Join(dir, "hosts")))
	server := restictest.Serve(t, dir)
	c := config(t, server.URL+"hosts/")
	e := engine(t, c)
	s := source(t)
	s.Parent = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef" // gone
	first := makeBackup(t, e, s)
	s.Parent = first.ID
	r := makeBackup(t, e, s)
	to := t.TempDir()
	_, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, to, nil, nil)
	assert.NilError(t, err)
	nastytree.Compare(t, s.Dir+"/data", to+"/data")
	assert.NilError(t, e.Forget(t.Context(), []string{first.ID, s.Parent}))
	assert.NilError(t, e.Prune(t.Context(), nil))
	_, err = e.Manifest(t.Context(), first.ID)
	assert.ErrorIs(t, err, backup.ErrNoBackup)

	wrong := config(t, server.URL+"hosts/")
	wrong.Target.Password = "another password"
	_, err = engine(t, wrong).List(t.Context(), backup.Filter{})
	assert.ErrorIs(t, err, backup.ErrPassword)
	_, err = engine(t, config(t, server.URL+"gone/")).List(t.Context(), backup.Filter{})
	assert.ErrorIs(t, err, backup.ErrNoRepository)
}

func TestAListDoesNotWaitForAServerThatIsGone(t *testing.T) {
	t.Parallel()
	server := restictest.Serve(t, t.TempDir())
	server.Kill()
	c := config(t, server.URL+"hosts/")
	c.ListWait = time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	_, err := engine(t, c).List(ctx, backup.Filter{})
	assert.ErrorContains(t, err, "connection refused")
	assert.NilError(t, ctx.Err())
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
}

func TestAServerThatDiesComesBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	assert.NilError(t, os.Rename(restictest.Repository(t), filepath.Join(dir, "hosts")))
	server := restictest.Serve(t, dir)
	c := config(t, server.URL+"hosts/")
	c.Target.UploadLimit = 2000
	e := engine(t, c)
	s := source(t)
	noise(t, s, "8000000")
	// restic asks again for a quarter of an hour.
	killed := false
	r, err := e.Backup(t.Context(), s, func(p backup.Progress) {
		if p.Bytes > 0 && !killed {
			killed = true
			server.Kill()
			server.Start(t)
		}
	})
	assert.NilError(t, err)
	assert.Assert(t, killed && r.Complete())
	report, err := e.Check(t.Context(), 1, nil)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Errors), 0, "%q", report.Errors)
}
