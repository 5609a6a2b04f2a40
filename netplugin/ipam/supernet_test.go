package ipam

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestParseSupernets(t *testing.T) {
	list, err := ParseSupernets(" 10.208.0.0/12:24, 172.16.0.0/16:30,fd00:1234:5678::/48:64 ")
	assert.NilError(t, err)
	var text []string
	for _, s := range list {
		text = append(text, s.String())
	}
	assert.DeepEqual(t, text, []string{"10.208.0.0/12:24", "172.16.0.0/16:30", "fd00:1234:5678::/48:64"})

	none, err := ParseSupernets("  ")
	assert.NilError(t, err)
	assert.Equal(t, len(none), 0)

	for in, want := range map[string]string{
		"10.0.0.0/8":                      "want PREFIX:SIZE",
		"10.0.0.0:24":                     "want PREFIX:SIZE",
		"10.0.0.0/8:":                     "want PREFIX:SIZE",
		"10.0.0.0/8:24,":                  "want PREFIX:SIZE",
		"10.0.0.1/8:24":                   "bits beyond its length, want 10.0.0.0/8",
		"10.0.0.0/8:7":                    "want a size from 8 to 30",
		"10.0.0.0/8:31":                   "want a size from 8 to 30",
		"fd00::/8:127":                    "want a size from 8 to 126",
		"10.0.0.0/8:24,10.1.0.0/16:24":    "address pools 10.0.0.0/8:24 and 10.1.0.0/16:24 overlap",
		"224.0.0.0/8:24":                  "multicast",
		"0.0.0.0/0:24":                    "whole address family",
		"::ffff:10.0.0.0/104:120":         "address pools",
		"10.0.0.0/8:99999999999999999999": "want PREFIX:SIZE",
	} {
		_, err := ParseSupernets(in)
		assert.ErrorContains(t, err, want, "%q", in)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", in, err)
	}
}

func TestDefaultsKeepClearOfDockers(t *testing.T) {
	ula, err := NewULA(bytes.NewReader([]byte{1, 2, 3, 4, 5}))
	assert.NilError(t, err)
	assert.Equal(t, ula, netip.MustParsePrefix("fd01:203:405::/48"))

	list := DefaultSupernets(nil, ula)
	assert.Equal(t, len(list), 2)
	for _, docker := range []string{"172.16.0.0/12", "192.168.0.0/16"} {
		for _, s := range list {
			assert.Assert(t, !s.Prefix.Overlaps(prefix(docker)))
		}
	}

	mine, err := ParseSupernets("10.0.0.0/16:24")
	assert.NilError(t, err)
	list = DefaultSupernets(mine, ula)
	assert.Equal(t, len(list), 2)
	assert.Equal(t, list[0], mine[0])
	assert.Equal(t, list[1].Prefix, ula)
}

func FuzzParseSupernets(f *testing.F) {
	for _, s := range []string{"", "10.208.0.0/12:24,fd00::/48:64", "10.0.0.0/8:24,10.1.0.0/16:24", "::/1:1", "10.0.0.0/31:31", ":", "/:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := ParseSupernets(s)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			return
		}
		a, _ := newTestAllocator(t, s)
		for _, s := range list {
			again, err := ParseSupernets(s.String())
			assert.NilError(t, err)
			assert.Equal(t, again[0], s)
			p := mustPool(t, a, PoolRequest{IPv6: s.Prefix.Addr().Is6()})
			mustRequest(t, a, AddressRequest{Pool: p.ID, Gateway: true})
			mustRequest(t, a, AddressRequest{Pool: p.ID})
		}
	})
}
