package ipamload

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// counting gives out numbers as addresses, the lowest that is free.
type counting struct {
	mu    sync.Mutex
	taken map[string]bool
	calls map[string]int
}

func (c *counting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[r.URL.Path]++
	var req struct{ AddressSpace, Pool, PoolID, Address string }
	_ = json.NewDecoder(r.Body).Decode(&req)
	switch r.URL.Path {
	case "/Plugin.Activate":
		fmt.Fprint(w, `{"Implements":["IpamDriver"]}`)
	case "/IpamDriver.GetDefaultAddressSpaces":
		fmt.Fprint(w, `{"LocalDefaultAddressSpace":"here"}`)
	case "/IpamDriver.RequestPool":
		fmt.Fprintf(w, `{"PoolID":"%s/%s","Pool":"%s"}`, req.AddressSpace, req.Pool, req.Pool)
	case "/IpamDriver.RequestAddress":
		for i := range 100 {
			if addr := fmt.Sprintf("10.0.0.%d", i); !c.taken[addr] {
				c.taken[addr] = true
				fmt.Fprintf(w, `{"Address":"%s/24"}`, addr)
				return
			}
		}
		http.Error(w, `{"Err":"full"}`, http.StatusInternalServerError)
	case "/IpamDriver.ReleaseAddress":
		delete(c.taken, req.Address)
		fmt.Fprint(w, `{}`)
	default:
		fmt.Fprint(w, `{}`)
	}
}

// serve returns the directory of a socket behind which somebody counts.
func serve(t *testing.T) (string, *counting) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "x.sock"))
	assert.NilError(t, err)
	c := &counting{taken: map[string]bool{}, calls: map[string]int{}}
	server := &http.Server{Handler: c}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { assert.NilError(t, server.Close()) })
	return dir, c
}

func TestAddressesAreTakenAndGivenBack(t *testing.T) {
	dir, c := serve(t)
	socket, err := Find(t.Context(), dir)
	assert.NilError(t, err)
	l, err := Open(t.Context(), socket, "10.0.0.0/24", 7)
	assert.NilError(t, err)
	defer func() { assert.NilError(t, l.Close()) }()
	assert.Equal(t, l.Pool, "here/10.0.0.0/24")
	assert.NilError(t, l.Fill(30))
	assert.Equal(t, len(c.taken), 30)

	res, err := l.Pairs(50*time.Millisecond, 0)
	assert.NilError(t, err)
	assert.Equal(t, len(c.taken), 30)
	assert.Assert(t, res.PerSecond > 100 && res.Median > 0 && res.P99 >= res.Median, "%+v", res)
	before := c.calls["/IpamDriver.ReleaseAddress"]
	res, err = l.Pairs(500*time.Millisecond, 100)
	assert.NilError(t, err)
	assert.Assert(t, res.PerSecond < 130, "%+v", res)
	assert.Assert(t, c.calls["/IpamDriver.ReleaseAddress"]-before < 65)

	assert.ErrorContains(t, l.Fill(80), "full")
	assert.NilError(t, l.ReleasePool())
}

func TestNoPluginIsAnError(t *testing.T) {
	_, err := Find(t.Context(), t.TempDir())
	assert.ErrorContains(t, err, "no plugin implements IpamDriver")
}

func TestAgeOfAProcess(t *testing.T) {
	age, err := processAge(os.Getpid())
	assert.NilError(t, err)
	assert.Assert(t, age >= 0 && age < 3600, "%f", age)
	name, err := os.ReadFile("/proc/self/comm")
	assert.NilError(t, err)
	found, err := processes(strings.TrimSpace(string(name)))
	assert.NilError(t, err)
	assert.Assert(t, len(found) > 0)
}
