package journal

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// The process is killed before each of the system calls that change files, in turn.
func TestKilledAtEverySystemCall(t *testing.T) {
	for n := 1; ; n++ {
		path := filepath.Join(t.TempDir(), "log")
		out, call := killAt(t, path, n)
		c, rec := openCounters(t, path)
		assert.Assert(t, !rec.Lossy(), "before %s (%d): %s", call, n, rec)
		told := acknowledged(t, out)
		for key, value := range told {
			assert.Assert(t, c.values[key] >= value, "before %s (%d): %s is %d, acknowledged was %d", call, n, key, c.values[key], value)
		}
		// At most the one that was being written is there without having been told.
		assert.Assert(t, c.values["a"]+c.values["b"] <= told["a"]+told["b"]+1, "before %s (%d)", call, n)
		assert.NilError(t, c.log.Close())
		names, err := filepath.Glob(path + newSuffix + "*")
		assert.NilError(t, err)
		assert.Equal(t, len(names), 0, "before %s (%d)", call, n)
		if call == "" {
			assert.Equal(t, told["a"]+told["b"], 8)
			assert.Assert(t, n > 40, "only %d calls were seen", n)
			return
		}
	}
}

// killAt runs script and kills it before the n-th system call that changes a file. It
// returns what was printed, and the name of the call, "" when there were fewer.
func killAt(t *testing.T, path string, n int) (out, call string) {
	t.Helper()
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := child(t, "script", path)
	printed, err := os.Create(filepath.Join(t.TempDir(), "out"))
	assert.NilError(t, err)
	defer printed.Close()
	cmd.Stdout = printed
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	assert.NilError(t, cmd.Start())
	pid := cmd.Process.Pid
	var status unix.WaitStatus
	_, err = unix.Wait4(pid, &status, 0, nil)
	assert.NilError(t, err)
	assert.NilError(t, unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL))
	assert.NilError(t, unix.PtraceSyscall(pid, 0))
	inside := map[int]bool{} // threads that are in a system call
	for {
		thread, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		assert.NilError(t, err)
		if !status.Stopped() {
			if thread == pid {
				break
			}
			continue
		}
		deliver := 0
		switch sig := status.StopSignal(); sig {
		case unix.SIGTRAP | 0x80:
			inside[thread] = !inside[thread]
			name := callOf(thread)
			if call == "" && inside[thread] && name != "" {
				if n--; n == 0 {
					call = name
					assert.NilError(t, unix.Kill(pid, unix.SIGKILL))
					continue
				}
			}
		case unix.SIGTRAP, unix.SIGSTOP: // of the tracing itself
		default:
			deliver = int(sig)
		}
		_ = unix.PtraceSyscall(thread, deliver) // a thread may be gone
	}
	_ = cmd.Wait() // has been waited for
	data, err := os.ReadFile(printed.Name())
	assert.NilError(t, err)
	if call == "" {
		assert.Assert(t, status.Exited() && status.ExitStatus() == 0)
	}
	return strings.TrimSpace(string(data)), call
}

// callOf names the system call that a thread is about to do, if it changes a file.
func callOf(thread int) string {
	var regs unix.PtraceRegs
	if unix.PtraceGetRegs(thread, &regs) != nil {
		return ""
	}
	return map[uint64]string{
		unix.SYS_PWRITE64: "pwrite", unix.SYS_FALLOCATE: "fallocate", unix.SYS_FDATASYNC: "fdatasync",
		unix.SYS_FSYNC: "fsync", unix.SYS_RENAME: "rename", unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename",
		unix.SYS_UNLINKAT: "unlink", unix.SYS_LINKAT: "link", unix.SYS_FLOCK: "flock", unix.SYS_MKDIRAT: "mkdir",
	}[regs.Orig_rax]
}
