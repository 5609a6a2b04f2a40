package main

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// claimName is an abstract socket. Those belong to a network namespace and go
// with the process that holds them, so it is the lock that two daemons on one
// table of rules need, whatever their state directories are.
const claimName = "@berth/network"

// claimNetworkNamespace makes this daemon the only one that serves networks in its
// network namespace, until the listener is closed.
func claimNetworkNamespace() (net.Listener, error) {
	l, err := net.Listen("unix", claimName)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fault.Conflict("another Berth daemon%s serves this network namespace; disable that plugin or stop that daemon first", holder())
	}
	if err != nil {
		return nil, fmt.Errorf("claim the network namespace: %w", err)
	}
	return l, nil
}

// holder tells the process that holds the claim, if it can be told. A process in
// another PID namespace shows as 0.
func holder() string {
	conn, err := net.DialTimeout("unix", claimName, time.Second)
	if err != nil {
		return ""
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return ""
	}
	pid := 0
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if err != nil || pid == 0 {
		return ""
	}
	return fmt.Sprintf(" (process %d)", pid)
}
