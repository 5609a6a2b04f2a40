package hostport

import (
	"fmt"
	"sync"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
)

// crowd makes the Manager pack all but a few sockets.
func (w *world) crowd() {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	w.m.looseLimit, w.m.shelveAt = 20, 20
}

func many(n int) []options.PortRequest {
	var want []options.PortRequest
	for i := range uint16(n) {
		want = append(want, tcp("", 20000+i, 20000+i, 1+i), udp("", 20000+i, 20000+i, 1+i))
	}
	return want
}

func TestPortsInParcelsWorkLikeOthers(t *testing.T) {
	w := newWorld(t)
	w.crowd()
	before := openFiles(t)
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	const n = 400
	ports := w.publish(v4, many(n)...)
	assert.Equal(t, len(w.m.held["v4"]), 4*n)
	assert.Assert(t, openFiles(t) < before+250, "%d files, %d before", openFiles(t), before)

	// They are held, and the proxy serves them.
	go echo(w.listen(w.box, "10.1.0.2:8"))
	go echo(w.listen(w.box, "10.1.0.2:301"))
	go echoUDP(w.listenUDP(w.box, "10.1.0.2:8"))
	for _, port := range []int{20007, 20300} {
		assert.Assert(t, w.answers(fmt.Sprintf("[::1]:%d", port)), "%d", port)
		assert.Assert(t, w.answers(fmt.Sprintf("[2001:db8::1]:%d", port)), "%d", port)
		assert.Assert(t, !w.free("tcp", fmt.Sprintf("127.0.0.1:%d", port)))
		assert.Assert(t, !w.free("udp", fmt.Sprintf("[::1]:%d", port)))
	}
	c := w.mustDial(w.host, "udp", "[::1]:20007")
	_, err := ask(c, "hello")
	assert.NilError(t, err)
	// A session goes on when its port is packed again.
	w.m.mu.Lock()
	err = w.m.packLocked([]*socket{w.m.table.exact(key{options.UDP, 20007, ip("::")})})
	w.m.mu.Unlock()
	assert.NilError(t, err)
	_, err = ask(c, "hello")
	assert.NilError(t, err)

	// The same again changes nothing; fewer are those that are left.
	w.serve(v4, ports)
	assert.DeepEqual(t, w.reserve(v4, many(n)...), ports, cmpAddr)
	ports = w.publish(v4, many(n/2)...)
	assert.Equal(t, len(w.m.held["v4"]), 2*n)
	assert.Assert(t, w.free("tcp", "0.0.0.0:20300") && w.free("udp", "[::]:20399"))
	assert.Assert(t, !w.free("tcp", "0.0.0.0:20007") && !w.free("tcp", "[::]:20199"))
	assert.Assert(t, w.answers("[::1]:20007"))
	w.serve(v4, ports[:1])
	_, err = w.m.Reserve(t.Context(), Target{Endpoint: "other", Addr4: addr4}, many(n/2))
	assert.ErrorContains(t, err, "published by endpoint v4")
	w.m.Release("v4")
	assert.Assert(t, w.free("tcp", "0.0.0.0:20007") && w.free("udp", "[::]:20007"))
	assert.Equal(t, w.m.loose, 0)
}

func TestServeAnewWhatIsInParcels(t *testing.T) {
	w := newWorld(t)
	w.crowd()
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	ports := w.publish(v4, many(300)...)
	go echo(w.listen(w.box, "[fd00:1::2]:1"))
	go echo(w.listen(w.box, "10.1.0.2:1"))
	assert.Assert(t, w.answers("[::1]:20000"))
	// Another address of the container: every listener of the proxy is a new one.
	for i := range ports {
		if ports[i].Host.Is6() {
			ports[i].Container = addr6
		}
	}
	w.serve(endpoint("v4"), ports)
	assert.Assert(t, w.answers("[::1]:20000") && !w.answers("[2001:db8::1]:20000"))
	none := endpoint("v4")
	none.Network.NoProxy = true
	w.serve(none, ports)
	assert.Assert(t, !w.answers("[::1]:20000"))
	assert.Equal(t, len(w.m.held["v4"]), 1200)
	w.m.Release("v4")
	assert.Equal(t, w.m.loose, 0)
}

func TestTwentyThousandPorts(t *testing.T) {
	w := newWorld(t)
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	var want []options.PortRequest
	for i := range uint16(20000) {
		want = append(want, tcp("", 20000+i, 20000+i, 1+i))
	}
	ports := w.publish(v4, want...)
	assert.DeepEqual(t, words(ports), []string{"0.0.0.0:20000-39999->1-20000/tcp", "[::]:20000-39999->1-20000/tcp"})
	go echo(w.listen(w.box, "10.1.0.2:1"))
	go echo(w.listen(w.box, "10.1.0.2:20000"))
	assert.Assert(t, w.answers("[::1]:20000") && w.answers("[::1]:39999"))
	assert.Assert(t, !w.free("tcp", "0.0.0.0:20000") && !w.free("tcp", "[::]:39999"))
	w.restart()
	w.serve(v4, ports)
	assert.Assert(t, w.answers("[::1]:20000") && w.answers("[::1]:39999"))
	w.m.Release("v4")
	assert.Assert(t, w.free("tcp", "0.0.0.0:20000") && w.free("tcp", "[::]:39999"))
}

// Endpoints come and go while the proxy carries, with every socket in and out of
// parcels.
func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	w.crowd()
	go echo(w.listen(w.box, "10.1.0.2:1"))
	w.publish(Target{Endpoint: "constant", Addr4: addr4}, many(100)...)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			target := Target{Endpoint: fmt.Sprintf("endpoint %d", i), Addr4: addr4}
			for range 10 {
				var want []options.PortRequest
				for port := range uint16(20) {
					want = append(want, tcp("", 30000, 30100, 1+port), udp("", 0, 0, 1+port))
				}
				ports, err := w.m.Reserve(t.Context(), target, want)
				if err == nil {
					err = w.m.Serve(t.Context(), target, ports)
				}
				if err != nil {
					t.Error(err)
				}
				w.m.Release(target.Endpoint)
			}
		})
	}
	for i := range 20 {
		assert.Check(t, w.answers("[::1]:20000"), "call %d", i)
	}
	all.Wait()
	assert.Equal(t, len(w.m.held), 1)
	w.m.Release("constant")
	assert.Equal(t, w.m.loose, 0)
	assert.Equal(t, len(w.m.table), 0)
}
