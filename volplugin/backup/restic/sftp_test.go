package restic_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/restictest"
)

// sshd serves sftp to root on a port of the loopback address, and gives what a target needs
// to know of it. accepted tells whether it has let somebody in.
func sshd(t testing.TB) (address string, files map[string]string, accepted func() bool) {
	t.Helper()
	dir := t.TempDir()
	run := func(argv ...string) {
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
		assert.NilError(t, err, "%q: %s", argv, out)
	}
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(dir, name))
		assert.NilError(t, err)
		return string(text)
	}
	for _, name := range []string{"host", "user"} {
		run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name))
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	_, port, err := net.SplitHostPort(l.Addr().String())
	assert.NilError(t, err)
	assert.NilError(t, l.Close())
	write(t, dir, "sshd_config", fmt.Sprintf(`Port %s
ListenAddress 127.0.0.1
HostKey %s/host
AuthorizedKeysFile %s/user.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
`, port, dir, dir))
	assert.NilError(t, os.MkdirAll("/run/sshd", 0o755))
	cmd := exec.CommandContext(t.Context(), "/usr/sbin/sshd", "-D", "-f", filepath.Join(dir, "sshd_config"), "-E", filepath.Join(dir, "log"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	address = "127.0.0.1:" + port
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
		if err == nil {
			_ = c.Close()
			break
		}
		assert.Assert(t, time.Now().Before(end), "sshd does not answer: %v", err)
	}
	key := strings.Join(strings.Fields(read("host.pub"))[:2], " ")
	files = map[string]string{backup.SSHKey: read("user"), backup.KnownHosts: "[127.0.0.1]:" + port + " " + key + "\n"}
	return address, files, func() bool { return strings.Contains(read("log"), "Accepted publickey") }
}

func TestOverSSH(t *testing.T) {
	t.Parallel()
	address, files, accepted := sshd(t)
	repo := restictest.Repository(t)
	c := config(t, "sftp://root@"+address+"/"+repo)
	c.Target.Files = files
	r := makeBackup(t, engine(t, c), source(t))
	all := list(t, engine(t, config(t, repo)))
	assert.Equal(t, len(all), 1)
	assert.Equal(t, all[0].ID, r.ID)
	assert.Assert(t, accepted())

	// A server whose key is another one is not spoken to, and one that is not known neither.
	other, itsFiles, accepted := sshd(t)
	another := strings.ReplaceAll(files[backup.KnownHosts], strings.TrimPrefix(address, "127.0.0.1:"), strings.TrimPrefix(other, "127.0.0.1:"))
	refused := func(files map[string]string, want string) {
		t.Helper()
		c := config(t, "sftp://root@"+other+"/"+repo)
		c.Target.Files = files
		_, err := engine(t, c).List(t.Context(), backup.Filter{})
		assert.ErrorContains(t, err, want)
		assert.Assert(t, !strings.Contains(err.Error(), "@@") && !strings.Contains(err.Error(), "\n") && !strings.Contains(err.Error(), c.Dir), "%s", err)
	}
	mine := itsFiles[backup.SSHKey]
	refused(map[string]string{backup.SSHKey: mine, backup.KnownHosts: another}, "has changed and you have requested strict checking.; Host key verification failed.")
	refused(map[string]string{backup.SSHKey: mine, backup.KnownHosts: ""}, "Host key verification failed.; unable to open")
	assert.Assert(t, !accepted())
	refused(map[string]string{backup.SSHKey: files[backup.SSHKey], backup.KnownHosts: itsFiles[backup.KnownHosts]}, "Permission denied")
	refused(map[string]string{backup.KnownHosts: itsFiles[backup.KnownHosts]}, "; the target has no --ssh-key; unable to open")
}
