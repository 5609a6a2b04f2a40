package ipam

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestParseRanges(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"10.1.0.7", "10.1.0.7"},
		{" 10.1.0.1 - 10.1.0.20 , 10.1.0.128/28", "10.1.0.1-10.1.0.20 10.1.0.128-10.1.0.143"},
		{"10.1.0.9,10.1.0.8,10.1.0.7", "10.1.0.7-10.1.0.9"},
		{"10.1.0.0/24,10.1.0.7", "10.1.0.0-10.1.0.255"},
		{"10.1.0.0/25,10.1.0.128/25", "10.1.0.0-10.1.0.255"},
		{"fd00::1-fd00::9,10.1.0.7", "10.1.0.7 fd00::1-fd00::9"},
		{"255.255.255.255,::", "255.255.255.255 ::"},
		{"0.0.0.0/0", "0.0.0.0-255.255.255.255"},
		{"::/0", "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
	} {
		list, err := ParseRanges(tc.in)
		assert.NilError(t, err)
		var words []string
		for _, r := range list {
			words = append(words, r.String())
		}
		assert.Equal(t, strings.Join(words, " "), tc.want)
	}
	for _, tc := range []struct{ in, want string }{
		{"", `"": want an address`},
		{"10.1.0.7,", `"": want an address`},
		{"10.1.0.7/24", `"10.1.0.7/24": it has bits beyond its length, want 10.1.0.0/24`},
		{"10.1.0.9-10.1.0.7", "want 10.1.0.7-10.1.0.9"},
		{"10.1.0.9-fd00::1", "want an address"},
		{"::ffff:10.1.0.7", "want an address"},
		{"::ffff:10.1.0.0/120", "want an address"},
		{"fe80::1%eth0", "want an address"},
		{"web", `"web": want an address, a range A-B or a prefix, as 10.1.0.7, 10.1.0.1-10.1.0.20 or 10.1.0.64/28`},
		{strings.Repeat("10.0.0.1,", maxRanges) + "10.0.0.1", "want at most 1024 ranges"},
	} {
		_, err := ParseRanges(tc.in)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
	}
}

// What is read is sorted, does not touch, and reads the same again.
func FuzzParseRanges(f *testing.F) {
	for _, s := range []string{"10.1.0.7", "10.1.0.1-10.1.0.20,10.1.0.128/28", "fd00::/64,::1-::2", "0.0.0.0/0,::/0", "-", "/", ","} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := ParseRanges(s)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			return
		}
		var words []string
		for i, r := range list {
			assert.Assert(t, r.First.Is4() == r.Last.Is4() && !r.Last.Less(r.First))
			if i > 0 {
				before := list[i-1]
				assert.Assert(t, before.Last.Less(r.First))
				assert.Assert(t, before.Last.Is4() != r.First.Is4() || before.Last.Next() != r.First)
			}
			words = append(words, r.String())
		}
		again, err := ParseRanges(strings.Join(words, ","))
		assert.NilError(t, err)
		assert.DeepEqual(t, again, list, equalAddrs)
	})
}
