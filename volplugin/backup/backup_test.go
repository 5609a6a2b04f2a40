package backup_test

import (
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
)

func at(text string) time.Time {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		panic(err)
	}
	return t
}

func TestReferencesAreReadAsTheyAreWritten(t *testing.T) {
	for text, want := range map[string]backup.Reference{
		"nas/web":                               {Target: "nas", Volume: "web", Pick: "latest"},
		"nas/web@latest":                        {Target: "nas", Volume: "web", Pick: "latest"},
		"nas/web@2026-01-31":                    {Target: "nas", Volume: "web", Pick: "2026-01-31"},
		"nas/web@2026-01-31T12:00:00Z":          {Target: "nas", Volume: "web", Pick: "2026-01-31T12:00:00Z"},
		"nas/web@2026-01-31T12:00:00+02:00":     {Target: "nas", Volume: "web", Pick: "2026-01-31T12:00:00+02:00"},
		"n.a-s_1/w.e-b_1@0123abcd":              {Target: "n.a-s_1", Volume: "w.e-b_1", Pick: "0123abcd"},
		"nas/web@" + strings.Repeat("0f", 32):   {Target: "nas", Volume: "web", Pick: strings.Repeat("0f", 32)},
		"nas/" + strings.Repeat("w", 200):       {Target: "nas", Volume: strings.Repeat("w", 200), Pick: "latest"},
		strings.Repeat("n", 63) + "/web@latest": {Target: strings.Repeat("n", 63), Volume: "web", Pick: "latest"},
	} {
		ref, err := backup.ParseReference(text)
		assert.NilError(t, err, text)
		assert.Equal(t, ref, want)
		again, err := backup.ParseReference(ref.String())
		assert.NilError(t, err, text)
		assert.Equal(t, again, want)
	}
	for _, text := range []string{
		"", "/", "nas", "nas/", "/web", "nas/web@", "nas/web@yesterday", "nas/web@0123abc", "nas/web@0123ABCD", "nas/web/x",
		"nas/web@" + strings.Repeat("0", 65), "-nas/web", "nas/.web", "nas/we b", "nas/web@2026-02-30", "nas/web@latest@latest",
		strings.Repeat("n", 64) + "/web", "nas/" + strings.Repeat("w", 201), "nas/web\n",
	} {
		_, err := backup.ParseReference(text)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", text, err)
		assert.ErrorContains(t, err, "TARGET/VOLUME")
	}
}

func FuzzReferences(f *testing.F) {
	for _, text := range []string{"nas/web", "nas/web@latest", "nas/web@2026-01-31", "a/b@0123abcd", "@/@"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ref, err := backup.ParseReference(text)
		if err != nil {
			return
		}
		again, err := backup.ParseReference(ref.String())
		assert.NilError(t, err)
		assert.Equal(t, again, ref)
	})
}

func TestReferencesPickOneBackup(t *testing.T) {
	list := []backup.Backup{
		{ID: "aaaaaaaa11", Volume: "web", Time: at("2026-01-30T10:00:00Z")},
		{ID: "bbbbbbbb22", Volume: "web", Time: at("2026-01-31T10:00:00Z")},
		{ID: "cccccccc33", Volume: "web", Time: at("2026-02-01T10:00:00Z"), Incomplete: true},
		{ID: "dddddddd44", Volume: "db", Time: at("2026-03-01T10:00:00Z")},
		{ID: "aaaaaaaa55", Volume: "web", Time: at("2026-01-01T10:00:00Z")},
	}
	for pick, want := range map[string]string{
		"latest": "bbbbbbbb22", "2026-01-31": "bbbbbbbb22", "2026-01-30": "aaaaaaaa11", "2026-01-31T09:59:59Z": "aaaaaaaa11",
		"2026-01-31T10:00:00Z": "bbbbbbbb22", "2026-12-31": "bbbbbbbb22", "cccccccc": "cccccccc33", "aaaaaaaa5": "aaaaaaaa55",
	} {
		got, err := backup.Reference{Target: "nas", Volume: "web", Pick: pick}.Select(list)
		assert.NilError(t, err, pick)
		assert.Equal(t, got.ID, want, pick)
	}
	for pick, kind := range map[string]func(error) bool{
		"aaaaaaaa": errdefs.IsInvalidArgument, "dddddddd": errdefs.IsNotFound, "2025-12-31": errdefs.IsNotFound,
	} {
		_, err := backup.Reference{Target: "nas", Volume: "web", Pick: pick}.Select(list)
		assert.Assert(t, kind(err), "%s: %v", pick, err)
	}
}

// Volumes of one name are told apart by who made their backups, and when.
func TestLatestOfTwoVolumesOfAName(t *testing.T) {
	at := func(day int) time.Time { return time.Date(2026, 1, day, 3, 0, 0, 0, time.UTC) }
	made := func(uuid, host string, days ...int) (list []backup.Backup) {
		for _, day := range days {
			list = append(list, backup.Backup{ID: fmt.Sprintf("%s%02d", strings.Repeat(uuid, 8), day), Volume: "db", UUID: uuid, Host: host, Time: at(day)})
		}
		return list
	}
	part := func(list []backup.Backup) []backup.Backup {
		for i := range list {
			list[i].Incomplete = true
		}
		return list
	}
	for name, tc := range map[string]struct {
		list []backup.Backup
		pick string
		want string // the ID, or both that the error names
	}{
		"one volume on two hosts":                     {slices.Concat(made("a", "one", 1, 3), made("a", "two", 2, 4)), "latest", "aaaaaaaa04"},
		"moved":                                       {slices.Concat(made("a", "one", 1, 2, 3), made("b", "two", 4, 5)), "latest", "bbbbbbbb05"},
		"moved, and asked for what was before":        {slices.Concat(made("a", "one", 1, 2, 3), made("b", "two", 4, 5)), "2026-01-03", "aaaaaaaa03"},
		"moved, and the last backup is incomplete":    {slices.Concat(made("a", "one", 1, 2, 3), made("b", "two", 4), part(made("b", "two", 5))), "latest", "bbbbbbbb04"},
		"made anew on the same host":                  {slices.Concat(made("a", "one", 1, 2, 4), made("b", "one", 3, 5)), "latest", "bbbbbbbb05"},
		"two hosts, each its own":                     {slices.Concat(made("a", "one", 1, 2, 3, 4), made("b", "two", 2, 3, 5)), "latest", "nas/db@bbbbbbbb (host two, 2026-01-05T03:00:00Z) or nas/db@aaaaaaaa (host one, 2026-01-04T03:00:00Z)"},
		"two hosts, in the same second":               {slices.Concat(made("a", "one", 1), made("b", "two", 1)), "latest", "nas/db@aaaaaaaa (host one, 2026-01-01T03:00:00Z) or nas/db@bbbbbbbb (host two, 2026-01-01T03:00:00Z)"},
		"two hosts, before the second one began":      {slices.Concat(made("a", "one", 1, 2, 3, 4), made("b", "two", 2, 3, 5)), "2026-01-01", "aaaaaaaa01"},
		"two hosts, after":                            {slices.Concat(made("a", "one", 1, 2, 3, 4), made("b", "two", 2, 3, 5)), "2026-01-03T03:00:00Z", "nas/db@"},
		"two hosts, of which one has incomplete ones": {slices.Concat(made("a", "one", 1, 3), part(made("b", "two", 2, 4))), "latest", "aaaaaaaa03"},
		"two hosts, and an ID":                        {slices.Concat(made("a", "one", 1, 2, 3, 4), made("b", "two", 2, 3, 5)), "aaaaaaaa04", "aaaaaaaa04"},
		"moved away from two of which one was it":     {slices.Concat(made("a", "one", 1, 3), made("b", "two", 2, 4), made("c", "three", 5)), "latest", "cccccccc05"},
	} {
		t.Run(name, func(t *testing.T) {
			ref := backup.Reference{Target: "nas", Volume: "db", Pick: tc.pick}
			for range 2 {
				got, err := ref.Select(tc.list)
				if strings.HasPrefix(tc.want, "nas/") {
					assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
					assert.ErrorContains(t, err, tc.want)
				} else {
					assert.NilError(t, err)
					assert.Equal(t, got.ID, tc.want)
				}
				slices.Reverse(tc.list)
			}
		})
	}
}

// good is a target that nothing is wrong with.
func good() backup.Target {
	return backup.Target{
		Name: "nas", Repository: "s3:https://key:hunter2@s3.example/bucket", Password: "correct horse",
		Environment: map[string]string{"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s3cret/key"},
	}
}

func TestTargetsThatCannotBe(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	assert.NilError(t, err)
	block, err := ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte("a phrase"))
	assert.NilError(t, err)
	locked := string(pem.EncodeToMemory(block))
	assert.NilError(t, good().Check())
	rest := good()
	rest.Environment = map[string]string{"RESTIC_REST_PASSWORD": "x"}
	assert.NilError(t, rest.Check())
	for want, change := range map[string]func(*backup.Target){
		"want at most 63 letters":           func(t *backup.Target) { t.Name = "../x" },
		"a password is needed":              func(t *backup.Target) { t.Password = "" },
		"more than one line":                func(t *backup.Target) { t.Password = "a\nb" },
		"without .pub":                      func(t *backup.Target) { t.Files = map[string]string{backup.SSHKey: "ssh-ed25519 AAAA me@here"} },
		"want certificates in PEM":          func(t *backup.Target) { t.Files = map[string]string{backup.CACert: "x"} },
		"the key has a passphrase":          func(t *backup.Target) { t.Files = map[string]string{backup.SSHKey: locked} },
		`engine "borg"`:                     func(t *backup.Target) { t.Engine = "borg" },
		"does not encrypt":                  func(t *backup.Target) { t.Engine = "archive" },
		"want an absolute path without":     func(t *backup.Target) { t.Repository = "/backup/../etc" },
		"takes an absolute path, or one of": func(t *backup.Target) { t.Repository = "ftp:host" },
		"want a path or KIND:PLACE":         func(t *backup.Target) { t.Repository = "-o=x" },
		"variable RESTIC_PASSWORD cannot":   func(t *backup.Target) { t.Environment["RESTIC_PASSWORD"] = "x" },
		"variable LD_PRELOAD cannot":        func(t *backup.Target) { t.Environment["LD_PRELOAD"] = "/x" },
		"want capital letters":              func(t *backup.Target) { t.Environment["a=b"] = "/x" },
		"give the file itself":              func(t *backup.Target) { t.Environment["RCLONE_CONFIG"] = "/x" },
		"has a byte 0":                      func(t *backup.Target) { t.Environment["B2_ACCOUNT_ID"] = "\x00" },
		`file "passwd"`:                     func(t *backup.Target) { t.Files = map[string]string{"passwd": "x"} },
		"upload limit -1":                   func(t *backup.Target) { t.UploadLimit = -1 },
		`prune schedule "sometimes"`:        func(t *backup.Target) { t.PruneSchedule = "sometimes" },
		"check share 1.5":                   func(t *backup.Target) { t.CheckShare = 1.5 },
	} {
		target := good()
		change(&target)
		err := target.Check()
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", want, err)
		assert.ErrorContains(t, err, want)
		for _, secret := range good().Secrets() {
			assert.Assert(t, !strings.Contains(err.Error(), secret), "%s holds %s", err, secret)
		}
	}
}

func TestFormsOfRepositories(t *testing.T) {
	check := func(repository string) error {
		target := good()
		target.Repository = repository
		return target.Check()
	}
	for _, repository := range []string{
		"/backup/nas", "local:/backup/nas", "sftp:berth@nas:/volume1/restic", "sftp:nas:restic", "sftp:d@o@nas:/x", "sftp://nas//x", "sftp://me@[::1]:2222//srv/x",
		"sftp://me@nas/x", "rest:https://nas/", "rest:http://127.0.0.1:8000", "rest:https://me:word@nas:8000/me/", "rest:http+unix:///run/rest.sock:/x/",
		"s3:https://s3.example.org/backups", "s3:s3.amazonaws.com/bucket/path", "s3://host/bucket", "s3:http://127.0.0.1:9000/bucket/a/b", "b2:bucket", "b2:bucket:path",
		"azure:container:/", "gs:bucket:/x", "swift:container:/x", "rclone:b2prod:yggdrasil/foo",
	} {
		assert.NilError(t, check(repository))
	}
	for repository, want := range map[string]string{
		"": "want a path or", "backup": "want an absolute path", "/": "want an absolute path", "/backup/": "want an absolute path", "nas:/x": "takes an absolute path, or one of",
		"https://nas/x": "takes an absolute path, or one of", "sftp:": "want sftp:USER", "sftp:nas": "want sftp:USER", "sftp:/x": "want sftp:USER", "sftp://me@/x": "want sftp:USER",
		"sftp://nas": "want sftp:USER", "rest:": "want rest:https", "rest:nas": "want rest:https", "rest:https://": "want rest:https", "rest:ftp://nas/": "want rest:https",
		"rest:https://me@/": "want rest:https", "s3:": "want s3:https", "s3:bucket": "want s3:https", "s3:https://host": "want s3:https", "s3:https:///bucket": "want s3:https",
		"b2:": "want b2:", "azure:x": "want azure:", "gs:": "want gs:", "swift:x:y": "want swift:", "rclone:": "want rclone:",
	} {
		err := check(repository)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", repository, err)
		assert.ErrorContains(t, err, want, repository)
	}
}

func TestPasswordsInURLsAreNotShown(t *testing.T) {
	for repository, want := range map[string]string{
		"/backup/restic":                         "/backup/restic",
		"rest:https://joe:hunter2@host:8000/r":   "rest:https://joe:xxxxx@host:8000/r",
		"rest:https://host/":                     "rest:https://host/",
		"sftp:joe@host:/r":                       "sftp:joe@host:/r",
		"rest:https://joe:hun%zzter2@host:8000/": "rest:…",
	} {
		assert.Equal(t, backup.Redact(repository), want)
	}
}

func TestTargetsAreKeptInFilesForTheirOwnerOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "targets")
	targets, err := backup.OpenTargets(dir)
	assert.NilError(t, err)
	assert.NilError(t, targets.Put(good()))
	info, err := os.Stat(filepath.Join(dir, "nas.json"))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode(), os.FileMode(0o600))
	got, err := targets.Get("nas")
	assert.NilError(t, err)
	assert.DeepEqual(t, got, good())

	// What an administrator puts there is a target too.
	write := func(name, text string, mode os.FileMode) {
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), mode))
		assert.NilError(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	write("disk.json", `{"repository": "/backup/disk", "password": "x y"}`, 0o400)
	write("open.json", `{"repository": "/backup/disk", "password": "x y"}`, 0o644)
	write("typo.json", `{"repositry": "/backup/disk", "password": "x y"}`, 0o600)
	write("notes.txt", "", 0o600)
	write(".hidden.json", "", 0o600)
	names, err := targets.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{"disk", "nas", "open", "typo"})
	_, err = targets.Get("disk")
	assert.NilError(t, err)
	_, err = targets.Get("open")
	assert.ErrorContains(t, err, "has mode 0644 and may hold secrets: want 0600")
	_, err = targets.Get("typo")
	assert.ErrorContains(t, err, `unknown field "repositry"`)

	assert.NilError(t, targets.Delete("nas"))
	assert.Assert(t, errdefs.IsNotFound(targets.Delete("nas")))
	_, err = targets.Get("nas")
	assert.Assert(t, errdefs.IsNotFound(err))
	_, err = targets.Get("../state")
	assert.Assert(t, errdefs.IsInvalidArgument(err))
}

func TestManifestsAreReadAgain(t *testing.T) {
	m := backup.Manifest{Volume: "web", UUID: "u", Options: map[string]string{"size": "1G"}, Engine: "btrfs", Time: at("2026-01-31T10:00:00Z"), Consistency: "crash"}
	text, err := m.Encode()
	assert.NilError(t, err)
	got, err := backup.DecodeManifest(text)
	assert.NilError(t, err)
	m.Schema = 1
	assert.DeepEqual(t, got, m)
	for want, text := range map[string]string{
		"schema 2": `{"schema": 2}`, "schema 0": `{}`, "damaged": "x", "at most": strings.Repeat(" ", 1<<20),
	} {
		_, err := backup.DecodeManifest([]byte(text))
		assert.ErrorContains(t, err, want)
	}
}

func FuzzManifest(f *testing.F) {
	text, _ := backup.Manifest{Volume: "web"}.Encode()
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := backup.DecodeManifest(text)
		if err != nil {
			return
		}
		fields, err := m.Fields()
		assert.NilError(t, err)
		_, err = json.Marshal(fields)
		assert.NilError(t, err)
	})
}
