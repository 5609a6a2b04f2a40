package lab

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"time"
)

// DHCPRange is what StartDHCP hands out when it is not told otherwise.
const DHCPRange = "198.51.100.100,198.51.100.149,255.255.255.0,2m"

// DHCPLeases is where on the router the DHCP server keeps its leases, one a line: time
// of expiry, MAC, address, name, client ID. It stays when the server ends.
const DHCPLeases = "/var/lib/dhcp.leases"

const dhcpService = "dhcp"

// StartDHCP starts a DHCP server on the LAN's router. leases is a --dhcp-range of
// dnsmasq, DHCPRange when empty; args are further arguments for it. It answers at once,
// since it does not look whether somebody has the address already.
func (l *LAN) StartDHCP(ctx context.Context, leases string, args ...string) error {
	if leases == "" {
		leases = DHCPRange
	}
	argv := append([]string{"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--log-facility=-", "--log-dhcp",
		"--port=0", "--interface=eth0", "--bind-interfaces", "--no-ping", "--dhcp-authoritative",
		"--dhcp-leasefile=" + DHCPLeases, "--dhcp-range=" + leases}, args...)
	_, err := call(ctx, l.Router.Dir, request{
		Op: "start", Name: dhcpService, Argv: argv, Log: filepath.Join(l.Router.Dir, "log", "dhcp.log"),
	})
	if err != nil {
		return err
	}
	// It listens before it is ready; what comes then waits in its socket.
	if err := l.Router.eventually(ctx, 5*time.Second, "busybox", "sh", "-c", "grep -q ':0043 ' /proc/net/udp"); err != nil {
		return fmt.Errorf("dhcp server: %w: %s", err, l.Router.lastLine("dhcp.log"))
	}
	return nil
}

// StopDHCP ends the DHCP server. Nobody is told, as when its machine fails.
func (l *LAN) StopDHCP(ctx context.Context) error {
	_, err := call(ctx, l.Router.Dir, request{Op: "stop", Name: dhcpService, Signal: syscall.SIGKILL, Grace: 5 * time.Second})
	return err
}
