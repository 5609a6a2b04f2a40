package link

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Sysctl reads a setting by its path below /proc/sys/net ("ipv4/ip_forward").
// The error is fs.ErrNotExist when the kernel has no such setting.
func (h *Handle) Sysctl(path string) (string, error) {
	var value string
	err := h.In(func() error {
		b, err := os.ReadFile(filepath.Join(h.sysctl, path))
		value = strings.TrimSpace(string(b))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read sysctl net/%s: %w", path, err)
	}
	return value, nil
}

// SetSysctl writes a setting unless it has the value already. The error says what
// to do when the setting cannot be written.
func (h *Handle) SetSysctl(path, value string) error {
	have, err := h.Sysctl(path)
	if err != nil || have == value {
		return err
	}
	err = h.In(func() error {
		// Not os.WriteFile: it would create a file below a wrong root.
		f, err := os.OpenFile(filepath.Join(h.sysctl, path), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(value)
		return errors.Join(err, f.Close())
	})
	return h.sysctlError(path, value, err)
}

// CheckSysctl says whether SetSysctl with this value would succeed.
func (h *Handle) CheckSysctl(path, value string) error {
	have, err := h.Sysctl(path)
	if err != nil || have == value {
		return err
	}
	err = h.In(func() error { return unix.Access(filepath.Join(h.sysctl, path), unix.W_OK) })
	return h.sysctlError(path, value, err)
}

func (h *Handle) sysctlError(path, value string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("sysctl net/%s must be %s and %s is not writable: run `sysctl -w net.%s=%s` on the host, or give the plugin a writable view of /proc/sys/net: %w",
			path, value, h.sysctl, strings.ReplaceAll(path, "/", "."), value, err)
	}
	return fmt.Errorf("set sysctl net/%s to %s: %w", path, value, err)
}

// bridgeSysctls decides about IPv6 on the host's side of a network, before the
// bridge comes up. A kernel without IPv6 has nothing to decide, except that a
// network with IPv6 needs it. ICMP redirects are turned off as far as it depends on
// the bridge (conf/all turns them on as well): a neighbour that a published port
// leads to does not know the port.
func (h *Handle) bridgeSysctls(name string, ipv6 bool) error {
	if err := h.SetSysctl("ipv4/conf/"+name+"/send_redirects", "0"); err != nil {
		return err
	}
	conf := "ipv6/conf/" + name + "/"
	if !ipv6 {
		return h.disableIPv6(name)
	}
	for _, s := range []struct{ key, value string }{
		{"accept_ra", "0"},  // a container must not become the host's router
		{"accept_dad", "0"}, // no delay: the address is ours to give
		{"disable_ipv6", "0"},
	} {
		err := h.SetSysctl(conf+s.key, s.value)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("network on bridge %q has IPv6 addresses, but IPv6 is off in this kernel: %w", name, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// RouteLocalnet says whether packets to 127.0.0.0/8 may leave by a bridge: those
// to ports that are published on the host's loopback address. A bridge that is
// gone is success where it is turned off.
func (h *Handle) RouteLocalnet(bridge string, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	err := h.SetSysctl("ipv4/conf/"+bridge+"/route_localnet", value)
	if !on && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (h *Handle) disableIPv6(name string) error {
	err := h.SetSysctl("ipv6/conf/"+name+"/disable_ipv6", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
