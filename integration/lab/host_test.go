package lab

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// newBareHost is a host without an engine, which boots in a moment.
func newBareHost(t *testing.T, name string, lan *LAN) *Host {
	t.Helper()
	return NewHost(t, Options{Name: TestPrefix() + name, Engine: "20.10", NoEngine: true, LAN: lan})
}

func TestCommandsInAHostHaveInputOutputAndExitCode(t *testing.T) {
	h := newBareHost(t, "run", nil)
	var out, errs strings.Builder
	code, err := h.Run(t.Context(), Command{
		Argv:  []string{"sh", "-c", "cat; pwd; echo $X >&2; exit 7"},
		Stdin: strings.NewReader("in\n"), Stdout: &out, Stderr: &errs, Env: []string{"X=env"}, Dir: "/etc",
	})
	assert.NilError(t, err)
	assert.Equal(t, code, 7)
	assert.Equal(t, out.String(), "in\n/etc\n")
	assert.Equal(t, errs.String(), "env\n")

	_, err = h.Exec(t.Context(), "no-such-program")
	assert.ErrorContains(t, err, "no-such-program")
	var exit *ExitError
	assert.Assert(t, !errors.As(err, &exit), "a command that cannot start has no exit code")
	res, err := h.Exec(t.Context(), "sh", "-c", "kill -9 $$")
	assert.Assert(t, errors.As(err, &exit))
	assert.Equal(t, res.ExitCode, 137)
}

func TestCancellingKillsTheCommand(t *testing.T) {
	h := newBareHost(t, "cancel", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := h.Exec(ctx, "sleep", "4711")
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for {
		pids, err := h.pids(ctx, "sleep")
		assert.NilError(t, err)
		if len(pids) == 0 {
			break
		}
		assert.NilError(t, pause(ctx, 20*time.Millisecond))
	}
}

func TestRebootForgetsTheKernelAndKeepsTheDisk(t *testing.T) {
	h := newBareHost(t, "boot", nil)
	for _, argv := range [][]string{
		{"ip", "link", "add", "br7", "type", "bridge"},
		{"nft", "add", "table", "inet", "left"},
		{"mount", "-t", "tmpfs", "tmpfs", "/mnt"},
		{"touch", "/run/gone", "/etc/kept", "/var/lib/berth/kept"},
	} {
		_, err := h.Exec(t.Context(), argv...)
		assert.NilError(t, err)
	}
	before, err := h.Snapshot(t.Context())
	assert.NilError(t, err)
	assert.NilError(t, h.Reboot(t.Context()))
	_, err = h.Exec(t.Context(), "ls", "/etc/kept", "/var/lib/berth/kept")
	assert.NilError(t, err)
	_, err = h.Exec(t.Context(), "ls", "/run/gone")
	assert.ErrorContains(t, err, "No such file")
	after, err := h.Snapshot(t.Context())
	assert.NilError(t, err)
	assert.DeepEqual(t, before.Diff(after), []string{"- links: br7", "- nftables: table inet left", "- nftables: table inet left"})
}

func TestServicesComeBackUntilTheyAreStopped(t *testing.T) {
	h := newBareHost(t, "serv", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	assert.NilError(t, h.StartEcho(ctx, 81))
	first, err := h.service(ctx, "echo-81")
	assert.NilError(t, err)
	_, err = call(ctx, h.Dir, request{Op: "signal", Name: "echo-81", Signal: 9})
	assert.NilError(t, err)
	for {
		s, err := h.service(ctx, "echo-81")
		assert.NilError(t, err)
		if s.Starts == first.Starts+1 && s.PID != 0 {
			assert.Equal(t, s.LastExit, 137)
			break
		}
		assert.NilError(t, pause(ctx, 20*time.Millisecond))
	}
	_, err = call(ctx, h.Dir, request{Op: "stop", Name: "echo-81", Signal: 15, Grace: 5 * time.Second})
	assert.NilError(t, err)
	s, err := h.service(ctx, "echo-81")
	assert.NilError(t, err)
	assert.Equal(t, s.PID, 0)
}

func TestHostsOnALANSeeOneAnotherAlsoAfterAReboot(t *testing.T) {
	l := NewLAN(t, LANOptions{Name: TestPrefix() + "lan"})
	h := newBareHost(t, "lan-h", l)
	check := func() {
		t.Helper()
		res, err := h.Exec(t.Context(), "wget", "-qO-", "http://"+l.Addr4(l.Neighbour).String()+"/")
		assert.NilError(t, err)
		assert.Equal(t, res.Stdout, "peer "+l.Addr4(h).String()+"\n")
		res, err = h.Exec(t.Context(), "wget", "-qO-", "http://["+l.Addr6(l.Neighbour).String()+"]:8080/")
		assert.NilError(t, err)
		assert.Equal(t, res.Stdout, "peer "+l.Addr6(h).String()+"\n")
		_, err = h.Exec(t.Context(), "ping", "-c", "1", l.Addr4(l.Router).String())
		assert.NilError(t, err)
	}
	assert.Equal(t, l.Addr4(h).String(), "198.51.100.11")
	assert.Equal(t, l.Addr6(h).String(), "2001:db8:1::b")
	check()
	assert.NilError(t, h.Reboot(t.Context()))
	check()
}

func TestDetachedHostIsTakenOverByName(t *testing.T) {
	name := TestPrefix() + "det"
	_, err := New(t.Context(), Options{Name: name, Engine: "20.10", NoEngine: true, Detached: true})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, Remove(name, false)) })
	names, err := Hosts()
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(strings.Join(names, " "), name))
	h, err := Open(name)
	assert.NilError(t, err)
	_, err = h.Exec(t.Context(), "touch", "/etc/kept")
	assert.NilError(t, err)
	assert.NilError(t, h.Reboot(t.Context()))
	_, err = h.Exec(t.Context(), "ls", "/etc/kept")
	assert.NilError(t, err)
	_, err = New(t.Context(), Options{Name: name, Engine: "20.10", NoEngine: true})
	assert.ErrorContains(t, err, "berth-lab down "+name)
}

func TestLeftBehindFindsARunningHost(t *testing.T) {
	h := newBareHost(t, "left", nil)
	left, err := LeftBehind(h.Name)
	assert.NilError(t, err)
	text := strings.Join(left, "\n")
	for _, want := range []string{"host directory " + h.Dir, "network namespace /run/netns/bl-" + h.Name, "cgroup ", "process "} {
		assert.Assert(t, strings.Contains(text, want), "no %q in:\n%s", want, text)
	}
}

func TestRecorderPassesCallsOnAndWritesThemDown(t *testing.T) {
	h := newBareHost(t, "rec", nil)
	target, listen := filepath.Join(h.Dir, "real.sock"), filepath.Join(h.Dir, "rec.sock")
	l, err := net.Listen("unix", target)
	assert.NilError(t, err)
	plugin := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, r.URL.Path+" got "+string(body))
	})}
	go func() { _ = plugin.Serve(l) }()
	t.Cleanup(func() { assert.NilError(t, plugin.Close()) })

	file, err := h.Record(t.Context(), listen, target)
	assert.NilError(t, err)
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", listen)
	}}}
	resp, err := client.Post("http://plugin/VolumeDriver.Get", "", strings.NewReader(`{"Name":"x"}`))
	assert.NilError(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	assert.NilError(t, err)
	assert.Equal(t, resp.StatusCode, http.StatusTeapot)
	assert.Equal(t, string(answer), `/VolumeDriver.Get got {"Name":"x"}`)

	text, err := os.ReadFile(file)
	assert.NilError(t, err)
	var said RecordedCall
	assert.NilError(t, json.Unmarshal(text, &said))
	said.Headers = nil
	assert.DeepEqual(t, said, RecordedCall{
		Method: "/VolumeDriver.Get", Body: `{"Name":"x"}`, Status: http.StatusTeapot, Answer: string(answer),
	})
}

func TestFurtherLinksToTheLANHaveNoAddress(t *testing.T) {
	l := NewLAN(t, LANOptions{Name: TestPrefix() + "nics"})
	h := NewHost(t, Options{Name: TestPrefix() + "nics-h", Engine: "20.10", NoEngine: true, LAN: l, NICs: 2})
	check := func() {
		t.Helper()
		res, err := h.Exec(t.Context(), "ip", "-o", "-4", "addr", "show", "dev", "eth1")
		assert.NilError(t, err)
		assert.Equal(t, res.Stdout, "")
		res, err = h.Exec(t.Context(), "cat", "/sys/class/net/eth1/address")
		assert.NilError(t, err)
		assert.Equal(t, res.Stdout, "02:00:5e:00:54:0b\n")
		// It is wired: the neighbour answers who asks for it there.
		_, err = h.Exec(t.Context(), "busybox", "arping", "-c", "1", "-w", "5", "-I", "eth1", l.Addr4(l.Neighbour).String())
		assert.NilError(t, err)
	}
	check()
	assert.NilError(t, h.Reboot(t.Context()))
	check()
}

func TestDHCPServerComesAndGoes(t *testing.T) {
	l := NewLAN(t, LANOptions{Name: TestPrefix() + "dhcp"})
	ask := func() (Result, error) {
		return l.Neighbour.Exec(t.Context(), "busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-t", "2", "-T", "1", "-s", "/bin/true")
	}
	_, err := ask()
	assert.ErrorContains(t, err, "udhcpc")
	assert.NilError(t, l.StartDHCP(t.Context(), ""))
	res, err := ask()
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(res.Stderr, "lease of 198.51.100.1"), res.Stderr)
	res, err = l.Router.Exec(t.Context(), "cat", DHCPLeases)
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(res.Stdout, l.mac(l.Neighbour, 0)), res.Stdout)

	assert.NilError(t, l.StopDHCP(t.Context()))
	_, err = ask()
	assert.ErrorContains(t, err, "udhcpc")
	assert.NilError(t, l.StartDHCP(t.Context(), "198.51.100.200,198.51.100.200,2m", "--dhcp-host="+l.mac(l.Neighbour, 0)+",198.51.100.200"))
	res, err = ask()
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(res.Stderr, "lease of 198.51.100.200"), res.Stderr)
}
