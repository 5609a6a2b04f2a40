package options

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/keep"
)

func ptr[T any](v T) *T { return &v }

// given splits "a=b c=d"; a word without = has no value.
func given(words string) map[string]string {
	m := make(map[string]string)
	for word := range strings.FieldsSeq(words) {
		name, value, _ := strings.Cut(word, "=")
		m[name] = strings.ReplaceAll(value, "+", " ")
	}
	return m
}

func TestOptionsThatAreTaken(t *testing.T) {
	for words, want := range map[string]Spec{
		"":                   {},
		"on-remove=trash":    {OnRemove: ptr(Trash)},
		"on-remove=keep":     {OnRemove: ptr(Keep)},
		"on-remove=purge":    {OnRemove: ptr(Purge)},
		"uid=0":              {UID: ptr(uint32(0))},
		"gid=4294967294":     {GID: ptr(uint32(4294967294))},
		"mode=000":           {Mode: ptr(uint32(0))},
		"mode=755":           {Mode: ptr(uint32(0o755))},
		"mode=2770":          {Mode: ptr(uint32(0o2770))},
		"mode=01777":         {Mode: ptr(uint32(0o1777))},
		"root=fast":          {Root: "fast"},
		"engine=auto":        {},
		"engine=dir":         {Engine: "dir"},
		"engine=reflink":     {Engine: "reflink"},
		"engine=btrfs nocow": {Engine: "btrfs", NoCOW: true},
		"engine=image fs=ext4 sparse=true size=10G": {Engine: "image", FS: "ext4", Sparse: true, Size: 10 << 30},
		"engine=thin fs=xfs":                        {Engine: "thin", FS: "xfs"},
		"engine=auto fs=btrfs nocow=1":              {FS: "btrfs", NoCOW: true},
		"engine=dir sparse=false":                   {Engine: "dir"},
		"fs=btrfs":                                  {FS: "btrfs"},
		"owner=enforce uid=70":                      {OwnerEnforce: true, UID: ptr(uint32(70))},
		"ro nosuid= nodev=true noexec=1":            {ReadOnly: true, NoSUID: true, NoDev: true, NoExec: true},
		"ro=false nosuid=0 nodev=false noexec=0":    {},
		"from=web":                                  {From: &Source{Volume: "web"}},
		"from=web@monday-1 ro":                      {From: &Source{Volume: "web", Snapshot: "monday-1"}, ReadOnly: true},
		"seed=templates/wordpress":                  {Seed: "templates/wordpress"},
		"seed=web":                                  {Seed: "web"},
		"protect":                                   {Protect: true},
		"trash.keep=7d":                             {TrashKeep: ptr(7 * 24 * time.Hour)},
		"trash.keep=1w2d3h on-remove=trash":         {TrashKeep: ptr(9*24*time.Hour + 3*time.Hour), OnRemove: ptr(Trash)},
		"snapshot.schedule=@hourly":                 {Schedule: "@hourly"},
		"backup.schedule=@daily backup.target=nas":  {BackupSchedule: "@daily", BackupTarget: "nas"},
		"backup.keep=7d:4w":                         {BackupKeep: keep.Policy{Daily: 7, Weekly: 4}},
		"from-backup=nas/web":                       {FromBackup: "nas/web@latest"},
		"from-backup=nas/web@0123abcd ro":           {FromBackup: "nas/web@0123abcd", ReadOnly: true},
		"snapshot.schedule=@every+++6h":             {Schedule: "@every 6h"},
		"snapshot.schedule=30+3+*+*+mon-fri snapshot.keep=24h:7d:4w:12m": {Schedule: "30 3 * * mon-fri", Keep: keep.Policy{Hourly: 24, Daily: 7, Weekly: 4, Monthly: 12}},
		"snapshot.keep=10": {Keep: keep.Policy{Last: 10}},
		"exclusive":        {Exclusive: true},
		"exclusive=false":  {},
		"label.team=a label.com.example/x=y+z label.empty=":        {Labels: map[string]string{"team": "a", "com.example/x": "y z", "empty": ""}},
		"type=nfs device=nas:/export/v":                            {Share: &Share{Type: "nfs", Device: "nas:/export/v"}},
		"type=nfs4 device=[fd00::1]:/v":                            {Share: &Share{Type: "nfs4", Device: "[fd00::1]:/v"}},
		"type=nfs device=:/export o=addr=192.0.2.1,vers=4.2":       {Share: &Share{Type: "nfs", Device: ":/export", Options: "addr=192.0.2.1,vers=4.2"}},
		"type=cifs device=//nas/share/sub o=credentials=/etc/cred": {Share: &Share{Type: "cifs", Device: "//nas/share/sub", Options: "credentials=/etc/cred"}},
	} {
		spec, err := Parse(given(words))
		assert.NilError(t, err, words)
		want.Given = given(words)
		assert.DeepEqual(t, spec, want)
	}
	spec, err := Parse(nil)
	assert.NilError(t, err)
	assert.DeepEqual(t, spec, Spec{})
	m := given("uid=0")
	spec, err = Parse(m)
	assert.NilError(t, err)
	m["uid"] = "7"
	assert.Equal(t, spec.Given["uid"], "0", "the spec shares the caller's map")
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]uint64{
		"1048576": 1 << 20, "1m": 1 << 20, "512MiB": 512 << 20, "10G": 10 << 30, "10GB": 10 << 30, "1.5T": 3 << 39, "2 GiB": 2 << 30, "1024k": 1 << 20,
		"1073741825": 1<<30 + 1, "9007199254740992": 1 << 53, "8P": 1 << 53, "9007199254740991b": 1<<53 - 1,
	} {
		spec, err := Parse(map[string]string{"size": text})
		assert.NilError(t, err)
		assert.Equal(t, spec.Size, want, text)
	}
	for text, want := range map[string]string{
		"": "want a number", "0": "at least 1MiB", "1048575": "at least 1MiB", "-1G": "want a number", "+1G": "want a number", "1e9": "want a number",
		"0x10": "want a number", "ten": "want a number", "G": "want a number", "1GG": "want a number", "1 G B": "want a number", "1,5G": "want a number", "NaN": "want a number",
		"9007199254740994": "at most 8PiB", "9P": "at most 8PiB", "9999999999999999P": "at most 8PiB", "8192.1T": "at most 8PiB", "16384P": "at most 8PiB",
		"99999999999999999999": "want a number", "unlimited": "want a number", "10%": "want a number", "1.": "want a number", ".5G": "want a number",
	} {
		_, err := Parse(map[string]string{"size": text})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", text, err)
		assert.ErrorContains(t, err, want, text)
	}
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
		{"siez", "1G", `did you mean size?`},
		{"sizes", "1G", `did you mean size?`},
		{"RO", "", `did you mean ro?`},
		{"snapshot-keep", "1", `did you mean snapshot.keep?`},
		{"snapshot_schedule", "1", `did you mean snapshot.schedule?`},
		{"snapshots.keep", "1", `did you mean snapshot.keep?`},
		{"label:team", "x", `did you mean label.KEY?`},
		{"colour", "red", `unknown option "colour": allowed are backup.keep, backup.schedule, backup.target, device, engine, exclusive, from, from-backup, fs, gid, mode, nocow, nodev, noexec, nosuid, o, on-remove, owner, protect, ro, root, seed, size, snapshot.keep, snapshot.schedule, sparse, trash.keep, type, uid, label.KEY`},
		{"", "x", `unknown option "": allowed are`},
		{"x", "x", `unknown option "x": allowed are`},
		{"new\nline", "x", `unknown option "new\nline"`},
		{strings.Repeat("x", 5000), "x", "…"},

		{"driver", "devicemapper", `option "driver" is not taken: the driver is chosen by`},
		{"driver", "vfs", `use engine`},
		{"backup", "s3://b@r/?backup=1", `use from-backup=TARGET/VOLUME`},
		{"vm", "true", `virtual machines are not supported`},
		{"iops", "100", `convoy's volumes in a cloud`},
		{"id", "vol-1", `convoy's volumes in a cloud`},
		{"endpoint", "x", `docker berth target add`},
		{"mountpoint", "/data", `docker berth volume adopt`},
		{"readonly", "true", `use ro`},

		{"ro", "yes", `option ro="yes": want true, false, 1 or 0`},
		{"protect", "True", `option protect="True"`},
		{"engine", "zfs", `option engine="zfs": want auto, dir, reflink, btrfs, image or thin`},
		{"engine", "", `option engine=""`},
		{"fs", "zfs", `want btrfs, xfs or ext4`},
		{"owner", "root", `option owner="root": want enforce`},
		{"owner", "enforce", `nothing to enforce without uid, gid or mode`},
		{"root", "/srv/data", `want the name of a volume root`},
		{"root", "", `want the name`},
		{"root", "..", `want the name`},
		{"from", "", `want VOLUME or VOLUME@SNAPSHOT`},
		{"from", "web@", `option from="web@"`},
		{"from", "@monday", `option from="@monday"`},
		{"from", "a@b@c", `option from="a@b@c"`},
		{"from", "../x", `option from="../x"`},
		{"from", "web@" + strings.Repeat("s", 101), `option from=`},
		{"from", strings.Repeat("s", 201), `option from=`},
		{"seed", "/etc", `want a path below the volume root`},
		{"seed", "../x", `want a path`},
		{"seed", "a/../b", `want a path`},
		{"seed", "a//b", `want a path`},
		{"seed", "a/", `want a path`},
		{"seed", ".", `want a path`},
		{"seed", "", `want a path`},
		{"seed", "a\x00b", `want a path`},
		{"seed", ".berth/volumes", `Berth's own`},
		{"trash.keep", "0", `want more than 0; on-remove=purge`},
		{"trash.keep", "-7d", `want a duration`},
		{"trash.keep", "7", `want a duration`},
		{"trash.keep", "week", `want a duration`},
		{"snapshot.schedule", "", `option snapshot.schedule="": is empty`},
		{"snapshot.schedule", "hourly", `want @hourly, @daily`},
		{"snapshot.schedule", "@reboot", `want @hourly`},
		{"snapshot.schedule", "@every 1s", `1m to 10 years`},
		{"snapshot.schedule", "0 0 30 2 *", `there is no such date`},
		{"snapshot.schedule", "* * * * * *", `exactly 5 fields`},
		{"snapshot.schedule", "TZ=Europe/Berlin 0 0 * * *", `times are UTC`},
		{"snapshot.keep", "", `option snapshot.keep=""`},
		{"snapshot.keep", "24x", `want a number`},
		{"snapshot.keep", "1h:2h", `such a part already`},
		{"label.", "x", `want label.KEY=VALUE`},
		{"label", "x", `want label.KEY=VALUE`},
		{"label.a b", "x", `want label.KEY=VALUE`},
		{"label.a", "x\ny", `printable`},
		{"label." + strings.Repeat("k", 129), "x", `want label.KEY=VALUE`},
		{"label.a", strings.Repeat("v", 4097), `at most 4096`},

		{"type", "tmpfs", `--tmpfs PATH`},
		{"type", "none", `bind mounts of host directories`},
		{"type", "smb3", `did you mean cifs?`},
		{"type", "ext4", `want nfs, nfs4 or cifs; disks are mounted`},
		{"type", "gp2", `convoy's EBS`},
		{"type", "ceph", `want nfs, nfs4 or cifs`},
		{"type", "nfs", `it needs device=, as HOST:/PATH`},
		{"type", "cifs", `it needs device=, as //HOST/SHARE`},
		{"device", "nas:/export", `option device="nas:/export": it needs type=nfs`},
		{"o", "vers=4.2", `option o="vers=4.2": it needs type=nfs`},
		{"o", "vers=4\n", `printable`},
	} {
		spec, err := Parse(map[string]string{tc.name: tc.value})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s=%s: %v", tc.name, tc.value, err)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, spec.Given == nil)
		assert.Assert(t, len(err.Error()) < 500 && !strings.Contains(err.Error(), "\n"), "%s", err)
	}
}

func TestOptionsThatContradictEachOther(t *testing.T) {
	for words, want := range map[string]string{
		"root=fast type=nfs device=nas:/e":      `options root="fast" and type="nfs" contradict each other: a share is a root of its own`,
		"fs=xfs engine=dir":                     `options fs="xfs" and engine="dir" contradict each other`,
		"fs=xfs engine=btrfs":                   `for the engines image and thin`,
		"sparse engine=reflink":                 `options sparse="" and engine="reflink"`,
		"nocow fs=ext4":                         `it is for btrfs`,
		"from=a seed=b":                         `options from="a" and seed="b"`,
		"trash.keep=1d on-remove=purge":         `options trash.keep="1d" and on-remove="purge"`,
		"trash.keep=1d on-remove=keep":          `does not get into the trash`,
		"type=nfs device=/export":               `option device="/export": it names no server; want HOST:/PATH, or :/PATH with o=addr=HOST for type=nfs`,
		"type=nfs device=:/export":              `option device=":/export"`,
		"type=nfs device=:/export o=addr=":      `option o=addr="": want a host`,
		"type=nfs device=nas:/a/../b":           `option device="nas:/a/../b"`,
		"type=cifs device=nas:/export":          `want //HOST/SHARE for type=cifs`,
		"type=cifs device=//nas/":               `want //HOST/SHARE`,
		"type=tmpfs device=tmpfs o=size=1m":     `--tmpfs PATH`,
		"type=none device=/srv/data o=bind":     `option device="/srv/data": bind mounts of host directories`,
		"type=none device=/srv/data o=ro,rbind": `option device="/srv/data": bind mounts of host directories`,
		"type=nfs device=nas:/x o=bind":         `bind mounts of host directories`,
		"type=none o=bind":                      `option o="bind": bind mounts of host directories`,
	} {
		_, err := Parse(given(words))
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", words, err)
		assert.ErrorContains(t, err, want, words)
	}
}

func TestMessagesHoldNoPassword(t *testing.T) {
	for _, words := range []string{
		"o=username=x,password=secret", "type=cifs o=pass=secret,bind device=//a/b", "type=cifs o=password=secret", "type=cifs device=//a o=password=secret", "type=none device=/x o=password=secret,bind",
	} {
		_, err := Parse(given(words))
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", words, err)
		assert.Assert(t, !strings.Contains(err.Error(), "secret"), "%s", err)
	}
	spec, err := Parse(given("type=cifs device=//a/b o=password=x,,bind"))
	assert.NilError(t, err)
	assert.Equal(t, spec.Share.Options, "password=x,,bind")
}

// A record is read up to a limit, and what a user typed must not exceed it.
func TestOptionsAreBoundedTogether(t *testing.T) {
	m := make(map[string]string)
	for _, key := range []string{"a", "b", "c"} {
		m["label."+key] = strings.Repeat("x", 3000)
	}
	_, err := Parse(m)
	assert.Assert(t, errdefs.IsInvalidArgument(err))
	assert.ErrorContains(t, err, "at most 8192")
	delete(m, "label.c")
	_, err = Parse(m)
	assert.NilError(t, err)
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
	assert.DeepEqual(t, Differences(given("ro size=1G"), given("protect=true")),
		[]string{"protect: has none, asked true", `ro: has "", asked none`, "size: has 1G, asked none"})
}

func TestDifferencesAreOfMeaning(t *testing.T) {
	for has, asked := range map[string]string{
		"mode=750":                      "mode=0750",
		"size=1G":                       "size=1073741824",
		"uid=07":                        "uid=7",
		"ro":                            "ro=true",
		"protect=1":                     "protect=true",
		"ro=false":                      "",
		"engine=auto":                   "",
		"o=":                            "",
		"snapshot.keep=7d:24h":          "snapshot.keep=24h:7d",
		"snapshot.keep=10":              "snapshot.keep=n=10",
		"trash.keep=7d":                 "trash.keep=168h",
		"snapshot.schedule=@every+6h":   "snapshot.schedule=@every++6h",
		"future=1":                      "future=1",
		"type=nfs device=nas:/x o=soft": "device=nas:/x o=soft type=nfs",
	} {
		assert.DeepEqual(t, Differences(given(has), given(asked)), []string(nil))
		assert.DeepEqual(t, Differences(given(asked), given(has)), []string(nil))
	}
	for has, asked := range map[string]string{
		"mode=750": "mode=0751", "size=1G": "size=1GiB1", "future=1": "future=2", "protect": "protect=false", "engine=dir": "engine=auto", "exclusive=false": "exclusive",
		"from=a": "from=a@b", "label.a=": "", "label.a=1": "label.a=2", "seed=a": "seed=b", "root=a": "", "uid=0": "", "owner=enforce": "",
	} {
		assert.Equal(t, len(Differences(given(has), given(asked))), 1, has)
		assert.Equal(t, len(Differences(given(asked), given(has))), 1, has)
	}
}

func FuzzParse(f *testing.F) {
	for _, option := range table() {
		f.Add(option.name, "")
	}
	for _, seed := range [][2]string{
		{"mode", "0755"}, {"uid", "1"}, {"on-remove", "keep"}, {"o", "bind"}, {"snapshot.x", ""}, {"\x00", "\xff"}, {"size", "8.5P"}, {"size", "1 GiB"},
		{"from", "a@b"}, {"seed", "a/b"}, {"trash.keep", "1w1d1h"}, {"snapshot.schedule", "*/5 1-2 * jan sun"}, {"snapshot.schedule", "TZ="}, {"snapshot.keep", "1:2h"}, {"label.a", "é"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		given := map[string]string{name: value}
		assert.Equal(t, len(Differences(given, maps.Clone(given))), 0)
		_ = Differences(given, nil)
		spec, err := Parse(given)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\r\x00"), "%q", err)
			assert.Assert(t, len(err.Error()) < 800)
			return
		}
		assert.Equal(t, spec.Given[name], value)
		assert.Assert(t, spec.Mode == nil || *spec.Mode <= 0o7777)
		for _, id := range []*uint32{spec.UID, spec.GID} {
			assert.Assert(t, id == nil || *id <= maxID)
		}
		assert.Assert(t, spec.Size == 0 || spec.Size >= MinSize && spec.Size <= MaxSize)
		assert.Assert(t, spec.TrashKeep == nil || *spec.TrashKeep > 0)
		if spec.From != nil {
			assert.Equal(t, spec.From.String(), value)
		}
		for _, option := range table() {
			if option.name == name {
				return
			}
		}
		assert.Equal(t, len(spec.Labels), 1, "taken without an effect")
	})
}

// Several options at once, as users give them.
func FuzzParseTogether(f *testing.F) {
	f.Add("type=nfs\ndevice=:/x\no=addr=h,ro\nsize=1G")
	f.Add("type=none\ndevice=/x\no=bind")
	f.Add("engine=image\nfs=xfs\nsparse=\nnocow=false")
	f.Add("from=a@b\nseed=c\ntrash.keep=1h\non-remove=keep")
	f.Fuzz(func(t *testing.T, lines string) {
		given := make(map[string]string)
		for line := range strings.SplitSeq(lines, "\n") {
			name, value, _ := strings.Cut(line, "=")
			given[name] = value
		}
		assert.Equal(t, len(Differences(given, maps.Clone(given))), 0)
		spec, err := Parse(given)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			return
		}
		assert.Assert(t, spec.Share == nil || spec.Root == "" && spec.Share.Device != "" && !isBind(spec.Share.Options))
		assert.Assert(t, spec.From == nil || spec.Seed == "")
		assert.Assert(t, !spec.OwnerEnforce || spec.UID != nil || spec.GID != nil || spec.Mode != nil)
		imageless := spec.Engine != "" && spec.Engine != "image" && spec.Engine != "thin"
		assert.Assert(t, !imageless || spec.FS == "" && !spec.Sparse)
	})
}
