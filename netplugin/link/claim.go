package link

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// Claim makes this process the only Berth in the handle's network namespace until
// release is called or the process ends. If there is one already the error is a
// fault.Conflict.
func (h *Handle) Claim() (release func() error, err error) {
	// Abstract socket names belong to a network namespace, and the kernel frees
	// them with the process: no file that could be stale.
	var socket *net.UnixListener
	err = h.In(func() (err error) {
		socket, err = net.ListenUnix("unix", &net.UnixAddr{Name: "@berth-network", Net: "unix"})
		return err
	})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fault.Conflict("another Berth network plugin works in this network namespace: stop it first (systemctl stop berthd, or docker plugin disable)")
	}
	if err != nil {
		return nil, fmt.Errorf("claim the network namespace: %w", err)
	}
	return socket.Close, nil
}
