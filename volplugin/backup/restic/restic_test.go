package restic_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/restic"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/internal/restictest"
)

func TestMain(m *testing.M) {
	restic.Child()
	if len(os.Args) > 1 && os.Args[1] == daemonWord {
		os.Exit(daemon(os.Args[2:]))
	}
	os.Exit(mounttest.Main(m))
}

const (
	volume = "web"
	uuid   = "5f0e3d0c-7b7e-4d57-9f37-5b1c1d6a7e10"
)

var when = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func quiet() *logrus.Entry {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	return logrus.NewEntry(logger)
}

// config is for a repository and a host of its own.
func config(t testing.TB, repository string) restic.Config {
	t.Helper()
	// A test's name may hold what a directory of Berth's does not.
	dir, err := os.MkdirTemp("", "berth-restic-") //nolint:usetesting // see above
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, os.RemoveAll(dir)) })
	return restic.Config{
		Target: backup.Target{Name: "nas", Repository: repository, Password: restictest.Password},
		Binary: restictest.Binary(t), Dir: dir, Host: "test", LockWait: 2 * time.Second, Log: quiet(),
	}
}

func engine(t testing.TB, c restic.Config) *restic.Engine {
	t.Helper()
	e, err := restic.New(c)
	assert.NilError(t, err)
	return e
}

// source is a directory with a little data and a manifest.
func source(t testing.TB) backup.Source {
	t.Helper()
	dir := t.TempDir()
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "data/sub"), 0o755))
	write(t, dir, "data/one", "1")
	write(t, dir, "data/sub/two", "22")
	manifest, err := backup.Manifest{Volume: volume, UUID: uuid, Engine: "copying", Snapshot: "s1", Host: "test", Time: when}.Encode()
	assert.NilError(t, err)
	write(t, dir, "manifest.json", string(manifest))
	return backup.Source{Dir: dir, Volume: volume, UUID: uuid, Host: "test", Time: when}
}

func write(t testing.TB, dir, name, text string) {
	t.Helper()
	assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
}

func makeBackup(t testing.TB, e *restic.Engine, s backup.Source) backup.Result {
	t.Helper()
	r, err := e.Backup(t.Context(), s, nil)
	assert.NilError(t, err)
	return r
}

func list(t testing.TB, e *restic.Engine) []backup.Backup {
	t.Helper()
	all, err := e.List(t.Context(), backup.Filter{})
	assert.NilError(t, err)
	return all
}

func TestInitMakesARepository(t *testing.T) {
	t.Parallel()
	c := config(t, filepath.Join(t.TempDir(), "repository"))
	e := engine(t, c)
	assert.NilError(t, e.Init(t.Context()))
	assert.NilError(t, e.Init(t.Context()), "it is there already")
	assert.Equal(t, len(list(t, e)), 0)
}

func TestBackupIsListedAndRestored(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	assert.Equal(t, len(list(t, e)), 0)
	s := source(t)
	s.Tags = []string{"nightly", "x=y"}
	r := makeBackup(t, e, s)
	assert.DeepEqual(t, []any{r.Files, r.Dirs, r.Bytes, r.Missing}, []any{uint64(2), uint64(2), uint64(3), []string(nil)})
	assert.Assert(t, r.Added > 0)

	all := list(t, e)
	assert.DeepEqual(t, all, []backup.Backup{{
		ID: r.ID, Volume: volume, UUID: uuid, Host: "test", Time: when, Tags: s.Tags, Files: 2, Bytes: 3, Added: r.Added,
	}})
	m, err := e.Manifest(t.Context(), r.ID)
	assert.NilError(t, err)
	assert.Equal(t, m.UUID, uuid)

	dir := t.TempDir()
	restored, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, dir, nil, nil)
	assert.NilError(t, err)
	assert.Equal(t, restored, backup.Restored{Files: 2, Bytes: 3})
	nastytree.Compare(t, filepath.Join(s.Dir, "data"), filepath.Join(dir, "data"))
}

func TestPlainResticRestoresByteForByte(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	e := engine(t, config(t, repo))
	s := source(t)
	data := filepath.Join(s.Dir, "data")
	assert.NilError(t, os.RemoveAll(data))
	assert.NilError(t, os.Mkdir(data, 0o755))
	nastytree.Make(t, data)
	simplify(t, data)
	r := makeBackup(t, e, s)
	assert.Assert(t, r.Complete(), "%q", r.Missing)
	assert.Assert(t, !list(t, e)[0].Incomplete)

	plain := t.TempDir()
	restictest.Plain(t, repo, "restore", r.ID, "--target", plain, "--sparse")
	nastytree.Compare(t, data, filepath.Join(plain, "data"))
	ours := t.TempDir()
	_, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, ours, nil, nil)
	assert.NilError(t, err)
	nastytree.Compare(t, data, filepath.Join(ours, "data"))
}

// simplify takes from a tree what restic does not keep: sockets, several names of links and pipes,
// and holes, which it keeps only where whole chunks of half a megabyte are zero. (It reads holes,
// too: one of the files would take an hour.)
func simplify(t testing.TB, data string) {
	t.Helper()
	assert.NilError(t, filepath.WalkDir(data, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		switch {
		case entry.Type().IsRegular() && st.Size > 4<<20 && st.Blocks*512 < st.Size, entry.Type()&os.ModeSocket != 0,
			!entry.Type().IsRegular() && st.Nlink > 1:
			return os.Remove(path)
		}
		return nil
	}))
}

func TestHolesAreKept(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	path := filepath.Join(s.Dir, "data/hole")
	file, err := os.Create(path)
	assert.NilError(t, err)
	_, err = file.WriteAt([]byte("in the middle"), 32<<20)
	assert.NilError(t, errors.Join(err, file.Truncate(64<<20), file.Close()))
	r := makeBackup(t, e, s)
	dir := t.TempDir()
	_, err = e.Restore(t.Context(), backup.Backup{ID: r.ID}, dir, nil, nil)
	assert.NilError(t, err)
	was, err := os.ReadFile(path)
	assert.NilError(t, err)
	is, err := os.ReadFile(filepath.Join(dir, "data/hole"))
	assert.NilError(t, err)
	assert.Assert(t, bytes.Equal(was, is))
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(dir, "data/hole"), &st))
	assert.Assert(t, st.Blocks*512 < 4<<20, "%d bytes are allocated", st.Blocks*512)
}

func TestParentMakesFilesUnread(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	first := makeBackup(t, e, s)
	// The same times and size: only a comparison of content would tell.
	path := filepath.Join(s.Dir, "data/one")
	info, err := os.Stat(path)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(path, []byte("X"), 0o644))
	assert.NilError(t, os.Chtimes(path, info.ModTime(), info.ModTime()))
	content := func(r backup.Result) string {
		dir := t.TempDir()
		_, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, dir, []string{"one"}, nil)
		assert.NilError(t, err)
		text, err := os.ReadFile(filepath.Join(dir, "data/one"))
		assert.NilError(t, err)
		return string(text)
	}
	s.Parent, s.Copied = first.ID, true
	assert.Equal(t, content(makeBackup(t, e, s)), "1", "a copy is compared by size and time alone")
	s.Reread = true
	assert.Equal(t, content(makeBackup(t, e, s)), "X")
	s.Copied, s.Reread = false, false
	assert.Equal(t, content(makeBackup(t, e, s)), "X", "its change time tells")
}

func TestAParentThatIsGoneIsNoError(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	s.Parent = strings.Repeat("ab", 32)
	assert.Equal(t, makeBackup(t, e, s).Files, uint64(2))
}

// unreadable makes data/one a file that cannot be read, even by root.
func unreadable(t testing.TB, s backup.Source) {
	t.Helper()
	mounttest.Bind(t, "/proc/self/mem", filepath.Join(s.Dir, "data/one"))
}

func TestWhatCannotBeReadIsNamed(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	unreadable(t, s)
	r := makeBackup(t, e, s)
	assert.Equal(t, r.MissingCount, uint64(1))
	assert.Assert(t, strings.Contains(r.Missing[0], "data/one"), "%q", r.Missing)
	assert.Assert(t, !r.Complete())
	all := list(t, e)
	assert.Equal(t, all[0].ID, r.ID)
	assert.Assert(t, all[0].Incomplete)
	// What there is can be restored.
	restored, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, t.TempDir(), nil, nil)
	assert.NilError(t, err)
	assert.Equal(t, restored.Files, uint64(1))
}

func TestErrorsAreToldApart(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	c := config(t, repo)
	c.Target.Password = "another password"
	_, err := engine(t, c).List(t.Context(), backup.Filter{})
	assert.Assert(t, errors.Is(err, backup.ErrPassword), "%v", err)
	assert.Assert(t, errors.Is(engine(t, c).Init(t.Context()), backup.ErrPassword))

	c = config(t, filepath.Join(t.TempDir(), "none"))
	_, err = engine(t, c).Backup(t.Context(), source(t), nil)
	assert.Assert(t, errors.Is(err, backup.ErrNoRepository), "%v", err)
	c = config(t, filepath.Join(t.TempDir(), "not", "mounted"))
	err = engine(t, c).Init(t.Context())
	assert.ErrorContains(t, err, "is its disk mounted?")

	e := engine(t, config(t, repo))
	for _, id := range []string{strings.Repeat("ab", 32), "latest", "abcdef12"} {
		_, err = e.Restore(t.Context(), backup.Backup{ID: id}, t.TempDir(), nil, nil)
		assert.Assert(t, errors.Is(err, backup.ErrNoBackup), "%v", err)
		_, err = e.Manifest(t.Context(), id)
		assert.Assert(t, errors.Is(err, backup.ErrNoBackup), "%v", err)
	}
	assert.NilError(t, e.Forget(t.Context(), []string{strings.Repeat("ab", 32), "latest"}))
}

// What List has told of is not looked up again, and is missed all the same when it is gone.
func TestARestoreOfWhatIsListedIsOneCall(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	c := config(t, repo)
	makeBackup(t, engine(t, c), source(t))
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	binary := filepath.Join(dir, "restic")
	assert.NilError(t, os.WriteFile(binary, fmt.Appendf(nil, "#!/bin/sh\necho call >> %s\nexec %s \"$@\"\n", calls, c.Binary), 0o755))
	c.Binary = binary
	e := engine(t, c)
	all, err := e.List(t.Context(), backup.Filter{})
	assert.NilError(t, err)
	count := func() int {
		text, err := os.ReadFile(calls)
		assert.NilError(t, err)
		return strings.Count(string(text), "call\n")
	}
	before := count()
	restored, err := e.Restore(t.Context(), all[0], t.TempDir(), nil, nil)
	assert.NilError(t, err)
	assert.Equal(t, restored.Files, uint64(2))
	assert.Equal(t, count()-before, 1)
	wrong := all[0]
	wrong.Bytes++
	_, err = e.Restore(t.Context(), wrong, t.TempDir(), nil, nil)
	assert.ErrorContains(t, err, "were restored")
	assert.NilError(t, e.Forget(t.Context(), []string{all[0].ID}))
	_, err = e.Restore(t.Context(), all[0], t.TempDir(), nil, nil)
	assert.Assert(t, errors.Is(err, backup.ErrNoBackup), "%v", err)
}

func TestOldResticIsRefused(t *testing.T) {
	t.Parallel()
	c := config(t, "/nowhere")
	c.Binary = filepath.Join(t.TempDir(), "restic")
	assert.NilError(t, os.WriteFile(c.Binary, []byte("#!/bin/sh\necho restic 0.16.4 compiled with go1.21\n"), 0o755))
	_, err := engine(t, c).List(t.Context(), backup.Filter{})
	assert.ErrorContains(t, err, "is restic 0.16.4: 0.17 or newer is needed")
}

func TestPathsAreTakenLiterally(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	for _, name := range []string{"a*b", "axb", "[x]", "x", `back\slash`, "qu?", "quo", "!not", "**", "two words"} {
		write(t, s.Dir, "data/"+name, name)
	}
	assert.NilError(t, os.Chmod(filepath.Join(s.Dir, "data"), 0o750))
	assert.NilError(t, os.Chown(filepath.Join(s.Dir, "data"), 999, 998))
	assert.NilError(t, os.Chmod(filepath.Join(s.Dir, "data/sub"), 0o711))
	r := makeBackup(t, e, s)
	dir := t.TempDir()
	restored, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, dir, []string{"a*b", "[x]", `back\slash`, "qu?", "!not", "**", "two words", "sub/two"}, nil)
	assert.NilError(t, err)
	assert.Equal(t, restored.Files, uint64(8))
	for _, left := range []string{"one", "axb", "x", "quo"} {
		assert.NilError(t, os.Remove(filepath.Join(s.Dir, "data", left)))
		_, err := os.Lstat(filepath.Join(dir, "data", left))
		assert.Assert(t, errors.Is(err, os.ErrNotExist))
	}
	info, err := os.Stat(filepath.Join(dir, "data"))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o750))

	_, err = e.Restore(t.Context(), backup.Backup{ID: r.ID}, t.TempDir(), []string{"sub", "sub/three"}, nil)
	assert.ErrorContains(t, err, `has no "sub/three"`)
	for _, bad := range []string{"../etc", "/etc", "a//b", ".", "", "sub/.."} {
		_, err = e.Restore(t.Context(), backup.Backup{ID: r.ID}, t.TempDir(), []string{bad}, nil)
		assert.ErrorContains(t, err, "want a path below the volume")
	}
}

func TestRestoreToAMountPoint(t *testing.T) {
	t.Parallel()
	e := engine(t, config(t, restictest.Repository(t)))
	s := source(t)
	data := filepath.Join(s.Dir, "data")
	assert.NilError(t, os.Chmod(data, 0o2710))
	assert.NilError(t, os.Chown(data, 70, 71))
	assert.NilError(t, os.Chtimes(data, when, when))
	r := makeBackup(t, e, s)
	dir := t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "data"), 0o700))
	mounttest.Bind(t, mounttest.Tmpfs(t, 1<<20), filepath.Join(dir, "data"))
	_, err := e.Restore(t.Context(), backup.Backup{ID: r.ID}, dir, nil, nil)
	assert.NilError(t, err)
	nastytree.Compare(t, data, filepath.Join(dir, "data"))
}

func TestNothingOfOthersIsListedOrRestored(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	e := engine(t, config(t, repo))
	restictest.Plain(t, repo, "backup", source(t).Dir)
	assert.Equal(t, len(list(t, e)), 0)
	foreign := strings.Trim(restictest.Plain(t, repo, "--quiet", "list", "snapshots"), "\n")
	_, err := e.Restore(t.Context(), backup.Backup{ID: foreign}, t.TempDir(), nil, nil)
	assert.Assert(t, errors.Is(err, backup.ErrNoBackup), "%v", err)
	// One that claims to be Berth's, with other things at its top.
	dir := t.TempDir()
	write(t, dir, "evil", "x")
	assert.NilError(t, os.Symlink("/etc", filepath.Join(dir, "data")))
	cmd := restictest.PlainCommand(t, repo, "backup", "--tag", "berth", "evil", "data")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	for _, b := range list(t, e) {
		_, err := e.Restore(t.Context(), backup.Backup{ID: b.ID}, t.TempDir(), nil, nil)
		assert.ErrorContains(t, err, "at its top")
	}
}

func TestForgetPruneCheck(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	e := engine(t, config(t, repo))
	s := source(t)
	noise, err := exec.CommandContext(t.Context(), "head", "-c", "3000000", "/dev/urandom").Output()
	assert.NilError(t, err)
	write(t, s.Dir, "data/noise", string(noise))
	first := makeBackup(t, e, s)
	assert.NilError(t, os.Remove(filepath.Join(s.Dir, "data/noise")))
	second := makeBackup(t, e, s)
	before := size(t, repo)
	assert.NilError(t, e.Forget(t.Context(), []string{first.ID}))
	var steps []string
	assert.NilError(t, e.Prune(t.Context(), func(p backup.Progress) { steps = append(steps, p.Step) }))
	assert.Assert(t, len(steps) > 2, "%q", steps)
	assert.Assert(t, size(t, repo) < before-2_000_000)
	all := list(t, e)
	assert.Equal(t, len(all), 1)
	assert.Equal(t, all[0].ID, second.ID)
	report, err := e.Check(t.Context(), 1, nil)
	assert.NilError(t, err)
	assert.DeepEqual(t, report, backup.Report{})

	damage(t, repo)
	report, err = e.Check(t.Context(), 1, nil)
	assert.NilError(t, err)
	assert.Assert(t, len(report.Errors) > 0)
	assert.Assert(t, strings.Contains(report.Hint, "restic repair packs"), "%q", report.Hint)
}

func size(t testing.TB, dir string) (sum int64) {
	t.Helper()
	assert.NilError(t, filepath.WalkDir(dir, func(_ string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			info, err := entry.Info()
			if err != nil {
				return err
			}
			sum += info.Size()
		}
		return err
	}))
	return sum
}

func TestADiskThatIsFull(t *testing.T) {
	t.Parallel()
	disk := mounttest.Tmpfs(t, 4<<20)
	repo := filepath.Join(disk, "repository")
	assert.NilError(t, os.CopyFS(repo, os.DirFS(restictest.Repository(t))))
	e := engine(t, config(t, repo))
	s := source(t)
	small := makeBackup(t, e, s)
	noise, err := exec.CommandContext(t.Context(), "head", "-c", "9000000", "/dev/urandom").Output()
	assert.NilError(t, err)
	write(t, s.Dir, "data/noise", string(noise))
	_, err = e.Backup(t.Context(), s, nil)
	assert.ErrorContains(t, err, "no space left on device")
	// What is there is good, and as soon as there is room all goes on.
	all := list(t, e)
	assert.Equal(t, len(all), 1)
	assert.Equal(t, all[0].ID, small.ID)
	assert.NilError(t, os.Remove(filepath.Join(s.Dir, "data/noise")))
	assert.NilError(t, e.Prune(t.Context(), nil))
	makeBackup(t, e, s)
}

func TestCancelledBackupLeavesNoLock(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	c := config(t, repo)
	c.Target.UploadLimit = 200
	e := engine(t, c)
	s := source(t)
	noise, err := exec.CommandContext(t.Context(), "head", "-c", "30000000", "/dev/urandom").Output()
	assert.NilError(t, err)
	write(t, s.Dir, "data/noise", string(noise))
	ctx, cancel := context.WithCancel(t.Context())
	_, err = e.Backup(ctx, s, func(backup.Progress) { cancel() })
	assert.Assert(t, errors.Is(err, context.Canceled), "%v", err)
	assert.Equal(t, len(files(t, filepath.Join(repo, "locks"))), 0)
	assert.Equal(t, len(files(t, filepath.Join(c.Dir, "runs"))), 0)
	assert.Equal(t, len(resticBelow(t, os.Getpid(), c)), 0)
}

func files(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	assert.NilError(t, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func TestSecretsAreNotShown(t *testing.T) {
	t.Parallel()
	c := config(t, restictest.Repository(t))
	c.Target.Password = "a-wrong-password-that-is-secret"
	c.Target.Environment = map[string]string{"AWS_SECRET_ACCESS_KEY": "k3y-of-the-cloud"}
	c.Target.Files = map[string]string{"RCLONE_CONFIG": "[remote]\npass = in-the-file-of-rclone\n"}
	script := filepath.Join(t.TempDir(), "restic")
	// It shows what a child is given.
	assert.NilError(t, os.WriteFile(script, []byte(`#!/bin/sh
[ "$1" = version ] && echo restic 0.19.1 && exit
env >`+script+`.env; cat "$RCLONE_CONFIG" >>`+script+`.env; stat -c %a "$RCLONE_CONFIG" >>`+script+`.env
echo "$*" >`+script+`.argv; hostname >`+script+`.host
echo "password $RESTIC_PASSWORD, key $AWS_SECRET_ACCESS_KEY, $(cat $RCLONE_CONFIG)" >&2
exit 1
`), 0o755))
	c.Binary = script
	_, err := engine(t, c).List(t.Context(), backup.Filter{})
	for _, secret := range []string{"a-wrong-password", "k3y-of", "in-the-file"} {
		assert.Assert(t, !strings.Contains(err.Error(), secret), "%v", err)
	}
	assert.ErrorContains(t, err, "password ***, key ***")
	read := func(kind string) string {
		text, err := os.ReadFile(script + kind)
		assert.NilError(t, err)
		return string(text)
	}
	env := read(".env")
	for _, want := range []string{"RESTIC_PASSWORD=a-wrong-password-that-is-secret\n", "AWS_SECRET_ACCESS_KEY=k3y", "pass = in-the-file", "\n600\n"} {
		assert.Assert(t, strings.Contains(env, want), "%q in %s", want, env)
	}
	for _, inherited := range []string{"BERTH_", "GOCACHE", "USER="} {
		assert.Assert(t, !strings.Contains(env, inherited), "%s", env)
	}
	assert.Assert(t, !strings.Contains(read(".argv"), "secret"))
	assert.Assert(t, regexp.MustCompile(`^berth-test-[0-9a-f]{12}\n$`).MatchString(read(".host")), "%q", read(".host"))
	assert.Equal(t, len(files(t, filepath.Join(c.Dir, "runs"))), 0)
}

func TestRacingInitsMakeOneRepository(t *testing.T) {
	t.Parallel()
	repo := filepath.Join(t.TempDir(), "repository")
	var engines []*restic.Engine
	for range 3 {
		engines = append(engines, engine(t, config(t, repo)))
	}
	var all sync.WaitGroup
	errs := make([]error, len(engines))
	for i, e := range engines {
		all.Go(func() { errs[i] = e.Init(t.Context()) })
	}
	all.Wait()
	assert.NilError(t, errors.Join(errs...))
	for _, e := range engines {
		makeBackup(t, e, source(t))
	}
	assert.Equal(t, len(list(t, engines[0])), len(engines))
	assert.Equal(t, len(files(t, filepath.Join(repo, "keys"))), 1)
}

func TestTwoHostsOnOneRepository(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	var all sync.WaitGroup
	ids := make([]string, 2)
	for i := range ids {
		c := config(t, repo)
		c.LockWait = time.Minute
		e := engine(t, c)
		all.Go(func() {
			for range 2 {
				r, err := e.Backup(t.Context(), source(t), nil)
				if err == nil && ids[i] != "" {
					err = e.Forget(t.Context(), []string{ids[i]})
				}
				if err == nil {
					err = e.Prune(t.Context(), nil)
				}
				if err != nil {
					t.Error(err)
				}
				ids[i] = r.ID
			}
		})
	}
	all.Wait()
	e := engine(t, config(t, repo))
	var listed []string
	for _, b := range list(t, e) {
		listed = append(listed, b.ID)
	}
	slices.Sort(ids)
	slices.Sort(listed)
	assert.DeepEqual(t, listed, ids)
	report, err := e.Check(t.Context(), 1, nil)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Errors), 0, "%q", report.Errors)
}

// daemonWord makes the test program a daemon that backs up until it is killed.
const daemonWord = "be-a-daemon"

// daemon is given the repository, its directory, restic, and what to do.
func daemon(args []string) int {
	e, err := restic.New(restic.Config{
		Target: backup.Target{Name: "nas", Repository: args[0], Password: restictest.Password, UploadLimit: 300},
		Binary: args[2], Dir: args[1], Host: "test", Log: quiet(),
	})
	if err == nil {
		_, err = e.Backup(context.Background(), backup.Source{Dir: args[3], Volume: volume, UUID: uuid, Host: "test", Time: when}, func(p backup.Progress) {
			if p.Bytes > 0 {
				fmt.Println("reading")
			}
		})
	}
	fmt.Println("ended:", err)
	return 1
}
