package ipam

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// A network says more about its pool than was known when that was requested.
func TestConfigure(t *testing.T) {
	var events []Event
	a, c := newTestAllocator(t, "")
	a.cfg.Record = func(e Event) { events = append(events, e) }
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/29")})
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.1"), Gateway: true})
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.2")})
	o := p.Options
	o.Exclude, o.Quarantine = []Range{{addr("10.1.0.2"), addr("10.1.0.4")}}, 0
	got, err := a.Configure(p.ID, o)
	assert.NilError(t, err)
	assert.Equal(t, got.Options.Quarantine, time.Duration(0))
	n := len(events)
	_, err = a.Configure(p.ID, o)
	assert.NilError(t, err)
	assert.Equal(t, len(events), n, "nothing has changed")
	_, err = a.Bind(p.ID, "n")
	assert.NilError(t, err)

	o.Exclude = []Range{{addr("10.1.0.1"), addr("10.1.0.6")}}
	_, err = a.Configure(p.ID, o)
	assert.Error(t, err, "IPAM option exclude: it leaves no address of subnet 10.1.0.0/29")
	assert.Assert(t, errdefs.IsInvalidArgument(err))
	_, err = a.Configure("x", o)
	assert.ErrorContains(t, err, "x")

	b, _ := newTestAllocator(t, "")
	b.cfg.Now = c.now
	for _, e := range events {
		assert.NilError(t, b.Apply(e))
	}
	assert.Equal(t, state(b), state(a))
	for _, want := range []string{"10.1.0.5", "10.1.0.6"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
		assert.Equal(t, mustRequest(t, b, AddressRequest{Pool: p.ID}), addr(want))
	}
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.ErrorContains(t, err, "no free address")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.3")}), addr("10.1.0.3"))
}
