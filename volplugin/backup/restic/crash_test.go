package restic_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/restic"
	"github.com/berth-plugin/berth/volplugin/internal/restictest"
)

// running starts a daemon that is in the middle of a slow backup of s.
func running(t testing.TB, c restic.Config, s backup.Source) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", daemonWord, c.Target.Repository, c.Dir, c.Binary, s.Dir)
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	assert.NilError(t, err)
	assert.Equal(t, line, "reading\n")
	return cmd
}

// resticBelow gives the numbers of restic itself, below a process, as the engine with that
// configuration starts it.
func resticBelow(t testing.TB, pid int, c restic.Config) (pids []int) {
	t.Helper()
	for pid, line := range restictest.Below(t, pid) {
		if strings.HasPrefix(line, c.Binary+" ") && strings.Contains(line, c.Dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// works says that everything does, without help, and that only the good backups are there.
func works(t testing.TB, e *restic.Engine, s backup.Source, before int) {
	t.Helper()
	assert.Equal(t, len(list(t, e)), before)
	assert.NilError(t, os.Remove(filepath.Join(s.Dir, "data/noise")))
	r := makeBackup(t, e, s)
	assert.NilError(t, e.Prune(t.Context(), nil))
	report, err := e.Check(t.Context(), 1, nil)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Errors), 0, "%q", report.Errors)
	assert.NilError(t, e.Forget(t.Context(), []string{r.ID}))
	assert.Equal(t, len(list(t, e)), before)
}

func noise(t testing.TB, s backup.Source, bytes string) {
	t.Helper()
	text, err := exec.CommandContext(t.Context(), "head", "-c", bytes, "/dev/urandom").Output()
	assert.NilError(t, err)
	write(t, s.Dir, "data/noise", string(text))
}

func TestAKilledDaemonTakesResticWithIt(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	c := config(t, repo)
	s := source(t)
	noise(t, s, "40000000")
	daemon := running(t, c, s)
	pids := resticBelow(t, daemon.Process.Pid, c)
	assert.Equal(t, len(pids), 1)
	assert.NilError(t, daemon.Process.Kill())
	_ = daemon.Wait()
	gone(t, pids[0])
	assert.Assert(t, len(files(t, filepath.Join(repo, "locks"))) > 0, "it did not hold a lock: nothing is tested")
	assert.Assert(t, len(files(t, filepath.Join(c.Dir, "runs"))) > 0)
	e := engine(t, c)
	works(t, e, s, 0)
	assert.Equal(t, len(files(t, filepath.Join(repo, "locks"))), 0)
	assert.Equal(t, len(files(t, filepath.Join(c.Dir, "runs"))), 0)
}

func gone(t testing.TB, pid int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); unix.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d lives on", pid)
		}
	}
}

func TestAKilledResticIsAnErrorAndNothingElse(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	c := config(t, repo)
	c.Target.UploadLimit = 300
	e := engine(t, c)
	s := source(t)
	noise(t, s, "40000000")
	killed := false
	_, err := e.Backup(t.Context(), s, func(p backup.Progress) {
		if p.Bytes > 0 && !killed {
			killed = true
			for _, pid := range resticBelow(t, os.Getpid(), c) {
				assert.Check(t, unix.Kill(pid, unix.SIGKILL))
			}
		}
	})
	assert.ErrorContains(t, err, "ended by signal killed")
	assert.Assert(t, len(files(t, filepath.Join(repo, "locks"))) > 0)
	c.Target.UploadLimit = 0
	works(t, engine(t, c), s, 0)
}

func TestALockOfAnotherMachineIsRespected(t *testing.T) {
	t.Parallel()
	repo := restictest.Repository(t)
	other := config(t, repo)
	s := source(t)
	noise(t, s, "40000000")
	daemon := running(t, other, s)
	defer func() { _ = daemon.Process.Kill(); _ = daemon.Wait() }()
	c := config(t, repo)
	c.LockWait = time.Second
	e := engine(t, c)
	err := e.Prune(t.Context(), nil)
	assert.ErrorIs(t, err, backup.ErrLocked)
	assert.Assert(t, len(resticBelow(t, daemon.Process.Pid, other)) == 1, "it goes on")
	assert.Equal(t, len(files(t, filepath.Join(repo, "locks"))), 1)
	// Backups may be made together.
	makeBackup(t, e, source(t))
	// Another engine of the same host waits for the lease, not for the lock.
	c.Dir = other.Dir
	assert.ErrorIs(t, engine(t, c).Prune(t.Context(), nil), backup.ErrLocked)
}
