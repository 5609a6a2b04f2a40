package options

import (
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestOptionsThatAreTaken(t *testing.T) {
	for _, policy := range []OnRemove{Trash, Keep, Purge} {
		spec, err := Parse(map[string]string{"on-remove": string(policy)})
		assert.NilError(t, err)
		assert.Equal(t, *spec.OnRemove, policy)
		assert.Assert(t, spec.UID == nil && spec.GID == nil && spec.Mode == nil)
	}
	given := map[string]string{"uid": "0", "gid": "4294967294", "mode": "0750"}
	spec, err := Parse(given)
	assert.NilError(t, err)
	assert.Equal(t, *spec.UID, uint32(0))
	assert.Equal(t, *spec.GID, uint32(4294967294))
	assert.Equal(t, *spec.Mode, uint32(0o750))
	assert.DeepEqual(t, spec.Given, given)
	given["uid"] = "7"
	assert.Equal(t, spec.Given["uid"], "0", "the spec shares the caller's map")

	for value, want := range map[string]uint32{"000": 0, "755": 0o755, "2770": 0o2770, "7777": 0o7777, "01777": 0o1777} {
		spec, err := Parse(map[string]string{"mode": value})
		assert.NilError(t, err)
		assert.Equal(t, *spec.Mode, want)
	}
	spec, err = Parse(nil)
	assert.NilError(t, err)
	assert.Assert(t, spec.OnRemove == nil)
}

func TestOptionsThatAreRefused(t *testing.T) {
	for _, tc := range []struct{ name, value, want string }{
		{"on-remove", "delete", `option on-remove="delete": want trash, keep or purge`},
		{"on-remove", "", `option on-remove="": want trash, keep or purge`},
		{"on-remove", "Trash", `want trash`},
		{"uid", "root", `option uid="root": want a number from 0 to 4294967294`},
		{"uid", "", `option uid=""`},
		{"gid", "-1", `option gid="-1"`},
		{"gid", "+1", `option gid="+1"`},
		{"gid", "4294967295", `option gid="4294967295"`},
		{"uid", "0x10", `option uid="0x10"`},
		{"mode", "0788", `option mode="0788": want octal`},
		{"mode", "rwx", `option mode="rwx"`},
		{"mode", "7", `option mode="7"`},
		{"mode", "10000", `option mode="10000"`},
		{"mode", "0000000755", `option mode="0000000755"`},
		{"on-remov", "trash", `unknown option "on-remov": did you mean on-remove?`},
		{"on_remove", "trash", `did you mean on-remove?`},
		{"OnRemove", "trash", `did you mean on-remove?`},
		{"mod", "755", `did you mean mode?`},
		{"UID", "1", `did you mean uid?`},
		{"colour", "red", `unknown option "colour": allowed are gid, mode, on-remove, uid`},
		{"", "x", `unknown option "": allowed are`},
		{"size", "10G", `option "size" is not supported yet: the dir engine cannot enforce a size`},
		{"from", "web@monday", `option "from" is not supported yet`},
		{"snapshot.schedule", "@hourly", `option "snapshot.schedule" is not supported yet`},
		{"label.team", "x", `option "label.team" is not supported yet`},
		{"type", "nfs", `option "type" is not supported yet`},
		{"device", ":/export", `option "device" is not supported yet`},
		{"new\nline", "x", `unknown option "new\nline"`},
		{strings.Repeat("x", 5000), "x", "…"},
	} {
		spec, err := Parse(map[string]string{tc.name: tc.value})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s=%s: %v", tc.name, tc.value, err)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, spec.Given == nil)
		assert.Assert(t, len(err.Error()) < 400 && !strings.Contains(err.Error(), "\n"))
	}
}

func TestLocalsBindMountIsRefusedByName(t *testing.T) {
	for _, o := range []string{"bind", "rbind", "ro,bind"} {
		_, err := Parse(map[string]string{"type": "none", "device": "/srv/data", "o": o})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, "/srv/data")
		assert.ErrorContains(t, err, "bind mounts of host directories")
	}
}

func TestTheSameWrongOptionIsNamedEachTime(t *testing.T) {
	given := map[string]string{"uid": "x", "gid": "x", "mode": "x", "zzz": "x"}
	for range 20 {
		_, err := Parse(given)
		assert.ErrorContains(t, err, "gid")
	}
}

func TestDifferences(t *testing.T) {
	has := map[string]string{"uid": "1", "mode": "0755"}
	assert.Equal(t, len(Differences(has, maps.Clone(has))), 0)
	assert.Equal(t, len(Differences(nil, map[string]string{})), 0)
	assert.DeepEqual(t, Differences(has, map[string]string{"uid": "2", "gid": "3"}),
		[]string{"gid: has none, asked 3", "mode: has 0755, asked none", "uid: has 1, asked 2"})
}

func FuzzParse(f *testing.F) {
	for _, seed := range [][2]string{{"mode", "0755"}, {"uid", "1"}, {"on-remove", "keep"}, {"o", "bind"}, {"snapshot.x", ""}, {"\x00", "\xff"}} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		spec, err := Parse(map[string]string{name: value})
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\r\x00"), "%q", err)
			return
		}
		assert.Equal(t, spec.Given[name], value)
		if spec.Mode != nil {
			assert.Assert(t, *spec.Mode <= 0o7777)
		}
		for _, id := range []*uint32{spec.UID, spec.GID} {
			assert.Assert(t, id == nil || *id <= maxID)
		}
		assert.Assert(t, spec.OnRemove != nil || spec.UID != nil || spec.GID != nil || spec.Mode != nil, "taken without an effect")
	})
}
