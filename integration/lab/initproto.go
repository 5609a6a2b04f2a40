package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The socket between the lab and a host's init carries one request and one
// answer per connection, as JSON in single packets. A "run" request brings the
// command's three standard files along.

// A request asks init for one thing.
type request struct {
	// Op is "run", "start", "stop", "signal" or "services".
	Op string
	// Argv, Env and Dir describe the process of run and start. A Dir that does
	// not exist inside falls back to /.
	Argv []string `json:",omitempty"`
	Env  []string `json:",omitempty"`
	Dir  string   `json:",omitempty"`
	// Name is the service of start, stop and signal.
	Name string `json:",omitempty"`
	// Comm, when set, makes signal go to every process of that name instead.
	Comm string `json:",omitempty"`
	// Log is the file that a service's output is appended to.
	Log string `json:",omitempty"`
	// Restart starts the service again whenever it ends unasked.
	Restart bool `json:",omitempty"`
	// Signal is sent by stop and signal.
	Signal syscall.Signal `json:",omitempty"`
	// Grace is how long stop waits before it sends SIGKILL.
	Grace time.Duration `json:",omitempty"`
}

// A reply answers a request.
type reply struct {
	Error string `json:",omitempty"`
	// ExitCode is the command's, or 128 plus the signal that ended it.
	ExitCode int `json:",omitempty"`
	// Count is how many processes were signalled.
	Count    int             `json:",omitempty"`
	Services []ServiceStatus `json:",omitempty"`
}

// ServiceStatus describes one process that a host's init looks after.
type ServiceStatus struct {
	Name string
	// PID is the process's number inside the host, 0 when it does not run.
	PID int
	// Starts counts how often it was started since boot.
	Starts int
	// LastExit is the exit code of the previous run.
	LastExit int
}

const maxPacket = 128 << 10

func initSocket(dir string) string { return filepath.Join(dir, "init.sock") }

// call sends one request to the init of the host in dir. The connection's end
// ends a running command, so cancelling ctx kills it.
func call(ctx context.Context, dir string, req request, files ...*os.File) (reply, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unixpacket", initSocket(dir))
	if err != nil {
		return reply{}, fmt.Errorf("host in %s does not answer: %w", dir, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	body, err := json.Marshal(req)
	if err != nil {
		return reply{}, err
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix(body, rights, nil); err != nil {
		return reply{}, err
	}
	buf := make([]byte, maxPacket)
	n, err := c.Read(buf)
	if ctx.Err() != nil {
		return reply{}, context.Cause(ctx)
	}
	if err != nil || n == 0 {
		return reply{}, fmt.Errorf("host in %s went down during %s", dir, req.Op)
	}
	var rep reply
	if err := json.Unmarshal(buf[:n], &rep); err != nil {
		return reply{}, err
	}
	if rep.Error != "" {
		return rep, errors.New(rep.Error)
	}
	return rep, nil
}

// receive reads a request and the files that came with it.
func receive(c *net.UnixConn) (request, []*os.File, error) {
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4*8))
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return request{}, nil, err
	}
	if n == 0 {
		return request{}, nil, io.EOF
	}
	var files []*os.File
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return request{}, nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return request{}, nil, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	var req request
	err = json.Unmarshal(buf[:n], &req)
	return req, files, err
}

func send(c *net.UnixConn, rep reply) {
	// Nobody is left to be told when the asker has gone away.
	if body, err := json.Marshal(rep); err == nil {
		_, _ = c.Write(body)
	}
}
