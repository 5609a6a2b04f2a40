package hostport

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/options"
)

func TestServeAfterReserveOpensNothing(t *testing.T) {
	w := newWorld(t)
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	ports := w.reserve(v4, tcp("", 8080, 8089, 80), tcp("", 0, 0, 81), udp("", 0, 0, 80))
	before := map[key]int{}
	for k, s := range w.m.held["v4"] {
		before[k] = s.fd
	}
	for range 2 {
		w.serve(v4, ports)
		assert.Equal(t, len(w.m.held["v4"]), len(before))
		for k, s := range w.m.held["v4"] {
			assert.Equal(t, s.fd, before[k])
		}
	}
}

func TestRestartTakesThePortsBackUnderTraffic(t *testing.T) {
	w := newWorld(t)
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	ports := w.publish(v4, tcp("", 8080, 8089, 80), udp("", 8080, 8089, 80))
	go echo(w.listen(w.box, "10.1.0.2:80"))
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				w.answers("[::1]:8080") // fails now and then, as there is a restart
			}
		}
	}()
	for range 5 {
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			if w.answers("[::1]:8080") {
				return poll.Success()
			}
			return poll.Continue("no answer")
		})
		w.restart()
		w.serve(v4, ports)
	}
	close(stop)
	<-done
	assert.Assert(t, w.answers("[::1]:8080"))
	assert.Assert(t, !w.free("tcp", "0.0.0.0:8080") && !w.free("udp", "0.0.0.0:8080"))
}

func TestAPortTakenMeanwhileIsNamedAndTheRestServed(t *testing.T) {
	w := newWorld(t)
	e := endpoint("one")
	var want []options.PortRequest
	for port := range uint16(10) {
		want = append(want, tcp("", 8080+port, 8080+port, 80+port))
	}
	ports := w.publish(e, want...)
	w.restart()
	first, second := w.listen(w.host, "0.0.0.0:8083"), w.listen(w.host, "0.0.0.0:8084")
	w.m.Release("unknown")
	err := w.m.Serve(t.Context(), e, ports)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "2 of 20 published ports are not held: 0.0.0.0:8083-8084->83-84/tcp: Bind for 0.0.0.0:8083 failed")
	go echo(w.listen(w.box, "[fd00:1::2]:83"))
	assert.Assert(t, w.answers("[::1]:8083"))
	for port := range 10 {
		assert.Assert(t, !w.free("tcp", fmt.Sprintf("[::]:%d", 8080+port)))
		assert.Assert(t, !w.free("tcp", fmt.Sprintf("127.0.0.1:%d", 8080+port)))
	}
	// It may be tried again.
	first.Close()
	second.Close()
	w.serve(e, ports)
	assert.Assert(t, !w.free("tcp", "0.0.0.0:8083"))
}

// The endpoint of a port may get another address, or another network policy.
func TestServeFollowsTheTarget(t *testing.T) {
	w := newWorld(t)
	v4 := Target{Endpoint: "one", Addr4: addr4}
	w.publish(v4, tcp("", 8080, 8080, 80))
	go echo(w.listen(w.box, "10.1.0.2:80"))
	go echo(w.listen(w.box, "10.1.0.2:81"))
	assert.Assert(t, w.answers("[::1]:8080"))
	ports := w.publish(v4, tcp("", 8080, 8080, 81))
	assert.DeepEqual(t, words(ports), []string{"0.0.0.0:8080->81/tcp", "[::]:8080->81/tcp"})
	assert.Assert(t, w.answers("[::1]:8080"))
	dual := endpoint("one")
	ports = w.publish(dual, tcp("", 8080, 8080, 81))
	assert.DeepEqual(t, words(ports), []string{"0.0.0.0:8080->81/tcp", "[::]:8080->81/tcp"})
	go echo(w.listen(w.box, "[fd00:1::2]:81"))
	assert.Assert(t, w.answers("[::1]:8080"))
	assert.Assert(t, !w.answers("[2001:db8::1]:8080"))
}
