package mounttest

import (
	"bufio"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FirstLines starts the commands together and returns the different lines that they
// begin with. None is let go, by the end of what it reads, before all have said theirs.
func FirstLines(t testing.TB, commands ...*exec.Cmd) map[string]bool {
	t.Helper()
	var outputs []*bufio.Reader
	for _, cmd := range commands {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = in.Close(); _ = cmd.Wait() }()
		outputs = append(outputs, bufio.NewReader(out))
	}
	lines := map[string]bool{}
	for _, out := range outputs {
		line, err := out.ReadString('\n')
		if err != nil {
			t.Error(err)
		}
		lines[strings.TrimSpace(line)] = true
	}
	return lines
}

// HasSysResource tells whether the tests may do what CAP_SYS_RESOURCE allows, as growing
// ext4.
func HasSysResource(t testing.TB) bool {
	t.Helper()
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
