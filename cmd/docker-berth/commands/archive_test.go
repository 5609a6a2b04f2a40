package commands

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/docker/cli/cli"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

func TestExportGoesToOutputOrFile(t *testing.T) {
	w := newShelf(t)
	assert.Equal(t, w.run("backup", "export", "db"), archiveText)
	assert.Equal(t, w.run("backup", "export", "db@before", "--compress", "none"), archiveText)
	dir := t.TempDir()
	path := filepath.Join(dir, "db.tar.zst")
	assert.Equal(t, w.run("backup", "export", "db", "-O", path), "")
	text, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(text), archiveText)
	info, err := os.Stat(path)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o600))
	plain := control.ExportRequest{Volume: "db", Compress: control.CompressZstd}
	assert.DeepEqual(t, w.shelf.got, []any{plain, control.ExportRequest{Volume: "db", Snapshot: "before", Compress: control.CompressNone}, plain})

	// What fails leaves the file of before, and nothing else.
	assert.NilError(t, os.WriteFile(path, []byte("before"), 0o600))
	w.shelf.fail = fault.Unavailable("the disk is gone")
	_, _, err = w.try("backup", "export", "db", "-O", path)
	assert.ErrorContains(t, err, "the disk is gone; what was written is not whole")
	text, err = os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(text), "before")
	entries, err := os.ReadDir(dir)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 1)
}

func TestIncompleteExport(t *testing.T) {
	w := newShelf(t)
	w.shelf.vault.missing = []string{"data/a: permission denied"}
	stdout, stderr, err := w.try("backup", "export", "db")
	var status cli.StatusError
	assert.Assert(t, errors.As(err, &status), "%v", err)
	assert.Equal(t, status.StatusCode, 3)
	assert.ErrorContains(t, err, "the archive of volume db is incomplete")
	assert.Equal(t, stdout, archiveText)
	assert.Equal(t, stderr, "data/a: permission denied\n")
}

func TestImportTakesAFileOrInput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.tar")
	assert.NilError(t, os.WriteFile(path, []byte(archiveText), 0o600))
	for _, c := range []struct {
		args []string
		want any
	}{
		{[]string{"new", path}, control.ImportRequest{Name: "new", Options: map[string]string{}}},
		{[]string{"new"}, control.ImportRequest{Name: "new", Options: map[string]string{}}},
		{[]string{"new", "-", "--strip", "2", "-o", "size=1G"}, control.ImportRequest{Name: "new", Strip: 2, Options: map[string]string{"size": "1G"}}},
		{[]string{"new", "--convoy", "/backup", "--volume", "v", "--backup", "b"}, control.ConvoyRequest{Name: "new", Directory: "/backup", Volume: "v", Backup: "b"}},
		{
			[]string{"new", "vfs:///backup/x?backup=backup-1&volume=v", "-o", "size=1G"},
			control.ConvoyRequest{Name: "new", Directory: "/backup/x", Volume: "v", Backup: "backup-1", Options: map[string]string{"size": "1G"}},
		},
	} {
		w := newShelf(t)
		w.in.WriteString(archiveText)
		assert.Equal(t, w.run(append([]string{"backup", "import"}, c.args...)...), "new\n")
		if want, ok := c.want.(control.ImportRequest); ok && len(want.Options) == 0 {
			want.Options = nil
			c.want = want
		}
		assert.DeepEqual(t, w.shelf.got, []any{c.want})
	}
}

func TestImportTellsWhatIsLost(t *testing.T) {
	w := newShelf(t)
	w.in.WriteString(archiveText)
	w.shelf.vault.imported = control.Import{Lost: 2, LostSome: []string{"a: user.x", "b: user.y"}, Missing: 3}
	stdout, stderr, err := w.try("backup", "import", "new")
	var status cli.StatusError
	assert.Assert(t, errors.As(err, &status), "%v", err)
	assert.Equal(t, status.StatusCode, 3)
	assert.ErrorContains(t, err, "3 files could not be read when the archive was made")
	assert.Equal(t, stdout, "new\n")
	assert.Equal(t, stderr, "WARNING: the file system of volume new cannot store 2 extended attributes of the archive, among them:\na: user.x\nb: user.y\n")
}

func TestArchiveRefusals(t *testing.T) {
	for args, want := range map[string]string{
		"backup export nosuch":                                    "volume nosuch not found",
		"backup export db --compress xz":                          `--compress "xz": want zstd or none`,
		"backup export db -O /dev/null":                           "--output /dev/null: want the path of a file",
		"backup export db -O /nosuch/x":                           "--output /nosuch/x",
		"backup import db":                                        "Docker has a volume db already",
		"backup import new":                                       "the archive is damaged",
		"backup import new /nosuch":                               "/nosuch: no such file or directory",
		"backup import new --strip -1":                            "--strip -1: want 0 or more",
		"backup import new --volume v":                            "--volume and --backup are for --convoy DIR",
		"backup import new --convoy backup":                       `--convoy "backup": want the absolute path`,
		"backup import new --convoy /b --strip 1":                 "--strip 1 is for archives",
		"backup import new file --convoy /b":                      "want either a file, a URL or --convoy DIR",
		"backup import new vfs:///b?volume=v":                     "names one of volume and backup",
		"backup import new vfs:///b?volume=v&backup=b --volume v": "want either a file, a URL or --convoy DIR",
	} {
		w := newShelf(t)
		_, _, err := w.try(words(args)...)
		assert.ErrorContains(t, err, want, args)
		assert.Equal(t, len(w.shelf.got), 0, args)
	}
}
