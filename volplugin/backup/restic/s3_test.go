package restic_test

import (
	"context"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

func TestInS3(t *testing.T) {
	t.Parallel()
	store := s3mem.New()
	assert.NilError(t, store.CreateBucket("bucket"))
	server := httptest.NewServer(gofakes3.New(store).Server())
	t.Cleanup(server.Close)
	c := config(t, "s3:"+server.URL+"/bucket/hosts")
	c.Target.Environment = map[string]string{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret of the server"}
	e := engine(t, c)
	_, err := e.List(t.Context(), backup.Filter{})
	assert.ErrorIs(t, err, backup.ErrNoRepository)
	assert.NilError(t, e.Init(t.Context()))
	s := source(t)
	first := makeBackup(t, e, s)
	s.Parent = first.ID
	second := makeBackup(t, e, s)
	to := t.TempDir()
	_, err = e.Restore(t.Context(), backup.Backup{ID: second.ID}, to, nil, nil)
	assert.NilError(t, err)
	nastytree.Compare(t, s.Dir+"/data", to+"/data")
	assert.NilError(t, e.Forget(t.Context(), []string{first.ID}))
	assert.NilError(t, e.Prune(t.Context(), nil))
	list, err := e.List(t.Context(), backup.Filter{})
	assert.NilError(t, err)
	assert.Equal(t, len(list), 1)

	// The bucket goes with everything in it.
	assert.NilError(t, store.ForceDeleteBucket("bucket"))
	// restic asks again for long; whoever waits gives up first.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err = e.Backup(ctx, s, nil)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}
