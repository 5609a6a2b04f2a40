package restic_test

import (
	"encoding/pem"
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
	server := httptest.NewTLSServer(gofakes3.New(store).Server())
	t.Cleanup(server.Close)
	authority := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	c := config(t, "s3:"+server.URL+"/bucket/hosts")
	c.ListWait = time.Hour // not for what does not get better
	c.Target.Environment = map[string]string{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret of the server"}
	_, err := engine(t, c).List(t.Context(), backup.Filter{})
	assert.ErrorContains(t, err, "certificate signed by unknown authority")
	for _, name := range []string{backup.CABundle, backup.CACert} {
		c.Target.Files = map[string]string{name: authority}
		assert.NilError(t, c.Target.Check())
		_, err = engine(t, c).List(t.Context(), backup.Filter{})
		assert.ErrorIs(t, err, backup.ErrNoRepository, name)
	}
	e := engine(t, c)
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
	_, err = e.Backup(t.Context(), s, nil)
	assert.ErrorContains(t, err, "bucket does not exist")
}
