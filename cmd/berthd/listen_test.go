package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
)

func TestStaleSocketIsReplacedALiveOneStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plugins", "berth.sock")
	first, err := listen(path)
	assert.NilError(t, err)
	info, err := os.Stat(path)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o600))

	_, err = listen(path)
	assert.ErrorContains(t, err, path+" is served by another process")

	// A killed process leaves its socket behind.
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	assert.NilError(t, first.Close())
	second, err := listen(path)
	assert.NilError(t, err)
	assert.NilError(t, second.Close())
}

func TestFileThatIsNoSocketIsNotRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "berth.sock")
	assert.NilError(t, os.WriteFile(path, []byte("mine"), 0o600))
	_, err := listen(path)
	assert.ErrorContains(t, err, "is not a socket")
	content, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(content), "mine")
}
