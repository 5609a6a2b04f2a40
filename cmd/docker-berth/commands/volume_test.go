package commands

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// What a user sees, word for word. The files are made by go test -update.
func TestVolumeOutput(t *testing.T) {
	for name, args := range map[string]string{
		"volume-ls":            "volume ls",
		"volume-ls-quiet":      "volume ls -q --filter engine=dir",
		"volume-ls-template":   "volume ls --filter label=tier=1 --format table_{{.Name}}\\t{{.Labels}}\\t{{.Label_\"app\"}}\\t{{.Schedule}}\\t{{.Keep}}\\t{{.NextSnapshot}}\\t{{.Consistency}}",
		"volume-ls-dangling":   "volume ls --filter dangling=true -q",
		"volume-ls-container":  "volume ls --filter container=report --format {{.Name}}:_{{.Containers}}",
		"volume-inspect":       "volume inspect db --format {{.Name}}_{{.Engine}}_{{len_.Snapshots}}_{{range_.Containers}}{{.Container}}={{.State}}_{{end}}",
		"volume-df":            "volume df",
		"volume-df-roots":      "volume df --roots",
		"snapshot-ls":          "snapshot ls",
		"snapshot-ls-quiet":    "snapshot ls db -q --filter origin=manual",
		"snapshot-inspect":     "snapshot inspect db@before --format {{.Name}}:{{.Consistency}}",
		"snapshot-prune":       "snapshot prune --dry-run",
		"trash-ls":             "trash ls",
		"trash-ls-quiet":       "trash ls -q --no-trunc --filter name=old",
		"volume-prune-dry-run": "volume prune --all -n",
	} {
		t.Run(name, func(t *testing.T) { golden.Assert(t, newShelf(t).run(words(args)...), name+".golden") })
	}
}

func TestVolumeJSONIsOneObjectForEachLine(t *testing.T) {
	w := newShelf(t)
	w.wantJSONLines("volume ls", "volume df", "volume df --roots", "snapshot ls", "trash ls")
	var details []volumeDetail
	assert.NilError(t, json.Unmarshal([]byte(w.run("volume", "inspect", "db", "files10")), &details))
	assert.Equal(t, details[0].Snapshots[1].Name, "20261128T170000Z")
	assert.Equal(t, details[0].Containers[0].Container, "db")
	assert.Equal(t, details[1].Containers[0].State, "exited")
}

// Each of these is one request to the daemon, with all that the user said, and prints
// what it made.
func TestVolumeRequests(t *testing.T) {
	old := "1a2b3c4d-0000-4000-8000-000000000005"
	for _, c := range []struct {
		args, out string
		want      any
	}{
		{"volume clone db copy", "copy\n", control.CloneRequest{Volume: "db", Name: "copy"}},
		{"volume clone -o size=1G -o protect=true db@before copy", "copy\n", control.CloneRequest{Volume: "db", Snapshot: "before", Name: "copy", Options: map[string]string{"size": "1G", "protect": "true"}}},
		{"volume rollback files10 s1", "files10@rollback-1\n", control.RollbackRequest{Volume: "files10", Snapshot: "s1"}},
		{"volume rollback files10@s1", "files10@rollback-1\n", control.RollbackRequest{Volume: "files10", Snapshot: "s1"}},
		{"volume rollback --force db before", "db@rollback-1\n", control.RollbackRequest{Volume: "db", Snapshot: "before", Force: true}},
		{"volume rename files9 f", "f\n", control.RenameRequest{Volume: "files9", Name: "f"}},
		{"volume resize db 20G", "db\n", control.ResizeRequest{Volume: "db", Size: 20 << 30}},
		{"volume resize db 1.5gib", "db\n", control.ResizeRequest{Volume: "db", Size: 3 << 29}},
		{"volume resize db none", "db\n", control.ResizeRequest{Volume: "db"}},
		{"volume set db protect=false label.a=b=c snapshot.schedule=", "db\n", control.UpdateRequest{Volume: "db", Set: map[string]string{"protect": "false", "label.a": "b=c", "snapshot.schedule": ""}}},
		{"volume adopt ./some/dir new", "new\n", control.AdoptRequest{Name: "new", Source: "some/dir"}},
		{"volume adopt dir new --copy -o size=1G", "new\n", control.AdoptRequest{Name: "new", Source: "dir", Copy: true, Options: map[string]string{"size": "1G"}}},
		{"snapshot create db", "db@20261128T190000Z\n", control.SnapshotRequest{Volume: "db"}},
		{"snapshot create db s1", "db@s1\n", control.SnapshotRequest{Volume: "db", Name: "s1"}},
		{"snapshot create db@s1", "db@s1\n", control.SnapshotRequest{Volume: "db", Name: "s1"}},
		{"snapshot rm db@before", "db@before\n", control.SnapshotRef{Volume: "db", Name: "before"}},
		{"snapshot prune db --keep 7d --all --force", "db@before\ndb@20261128T170000Z\n", control.PruneSnapshotsRequest{Volume: "db", Keep: "7d", All: true}},
		{"trash restore old", "old\n", control.RestoreTrashRequest{UUID: "1a2b3c4e-0000-4000-8000-000000000006"}},
		{"trash restore 1a2b3c4d older", "older\n", control.RestoreTrashRequest{UUID: old, Name: "older"}},
		{"trash purge " + old, old + "\n", control.PurgeTrashRequest{UUIDs: []string{old}}},
	} {
		w := newShelf(t)
		assert.Equal(t, w.run(words(c.args)...), c.out, c.args)
		assert.DeepEqual(t, w.shelf.got, []any{c.want})
	}
}

// What the command refuses changes nothing, and the text says what to do.
func TestVolumeRefusals(t *testing.T) {
	for args, want := range map[string]string{
		"volume inspect db@before":                   "docker berth snapshot inspect db@before",
		"volume inspect nosuch":                      "volume nosuch not found",
		"volume clone db legacy":                     "Docker has a volume legacy already, with the driver local",
		"volume clone nosuch x":                      "volume nosuch not found",
		"volume rollback db before":                  "used by db: stop that first, or use --force",
		"volume rollback db":                         "want VOLUME SNAPSHOT",
		"volume rollback db@a b":                     "b is one too many",
		"volume rename files10 new":                  "is used by report, which would get an empty volume with the old name",
		"volume rename files9 legacy":                "Docker has a volume legacy already",
		"volume resize db 10X":                       "want a number with a unit",
		"volume resize db 0":                         "want a number with a unit",
		"volume set db protect":                      "want each KEY=VALUE once",
		"volume set db a=1 a=2":                      "want each KEY=VALUE once",
		"volume set db =1":                           "want each KEY=VALUE once",
		"volume set db":                              "requires at least 2 arguments",
		"volume adopt legacy legacy":                 "Docker has a volume legacy already",
		"volume adopt share new":                     "is a mount of :/export",
		"volume ls --filter dangling=perhaps":        "want true or false",
		"volume ls --filter color=red":               "invalid filter",
		"volume prune --filter name=x":               "invalid filter",
		"snapshot create db --pause-max 10s":         "--pause-max is for --pause",
		"snapshot create db --pause --pause-max 1ms": "want at least 1s",
		"snapshot inspect db":                        "want VOLUME@SNAPSHOT",
		"snapshot inspect db@nosuch":                 "volume db has no snapshot nosuch",
		"snapshot rm db@before db":                   "want VOLUME@SNAPSHOT",
		"snapshot ls nosuch":                         "volume nosuch not found",
		"trash restore nosuch":                       "there is no nosuch in the trash",
		"trash restore 1a2b":                         "beginning of several IDs",
		"trash restore old db":                       "Docker has a volume db already",
		"trash purge":                                "either names of removed volumes or --all",
		"trash purge --all old":                      "either names of removed volumes or --all",
		"trash purge old":                            "2 removed volumes were called old: give the ID",
	} {
		w := newShelf(t)
		stdout, _, err := w.try(words(args)...)
		assert.ErrorContains(t, err, want, args)
		assert.Equal(t, stdout, strings.Repeat("[]\n", strings.Count(stdout, "[]\n")), args)
		assert.Equal(t, len(w.shelf.got), 0, args)
	}
}

// Docker must not go on believing in a name that is no more.
func TestRenameTellsDocker(t *testing.T) {
	w := newShelf(t)
	w.run("volume", "rename", "files9", "f")
	assert.DeepEqual(t, w.shelf.forgot, []string{"f", "files9"})
	w.apiErr = errNoDocker
	_, _, err := w.try("--socket", w.volumeSocket(), "volume", "rename", "db", "d")
	assert.ErrorContains(t, err, "can only be told while Docker answers")
}

func (w *world) volumeSocket() string { return filepath.Join(w.dir, pluginID(volID), "berth.sock") }

func TestRollbackWarnsOfContainersWithOldData(t *testing.T) {
	w := newShelf(t)
	_, stderr, err := w.try("volume", "rollback", "--force", "db", "before")
	assert.NilError(t, err)
	assert.Equal(t, stderr, "WARNING: until it is started again, the data of before is with db\n"+
		"Volume db has the data of before. What it had before is the snapshot:\n")
}

func TestUnstableSnapshotIsWarnedOf(t *testing.T) {
	w := newShelf(t)
	_, stderr, err := w.try("snapshot", "create", "db")
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(stderr, "2 files changed while they were read"), stderr)
}

// Docker removes: it is asked for what no container uses, and only for Berth's.
func TestVolumePrune(t *testing.T) {
	w := newShelf(t)
	w.in.WriteString("n\n")
	stdout, stderr, err := w.try("volume", "prune")
	assert.ErrorIs(t, err, errNotConfirmed)
	assert.Equal(t, stdout, "")
	assert.Equal(t, stderr, "WARNING! This will remove 1 volumes that no container uses:\n  "+long("0")+"\nAre you sure you want to continue? [y/N] ")
	assert.Equal(t, len(w.shelf.gone), 0)
	w.in.Reset()
	_, _, err = w.try("volume", "prune")
	assert.ErrorIs(t, err, errNotConfirmed, "no answer is a no")

	w.in.WriteString("y\n")
	assert.Equal(t, w.run("volume", "prune"), long("0")+"\n")
	assert.DeepEqual(t, w.shelf.gone, []string{long("0")})

	// Volumes of other states, with users elsewhere or protected ones stay.
	w = newShelf(t)
	free := control.Volume{State: control.VolumeReady, Labels: map[string]string{"a": "b"}}
	for name, change := range map[string]func(*control.Volume){
		"free": func(*control.Volume) {}, "other-host": func(v *control.Volume) { v.Users = []control.VolumeUser{{Host: "beta"}} },
		"protected": func(v *control.Volume) { v.Protect = true }, "away": func(v *control.Volume) { v.State = control.VolumeAway },
		"mounted": func(v *control.Volume) { v.Mounted = true }, "labelled": func(v *control.Volume) { v.Labels = map[string]string{"keep": ""} },
		"legacy": func(*control.Volume) {},
	} {
		v := free
		v.Name = name
		change(&v)
		w.shelf.volumes[name] = v
		if _, ok := w.shelf.docker[name]; !ok {
			w.shelf.docker[name] = w.shelf.docker["db"]
		}
	}
	stdout, _, err = w.try("volume", "prune", "-a", "-f", "--filter", "label!=keep", "--filter", "label=a")
	assert.ErrorContains(t, err, "volume legacy: Docker has a volume of that name with the driver local")
	assert.Equal(t, stdout, "free\n")
	assert.DeepEqual(t, w.shelf.gone, []string{"free"})

	// The name of a plugin whose socket was named is known too.
	stdout, _, err = w.try("--socket", w.volumeSocket(), "volume", "prune", "-a", "-f")
	assert.ErrorContains(t, err, "volume legacy: Docker has a volume of that name with the driver local")
	assert.Equal(t, stdout, long("0")+"\nlabelled\n")

	w.apiErr = errNoDocker
	_, _, err = w.try("--socket", w.volumeSocket(), "volume", "prune", "--force")
	assert.ErrorContains(t, err, "can only be told while Docker answers")
	_, _, err = w.try("--socket", w.volumeSocket(), "volume", "ls", "--filter", "dangling=true")
	assert.ErrorContains(t, err, errNoDocker.Error())
}

func TestSnapshotPruneAsks(t *testing.T) {
	w := newShelf(t)
	w.in.WriteString("\n")
	_, stderr, err := w.try("snapshot", "prune")
	assert.ErrorIs(t, err, errNotConfirmed)
	assert.Assert(t, strings.Contains(stderr, "This will remove 1 snapshots:\n  db@20261128T170000Z (2 hours ago)\n"), stderr)
	w.in.WriteString("Y\n")
	assert.Equal(t, w.run("snapshot", "prune"), "db@20261128T170000Z\n")
	assert.DeepEqual(t, w.shelf.got[len(w.shelf.got)-1], control.PruneSnapshotsRequest{})
	w.shelf.snapshots = nil
	stdout, stderr, err := w.try("snapshot", "prune")
	assert.NilError(t, err)
	assert.Equal(t, stdout+stderr, "There is no snapshot to remove.\n")
}

func TestPurgeOfAllAsks(t *testing.T) {
	w := newShelf(t)
	_, stderr, err := w.try("trash", "purge", "--all")
	assert.ErrorIs(t, err, errNotConfirmed)
	assert.Assert(t, strings.Contains(stderr, "3 removed volumes and their snapshots for good"), stderr)
	assert.Equal(t, len(w.shelf.got), 0)

	stdout, _, err := w.try("trash", "purge", "--all", "--force")
	assert.ErrorContains(t, err, "5e6f7a8b-0000-4000-8000-000000000007: it is busy")
	assert.Equal(t, stdout, "1a2b3c4d-0000-4000-8000-000000000005\n1a2b3c4e-0000-4000-8000-000000000006\n")
	w.shelf.trash = nil
	_, stderr, err = w.try("trash", "purge", "--all")
	assert.NilError(t, err)
	assert.Equal(t, stderr, "The trash is empty.\n")
}

func TestRemovalGoesOnAfterAnError(t *testing.T) {
	w := newShelf(t)
	stdout, _, err := w.try("snapshot", "rm", "db@nosuch", "db@before")
	assert.ErrorContains(t, err, "volume db has no snapshot nosuch")
	assert.Equal(t, stdout, "db@before\n")
}

// A managed plugin sees its mounts only; a path below them is told in its own words.
func TestAdoptOfWhatThePluginSees(t *testing.T) {
	w := newShelf(t)
	root := t.TempDir()
	data, legacy := filepath.Join(root, "data"), filepath.Join(root, "legacy")
	assert.NilError(t, os.MkdirAll(filepath.Join(data, "a"), 0o700))
	assert.NilError(t, os.Mkdir(legacy, 0o700))
	assert.NilError(t, os.Symlink(filepath.Join(data, "a"), filepath.Join(root, "link")))
	plugin := w.plugins[len(w.plugins)-1]
	plugin.Config.Mounts = []types.PluginMount{{Name: "data", Source: &data, Destination: "/data"}}

	w.run("volume", "adopt", filepath.Join(data, "a"), "a")
	w.run("volume", "adopt", filepath.Join(root, "link"), "b", "--copy")
	assert.DeepEqual(t, w.shelf.got, []any{control.AdoptRequest{Name: "a", Source: "/data/a"}, control.AdoptRequest{Name: "b", Source: "/data/a", Copy: true}})

	v := w.shelf.docker["legacy"]
	v.Mountpoint = legacy
	w.shelf.docker["legacy"] = v
	_, _, err := w.try("volume", "adopt", "legacy", "new")
	assert.Equal(t, err.Error(), "plugin berth-vol:latest does not see "+legacy+", but only its mounts. Copy the data to its root and adopt it there:\n"+
		"  cp -a --reflink=auto "+legacy+" "+data+"/new\n  docker berth volume adopt ./new new")
	plugin.Config.Mounts = nil
	_, _, err = w.try("volume", "adopt", legacy, "new")
	assert.ErrorContains(t, err, "does not see "+legacy)
	assert.Equal(t, len(w.shelf.got), 2)

	// So it is when the user names its socket, but a daemon of its own sees all. Data that
	// is being written to is not copied.
	_, _, err = w.try("--socket", w.volumeSocket(), "volume", "adopt", legacy, "new")
	assert.ErrorContains(t, err, "does not see "+legacy)
	own := filepath.Join(w.dir, "own.sock")
	w.listen(own, w.shelf.server)
	assert.Equal(t, w.run("--socket", own, "volume", "adopt", "legacy", "new"), "new\n")
	assert.DeepEqual(t, w.shelf.got[2], control.AdoptRequest{Name: "new", Source: legacy, Copy: true})
	w.containers[0].State, w.containers[0].Mounts = container.StatePaused, []container.MountPoint{{Type: "volume", Name: "legacy"}}
	_, _, err = w.try("--socket", own, "volume", "adopt", "legacy", "newer")
	assert.ErrorContains(t, err, "volume legacy is used by web: stop that first")
}

func TestSeveralVolumePlugins(t *testing.T) {
	w := newShelf(t)
	w.install("mine/berth:2", pluginID("9"), true, "volumedriver", nil)
	for _, args := range []string{"volume ls", "snapshot ls", "trash ls", "volume prune", "volume adopt a b", "snapshot create db"} {
		_, _, err := w.try(words(args)...)
		assert.ErrorContains(t, err, "several Berth plugins: berth-vol:latest, mine/berth:2", args)
	}
	w.run("--plugin", "berth-vol", "volume", "ls")
	_, _, err := w.try("--plugin", "berth-net", "volume", "ls")
	assert.ErrorContains(t, err, "serves no volumes")
}

func TestVolumesWithoutDocker(t *testing.T) {
	w := newShelf(t)
	w.apiErr = errNoDocker
	stdout, stderr, err := w.try("--socket", w.volumeSocket(), "volume", "ls", "-q", "--filter", "name=files")
	assert.NilError(t, err)
	assert.Equal(t, stdout, "files9\nfiles10\n")
	assert.Assert(t, strings.Contains(stderr, "containers are not shown"), stderr)
	// What needs no more than the daemon does without Docker.
	w.run("--socket", w.volumeSocket(), "volume", "clone", "db", "copy")
	w.run("--socket", w.volumeSocket(), "snapshot", "create", "db")
	w.shelf.fail = fault.Unavailable("the storage does not answer")
	_, _, err = w.try("--socket", w.volumeSocket(), "trash", "ls")
	assert.ErrorContains(t, err, "the storage does not answer")
}

func TestVolumeCompletion(t *testing.T) {
	w := newShelf(t)
	offered := func(args ...string) []string {
		lines := strings.Split(w.run(append([]string{"__complete"}, args...)...), "\n")
		return lines[:len(lines)-2] // the directive and the end
	}
	all := []string{long("0"), "db", "files9", "files10"}
	assert.DeepEqual(t, offered("volume", "inspect", ""), all)
	assert.DeepEqual(t, offered("volume", "inspect", "db", ""), []string{long("0"), "files9", "files10"})
	assert.DeepEqual(t, offered("volume", "resize", "db", ""), []string{})
	assert.DeepEqual(t, offered("volume", "clone", ""), all)
	assert.DeepEqual(t, offered("volume", "clone", "db@"), []string{"db@before", "db@20261128T170000Z"})
	assert.DeepEqual(t, offered("volume", "clone", "db", ""), []string{})
	assert.DeepEqual(t, offered("volume", "rollback", "db", ""), []string{"before", "20261128T170000Z"})
	assert.DeepEqual(t, offered("volume", "rollback", "db", "before", ""), []string{})
	assert.DeepEqual(t, offered("snapshot", "rm", ""), []string{"db@"})
	assert.DeepEqual(t, offered("snapshot", "rm", "db@before", "db@"), []string{"db@20261128T170000Z"})
	assert.DeepEqual(t, offered("trash", "restore", ""), []string{"old", "web"})
	assert.DeepEqual(t, offered("trash", "restore", "old", ""), []string{})
	assert.DeepEqual(t, offered("trash", "purge", ""), []string{"1a2b3c4e-0000-4000-8000-000000000006", "web", "1a2b3c4d-0000-4000-8000-000000000005"})
	assert.Assert(t, len(offered("volume", "set", "db", "")) > 5)
	w.shelf.fail = errors.New("down")
	assert.DeepEqual(t, offered("volume", "inspect", ""), []string{})
}

func TestAmount(t *testing.T) {
	for _, c := range []struct {
		p           control.Progress
		done, total int64
		percent     string
	}{
		{control.Progress{}, 0, 0, ""},
		{control.Progress{Files: 3}, 3, 0, ""},
		{control.Progress{Files: 3, TotalFiles: 4}, 3, 4, "75%"},
		{control.Progress{Files: 3, TotalFiles: 4, Bytes: 1, TotalBytes: 2}, 1, 2, "50%"},
		{control.Progress{Bytes: 5, TotalBytes: 2}, 5, 5, "100%"},
		{control.Progress{Bytes: 1 << 63, TotalBytes: 1<<64 - 1}, 1<<63 - 1, 1<<63 - 1, "100%"},
	} {
		done, total, inBytes := amount(c.p)
		assert.Equal(t, inBytes, c.p.Bytes > 0)
		assert.Equal(t, done, c.done)
		assert.Equal(t, total, c.total)
		assert.Equal(t, percent(&c.p), c.percent)
	}
	assert.Equal(t, percent(nil), "")
}

// terminal is an output that says it is one.
type terminal struct{ strings.Builder }

func (*terminal) IsTerminal() bool { return true }

func TestProgressIsForTerminals(t *testing.T) {
	w := newShelf(t)
	a := &app{Config: Config{Docker: w}}
	show, end := a.progress("cloning db")
	assert.Assert(t, show == nil)
	end()

	screen := &terminal{}
	a.Docker = onTerminal{w, screen}
	show, end = a.progress("cloning db")
	drawn := func(p control.Progress) string {
		begin := screen.Len()
		show(p)
		return screen.String()[begin:]
	}
	drawn(control.Progress{})
	text := drawn(control.Progress{Step: "counting", Files: 10})
	assert.Assert(t, strings.Contains(text, "cloning db: counting") && strings.Contains(text, "10/-"), "%q", text)
	drawn(control.Progress{Step: "copying files", Files: 3, Bytes: 1 << 30, TotalBytes: 2 << 30})
	text = drawn(control.Progress{Step: "copying files", Files: 5, Bytes: 3 << 29, TotalBytes: 2 << 30})
	assert.Assert(t, strings.Contains(text, " 75% ") && strings.Contains(text, "1.5/2.0 GiB"), "%q", text)
	end()
	end()
	assert.Assert(t, strings.HasSuffix(screen.String(), "\r"), "%q", screen)
	assert.Equal(t, w.err.Len()+w.out.Len(), 0)
}
