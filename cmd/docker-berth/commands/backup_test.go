package commands

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/cli/cli"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"

	"github.com/berth-plugin/berth/shared/control"
)

// What a user sees, word for word. The files are made by go test -update.
func TestBackupOutput(t *testing.T) {
	for name, args := range map[string]string{
		"target-ls":             "target ls",
		"target-ls-quiet":       "target ls -q --filter engine=restic",
		"target-ls-template":    "target ls --format table_{{.Name}}\\t{{.Prune}}\\t{{.NextPrune}}\\t{{.Check}}\\t{{.CheckShare}}\\t{{.Variables}}\\t{{.Files}}\\t{{.UploadLimit}}\\t{{.Error}}",
		"target-inspect":        "target inspect s3 --format {{.Repository}}|{{.Variables}}|{{.Check.LastError}}",
		"target-test":           "target test nas",
		"backup-ls":             "backup ls",
		"backup-ls-volume":      "backup ls db --filter status=ok --filter tag=nightly -q",
		"backup-ls-template":    "backup ls --target s3 --no-trunc --format {{.Reference}}|{{.Target}}|{{.UUID}}|{{.Tags}}",
		"backup-inspect":        "backup inspect nas/db@latest",
		"backup-prune-dry-run":  "backup prune -n",
		"backup-verify":         "backup verify nas",
		"backup-verify-backup":  "backup verify nas/db@11111111",
		"volume-ls-backup":      "volume ls --filter name=db --format {{.BackupTarget}}|{{.BackupSchedule}}|{{.BackupKeep}}|{{.NextBackup}}|{{.LastBackup}}|{{.BackupError}}",
		"volume-inspect-backup": "volume inspect db --format {{.Backup.Target}}|{{.Backup.Good}}",
	} {
		t.Run(name, func(t *testing.T) { golden.Assert(t, newShelf(t).run(words(args)...), name+".golden") })
	}
}

func TestBackupJSONIsOneObjectForEachLine(t *testing.T) {
	w := newShelf(t)
	w.wantJSONLines("target ls", "backup ls")
}

// Each of these is one request to the daemon, with all that the user said, and prints
// what it made.
func TestBackupRequests(t *testing.T) {
	first := "nas/db@11111111"
	for _, c := range []struct {
		args, out string
		want      any
	}{
		{"target test nas", "nas: opened in 1.234s, 3 backups of 1 volume\n", control.TargetRef{Name: "nas"}},
		{"target rm -f s3", "s3\n", control.TargetRef{Name: "s3"}},
		{"backup create db", first + "\n", control.BackupRequest{Volume: "db"}},
		{
			"backup create db@before --target s3 --tag a --tag b-1 --full", first + "\n",
			control.BackupRequest{Volume: "db", Snapshot: "before", Target: "s3", Tags: []string{"a", "b-1"}, Full: true},
		},
		{"backup rm nas/db@" + backupID("2") + " " + first, "nas/db@" + backupID("2") + "\n" + first + "\n", control.RemoveBackupsRequest{References: []string{"nas/db@" + backupID("2"), first}}},
		{
			"backup prune --target nas --volume db --keep 7d --all --force", "nas/db@22222222\n",
			control.PruneBackupsRequest{Target: "nas", Volume: "db", Keep: "7d", All: true},
		},
		{"backup verify nas", "nas: no errors\n", control.VerifyRequest{Target: "nas"}},
		{"backup verify nas --read-data 12.5%", "nas: no errors\n", control.VerifyRequest{Target: "nas", Share: 0.125}},
		{"backup verify nas --read-data 100", "nas: no errors\n", control.VerifyRequest{Target: "nas", Share: 1}},
		{"backup verify nas/db", first + ": restored and compared, 1200 files, 1.5GiB\n", control.VerifyRequest{Reference: "nas/db"}},
		{"backup restore nas/gone", "gone\n", control.RestoreRequest{Reference: "nas/gone", Name: "gone"}},
		{
			"backup restore nas/db@2026-11-26 copy --path /etc/ --path var//lib/./a -o size=1G -o protect=true", "copy\n",
			control.RestoreRequest{Reference: "nas/db@2026-11-26", Name: "copy", Paths: []string{"etc", "var/lib/a"}, Options: map[string]string{"size": "1G", "protect": "true"}},
		},
		{"backup restore nas/files9 --in-place", "files9@pre-restore-1\n", control.RestoreRequest{Reference: "nas/files9", Name: "files9", InPlace: true}},
		{"backup restore nas/db files9 --in-place", "files9@pre-restore-1\n", control.RestoreRequest{Reference: "nas/db", Name: "files9", InPlace: true}},
		{
			"backup restore nas/db files9 --in-place --path etc/app.conf", "files9@pre-restore-1\n",
			control.RestoreRequest{Reference: "nas/db", Name: "files9", InPlace: true, Paths: []string{"etc/app.conf"}},
		},
		{
			"volume set db backup.schedule=@daily backup.target=nas backup.keep=7d:4w", "db\n",
			control.UpdateRequest{Volume: "db", Set: map[string]string{"backup.schedule": "@daily", "backup.target": "nas", "backup.keep": "7d:4w"}},
		},
	} {
		w := newShelf(t)
		assert.Equal(t, w.run(words(c.args)...), c.out, c.args)
		assert.DeepEqual(t, w.shelf.got, []any{c.want})
	}
}

// What the command refuses changes nothing, and the text says what to do.
func TestBackupRefusals(t *testing.T) {
	for args, want := range map[string]string{
		"target add a/b /r":                                  `target "a/b": want at most 63 letters`,
		"target add a /r --engine tar":                       `--engine "tar": want restic or archive`,
		"target add a /r --limit-upload 500":                 `--limit-upload "500": want a number with a unit`,
		"target add a /r --limit-download 10b":               `--limit-download "10b": want a number with a unit`,
		"target add a /r --limit-download fast":              `--limit-download "fast": want a number with a unit`,
		"target add a /r --check-share 101":                  `--check-share "101": want a number from 0 to 100`,
		"target add a /r --check-share NaN":                  `--check-share "NaN": want a number from 0 to 100`,
		"target add a /r":                                    "there is no terminal to ask on: want --password-file FILE",
		"target add a /r --password-file -":                  "--password-file -: there is no password in it",
		"target add a /r --password-file /nosuch":            "--password-file /nosuch: no such file or directory",
		"target add a /r --password-file x --engine archive": "--password-file x: the engine archive does not encrypt",
		"target add a /r --env geheim":                       "--env: word 1: want KEY=VALUE or KEY=@FILE",
		"target add a /r --env A=1 --env =geheim":            "--env: word 2: want KEY=VALUE or KEY=@FILE",
		"target add a /r --env A=1 --env A=geheim":           "--env A: want each variable once",
		"target add a /r --env A=@/nosuch":                   "--env A /nosuch: no such file or directory",
		"target add a /r --ssh-key /nosuch":                  "--ssh-key /nosuch: no such file or directory",
		"target add a /r --known-hosts /nosuch":              "--known-hosts /nosuch: no such file or directory",
		"target add nas /r --engine archive":                 "there is a target nas already",
		"target add a":                                       "requires 2 arguments",
		"target inspect nosuch":                              "there is no target nosuch",
		"target test nosuch":                                 "there is no target nosuch",
		"target rm -f nas":                                   "volumes are backed up to it by schedule: db",
		"target ls --filter color=red":                       "invalid filter",
		"backup create nosuch":                               "volume nosuch not found",
		"backup create db --tag a_b":                         `--tag "a b": want a word without white space and commas`,
		"backup create db --tag a,b":                         `--tag "a,b": want a word`,
		"backup create db@before --pause":                    "--pause is for a snapshot that is made now, and db@before is there already",
		"backup create db --pause-max 10s":                   "--pause-max is for --pause",
		"backup create db --pause --pause-max 1ms":           "want at least 1s",
		"backup ls db --volume web":                          "--volume web: db is meant already",
		"backup ls --filter color=red":                       "invalid filter",
		"backup inspect nas/db@99999999":                     "target nas has no backup db@99999999",
		"backup rm nas/db":                                   "want an ID instead of latest",
		"backup rm nas/db@11111111 nas/db@latest":            "backup nas/db@latest: want an ID instead of latest, as docker berth backup ls --target nas db shows it",
		"backup rm nas/db@2026-11-26":                        "what 2026-11-26 means may change with every backup",
		"backup rm db@11111111":                              "want TARGET/VOLUME",
		"backup verify nas/db --read-data 5%":                "--read-data 5% is for a target",
		"backup verify nas --read-data -1":                   `--read-data "-1": want a number from 0 to 100`,
		"backup restore nas/db":                              "Docker has a volume db already, with the driver berth-vol:latest; give the restored one another name, or use --in-place",
		"backup restore nas/db legacy":                       "Docker has a volume legacy already, with the driver local",
		"backup restore nas/db --in-place":                   "volume db is used by db: stop that first",
		"backup restore nas/db x --path ../y":                `--path "../y": want a path below the top`,
		"backup restore nas/db x --path /":                   `--path "/": want a path below the top`,
		"backup restore nas/files9 --in-place -o size=1G":    "--opt is for a new volume",
		"backup restore db x":                                "want TARGET/VOLUME",
	} {
		w := newShelf(t)
		stdout, stderr, err := w.try(words(args)...)
		assert.ErrorContains(t, err, want, args)
		assert.Equal(t, stdout, strings.Repeat("[]\n", strings.Count(stdout, "[]\n")), args)
		assert.Equal(t, len(w.shelf.got), 0, args)
		assert.Assert(t, !strings.Contains(err.Error()+stderr, "geheim"), args)
	}
}

// All that a target needs goes to the daemon, and nothing of it is shown.
func TestTargetIsAddedWithItsSecrets(t *testing.T) {
	w := newShelf(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		assert.NilError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	stdout, stderr, err := w.try("target", "add", "new", "rest:https://u:geheim1@h/", "--password-file", file("password", " geheim2 \r\n"),
		"--env", "AWS_ACCESS_KEY_ID=geheim3", "--env", "AWS_SECRET_ACCESS_KEY=@"+file("key", "geheim4\n\n"), "--env", "B2_ACCOUNT_KEY=@"+file("key2", "geheim5\r\n"),
		"--env", "GOOGLE_APPLICATION_CREDENTIALS=@"+file("json", "{\"geheim6\":1}\n"), "--ssh-key", file("ssh", "geheim7\n"), "--known-hosts", file("hosts", "h k\n"),
		"--limit-upload", "1.5M", "--limit-download", "500k", "--prune", "@monthly", "--check", "never", "--check-share", "2.5%")
	assert.NilError(t, err)
	assert.Equal(t, stdout, "new\n")
	assert.Equal(t, stderr, "Made a repository at rest:https://u:xxxxx@h/.\n")
	assert.DeepEqual(t, w.shelf.got, []any{control.TargetSpec{
		Name: "new", Engine: "restic", Repository: "rest:https://u:geheim1@h/", Password: "geheim2",
		Environment: map[string]string{"AWS_ACCESS_KEY_ID": "geheim3", "AWS_SECRET_ACCESS_KEY": "geheim4\n", "B2_ACCOUNT_KEY": "geheim5"},
		Files:       map[string]string{"GOOGLE_APPLICATION_CREDENTIALS": "{\"geheim6\":1}\n", "ssh-key": "geheim7\n", "known-hosts": "h k\n"},
		UploadLimit: 1536, DownloadLimit: 500, PruneSchedule: "@monthly", CheckSchedule: "never", CheckShare: 0.025,
	}})

	// From standard input, in the place of another one.
	w.shelf.got = nil
	w.in.WriteString("geheim\n")
	_, stderr, err = w.try("target", "add", "nas", "/mnt/nas", "--password-file", "-", "--replace")
	assert.NilError(t, err)
	assert.Equal(t, stderr, "Opened the repository at /mnt/nas: 4 backups of 2 volumes.\n")
	assert.DeepEqual(t, w.shelf.got, []any{control.TargetSpec{Name: "nas", Engine: "restic", Repository: "/mnt/nas", Password: "geheim", Replace: true}})

	// The other engine has no password to ask for.
	w.shelf.got = nil
	w.run("target", "add", "tars", "/mnt/tars", "--engine", "archive")
	assert.DeepEqual(t, w.shelf.got, []any{control.TargetSpec{Name: "tars", Engine: "archive", Repository: "/mnt/tars"}})
}

func TestPasswordFileOfMany(t *testing.T) {
	w := newShelf(t)
	path := filepath.Join(t.TempDir(), "password")
	assert.NilError(t, os.WriteFile(path, []byte("geheim"), 0o600))
	assert.NilError(t, os.Chmod(path, 0o644))
	_, stderr, err := w.try("target", "add", "new", "/r", "--password-file", path)
	assert.NilError(t, err)
	assert.Assert(t, strings.HasPrefix(stderr, "WARNING: --password-file "+path+": everybody on this machine can read the file (mode 0644)\n"), stderr)

	for text, want := range map[string]string{
		"a\nb": "want a single line", "a\x00b": "want a single line", "\n": "there is no password in it", strings.Repeat("x", maxSecret+1): "want a file of at most 262144 bytes",
	} {
		assert.NilError(t, os.WriteFile(path, []byte(text), 0o600))
		_, _, err = w.try("target", "add", "newer", "/r", "--password-file", path)
		assert.ErrorContains(t, err, want)
	}
	assert.Equal(t, len(w.shelf.got), 1)
}

// The daemon could not open it, and must not be given a path of another machine.
func TestVariableOfAFileIsNoPath(t *testing.T) {
	w := newShelf(t)
	_, _, err := w.try("target", "add", "new", "/r", "--env", "RCLONE_CONFIG=/root/rclone.conf")
	assert.ErrorContains(t, err, "--env RCLONE_CONFIG: the daemon does not see your files: want the file itself, as RCLONE_CONFIG=@FILE")
	assert.Equal(t, len(w.shelf.got), 0)
}

func TestRemovalOfTargetsAsks(t *testing.T) {
	w := newShelf(t)
	w.in.WriteString("n\n")
	_, stderr, err := w.try("target", "rm", "nas", "s3")
	assert.ErrorIs(t, err, errNotConfirmed)
	assert.Assert(t, strings.Contains(stderr, "how to open nas, s3. Nobody reads the backups without the password"), stderr)
	w.in.Reset()
	w.in.WriteString("y\n")
	stdout, _, err := w.try("target", "rm", "nas", "s3")
	assert.ErrorContains(t, err, "volumes are backed up to it")
	assert.Equal(t, stdout, "s3\n")
}

// The backup is there, so its reference is; whoever looks at the exit status learns that
// files are missing.
func TestIncompleteBackup(t *testing.T) {
	w := newShelf(t)
	w.shelf.vault.missing = []string{"data/a: permission denied", "data/b: input/output error"}
	stdout, stderr, err := w.try("backup", "create", "db")
	var status cli.StatusError
	assert.Assert(t, errors.As(err, &status), "%v", err)
	assert.Equal(t, status.StatusCode, 3)
	assert.ErrorContains(t, err, "nas/db@11111111 is incomplete")
	assert.Equal(t, stdout, "nas/db@11111111\n")
	assert.Equal(t, stderr, "data/a: permission denied\ndata/b: input/output error\n")
}

// Scripts get a reference that they can use, people are told that it is no new one.
func TestBackupOfWhatHasNotChanged(t *testing.T) {
	w := newShelf(t)
	w.shelf.vault.unchanged = true
	stdout, stderr, err := w.try("backup", "create", "db")
	assert.NilError(t, err)
	assert.Equal(t, stdout, "nas/db@11111111\n")
	assert.Equal(t, stderr, "No new backup was made: nothing in volume db has changed since this one\n")
}

func TestTargetThatDoesNotAnswer(t *testing.T) {
	w := newShelf(t)
	w.shelf.vault.failed = map[string]string{"s3": "no route to host", "b2": "the bucket is gone"}
	stdout, _, err := w.try("backup", "ls", "--target", "nas", "-q")
	assert.Error(t, err, "target b2: the bucket is gone\ntarget s3: no route to host")
	assert.Equal(t, stdout, "nas/db@11111111\nnas/db@22222222\nnas/db@33333333\n")
	stdout, _, err = w.try("backup", "prune", "-n")
	assert.ErrorContains(t, err, "b2: the bucket is gone")
	assert.Assert(t, strings.Contains(stdout, "nas/db@22222222"))
	stdout, _, err = w.try("backup", "prune", "-f")
	assert.ErrorContains(t, err, "b2: the bucket is gone")
	assert.Equal(t, stdout, "nas/db@22222222\n")
}

func TestRemovalOfBackupsGoesOnAfterAnError(t *testing.T) {
	stdout, _, err := newShelf(t).try("backup", "rm", "nas/db@99999999", "nas/db@11111111")
	assert.ErrorContains(t, err, "nas/db@99999999: target nas has no backup db@99999999")
	assert.Equal(t, stdout, "nas/db@11111111\n")
}

func TestBackupPruneAsks(t *testing.T) {
	w := newShelf(t)
	w.in.WriteString("\n")
	_, stderr, err := w.try("backup", "prune")
	assert.ErrorIs(t, err, errNotConfirmed)
	assert.Assert(t, strings.Contains(stderr, "This will remove 1 backup for good:\n  nas/db@22222222 ("), stderr)
	assert.DeepEqual(t, w.shelf.got, []any{control.PruneBackupsRequest{DryRun: true}})
	w.in.WriteString("Y\n")
	assert.Equal(t, w.run("backup", "prune"), "nas/db@22222222\n")
	assert.DeepEqual(t, w.shelf.got[len(w.shelf.got)-1], control.PruneBackupsRequest{})

	// Nothing is to be removed, and nobody asked; but what was removed before has space
	// that can be freed.
	w.shelf.vault.backups, w.shelf.got = nil, nil
	stdout, stderr, err := w.try("backup", "prune")
	assert.NilError(t, err)
	assert.Equal(t, stdout+stderr, "There is no backup to remove.\n")
	assert.DeepEqual(t, w.shelf.got, []any{control.PruneBackupsRequest{DryRun: true}, control.PruneBackupsRequest{}})
	w.shelf.got = nil
	w.run("backup", "prune", "--dry-run")
	assert.DeepEqual(t, w.shelf.got, []any{control.PruneBackupsRequest{DryRun: true}})
}

func TestDamageIsAnExitStatus(t *testing.T) {
	w := newShelf(t)
	w.shelf.vault.verify = control.VerifyReport{Errors: []string{"pack 1 is damaged", "pack 2 is gone"}, Hint: "run restic repair"}
	stdout, stderr, err := w.try("backup", "verify", "nas")
	var status cli.StatusError
	assert.Assert(t, errors.As(err, &status), "%v", err)
	assert.Equal(t, status.StatusCode, 1)
	assert.Equal(t, status.Status, "nas: 2 errors")
	assert.Equal(t, stdout, "pack 1 is damaged\npack 2 is gone\n")
	assert.Equal(t, stderr, "run restic repair\n")
}

func TestRestoreInPlaceTellsHowToGoBack(t *testing.T) {
	_, stderr, err := newShelf(t).try("backup", "restore", "nas/db", "files9", "--in-place")
	assert.NilError(t, err)
	assert.Equal(t, stderr, "Volume files9 has the data of nas/db@11111111. What it had before is the snapshot:\n")
	_, stderr, err = newShelf(t).try("backup", "restore", "nas/db", "files9", "--in-place", "--path", "etc", "--path", "/var/a")
	assert.NilError(t, err)
	assert.Equal(t, stderr, "Volume files9 has etc, var/a of nas/db@11111111. What it had before is the snapshot:\n")
}

func TestBackupCompletion(t *testing.T) {
	w := newShelf(t)
	offered := func(args ...string) []string {
		lines := strings.Split(w.run(append([]string{"__complete"}, args...)...), "\n")
		return lines[:len(lines)-2] // the directive and the end
	}
	assert.DeepEqual(t, offered("target", "inspect", ""), []string{"nas", "old", "s3"})
	assert.DeepEqual(t, offered("target", "rm", "old", ""), []string{"nas", "s3"})
	assert.DeepEqual(t, offered("target", "test", "nas", ""), []string{})
	assert.DeepEqual(t, offered("target", "add", "x", "/r", "--engine", ""), []string{"restic", "archive"})
	assert.DeepEqual(t, offered("backup", "create", "--target", ""), []string{"nas", "old", "s3"})
	assert.DeepEqual(t, offered("backup", "create", "db@"), []string{"db@before", "db@20261128T170000Z"})
	assert.Assert(t, len(offered("backup", "ls", "--volume", "")) == 4)
	assert.DeepEqual(t, offered("backup", "restore", ""), []string{"nas/", "old/", "s3/"})
	assert.DeepEqual(t, offered("backup", "restore", "nas/"), []string{"nas/db@"})
	assert.DeepEqual(t, offered("backup", "restore", "nas/db@"), []string{"nas/db@latest", "nas/db@33333333", "nas/db@22222222", "nas/db@11111111"})
	assert.DeepEqual(t, offered("backup", "restore", "nas/db", ""), []string{})
	assert.DeepEqual(t, offered("backup", "rm", "nas/db@33333333", "nas/db@"), []string{"nas/db@22222222", "nas/db@11111111"})
	assert.DeepEqual(t, offered("backup", "verify", ""), []string{"nas", "old", "s3"})
	assert.DeepEqual(t, offered("backup", "verify", "s3/"), []string{"s3/web@"})
	w.shelf.fail = errors.New("down")
	assert.DeepEqual(t, offered("backup", "restore", "nas/db@"), []string{})
}
