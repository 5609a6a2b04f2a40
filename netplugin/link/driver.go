package link

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Driver is the name of the kernel driver of a link (ETHTOOL_GDRVINFO), as
// "virtio_net" or "veth"; "" when it does not say.
func (h *Handle) Driver(name string) (string, error) {
	driver := ""
	err := h.In(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		info, err := unix.IoctlGetEthtoolDrvinfo(fd, name)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		if err == nil {
			driver = unix.ByteSliceToString(info.Driver[:])
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("driver of link %q: %w", name, err)
	}
	return driver, nil
}

// Wireless reports whether the link is a radio.
func (h *Handle) Wireless(name string) bool {
	_, err := os.Stat("/sys/class/net/" + name + "/phy80211")
	return err == nil
}
