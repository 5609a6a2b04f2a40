package lab

import (
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
	"gotest.tools/v3/assert"
)

func TestDiffCountsRepetitionButNotOrder(t *testing.T) {
	before := Snapshot{"links": {"lo", "eth0"}, "mounts": {"/a", "/b"}, "iptables-nft": {"-A X", "-A X"}}
	after := Snapshot{"links": {"eth0", "lo", "lo"}, "mounts": {"/b"}, "iptables-nft": {"-A X"}, "volumes": {"v1"}}
	assert.DeepEqual(t, before.Diff(after), []string{
		"- iptables-nft: -A X",
		"+ links: lo",
		"+ volumes: v1",
	})
	assert.Equal(t, len(before.Diff(before)), 0)
}

func TestProbesKeepWhatIdentifiesAndDropWhatMoves(t *testing.T) {
	for _, c := range []struct {
		name string
		keep func(string) string
		line string
		want string
	}{
		{"link", linkName, `12: veth0@if11: <BROADCAST> mtu 1500 master br0`, "veth0"},
		{"mount", mountEntry, `36 35 98:0 /vol/x /mnt/x rw,noatime shared:1 - ext4 /dev/vda rw`, "/mnt/x from /vol/x type ext4"},
		{"kernel route", routeEntry, `local 10.0.0.1 dev br0 table local proto kernel scope host`, ""},
		{"route", routeEntry, `default via 10.0.0.1 dev eth0 linkdown `, "default via 10.0.0.1 dev eth0"},
		{"header", processName, "COMMAND", ""},
		{"process", processName, " dockerd ", "dockerd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			assert.Equal(t, c.keep(c.line), c.want)
		})
	}
}

func TestRulesetLinesCarryTableAndChain(t *testing.T) {
	text := `table ip nat {
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
	}
}
table inet berth {
	map ports {
		type inet_service : verdict
		elements = { 80 : accept }
	}
	chain forward {
		accept
	}
}
`
	assert.DeepEqual(t, rulesetEntries(text), []string{
		"table inet berth",
		"table inet berth / map ports",
		"table inet berth / map ports / type inet_service : verdict",
		"table inet berth / map ports / elements = { 80 : accept }",
		"table inet berth / chain forward",
		"table inet berth / chain forward / accept",
	})
}

func TestKeysAreCountedWhileTheOwnerHoldsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db, err := bbolt.Open(path, 0o600, nil)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, db.Close()) })
	err = db.Update(func(tx *bbolt.Tx) error {
		for name, keys := range map[string][]string{"meta": {"version"}, "empty": nil, "networks": {"a", "b"}} {
			b, err := tx.CreateBucket([]byte(name))
			if err != nil {
				return err
			}
			for _, k := range keys {
				if err := b.Put([]byte(k), []byte("{}")); err != nil {
					return err
				}
			}
		}
		return nil
	})
	assert.NilError(t, err)
	counts, err := countKeys(path)
	assert.NilError(t, err)
	assert.DeepEqual(t, counts, []string{"networks: 2 keys"})
}
