package options

import (
	"slices"
	"strings"

	"github.com/berth-plugin/berth/volplugin/netfs"
)

const (
	shareTypes = "want nfs, nfs4 or cifs"
	bindAdvice = "bind mounts of host directories (o=bind,device=PATH of the local driver) are not supported; use -v PATH:PATH for the container or create the volume with the local driver"
)

// checkShareOption looks at one of type, device and o, so that the first wrong one
// of all options is named. What they are together is parseShare's.
func checkShareOption(name, value string, given map[string]string) error {
	if isBind(given["o"]) && name != "type" {
		return wrong(name, value, bindAdvice)
	}
	if len(value) > maxText || !printable(value) {
		return wrong(name, value, "want at most %d bytes of printable text", maxText)
	}
	if name != "type" {
		return nil
	}
	switch value {
	case "nfs", "nfs4", "cifs":
		return nil
	case "none", "bind":
		if !isBind(given["o"]) {
			return wrong(name, value, bindAdvice)
		}
		return nil // said of o
	case "tmpfs":
		return wrong(name, value, "a volume in memory would not outlive its containers; use --tmpfs PATH for the container or create the volume with the local driver")
	case "smb", "smb3", "smbfs":
		return wrong(name, value, "did you mean cifs?")
	case "nfs3":
		return wrong(name, value, "use type=nfs with o=vers=3")
	case "btrfs", "xfs", "ext4", "ext3", "ext2", "zfs":
		return wrong(name, value, shareTypes+"; disks are mounted on the host, below or as a volume root, and the file system of an image is chosen by fs")
	case "gp2", "gp3", "io1", "io2", "st1", "sc1", "standard":
		return wrong(name, value, shareTypes+"; convoy's EBS volumes are not supported")
	}
	return wrong(name, value, shareTypes)
}

// parseShare puts type, device and o together; nil when none of them is given.
func parseShare(given map[string]string) (*Share, error) {
	kind, hasType := given["type"]
	device, hasDevice := given["device"]
	o, hasO := given["o"]
	switch {
	case !hasType && hasDevice:
		return nil, wrong("device", device, "it needs type=nfs, nfs4 or cifs")
	case !hasType && hasO:
		return nil, wrong("o", o, "it needs type=nfs, nfs4 or cifs and device=")
	case !hasType:
		return nil, nil
	case !hasDevice:
		return nil, wrong("type", kind, "it needs device=, as %s", exampleDevice(kind))
	}
	share := Share{Type: kind, Device: device, Options: o}
	if _, err := netfs.Parse(netfs.Source(share)); err != nil {
		return nil, err
	}
	return &share, nil
}

func exampleDevice(kind string) string {
	if kind == "cifs" {
		return "//HOST/SHARE"
	}
	return "HOST:/PATH, or :/PATH with o=addr=HOST"
}

// isBind reads local's `o` option. Two commas are one within a value.
func isBind(o string) bool {
	flags := strings.Split(strings.ReplaceAll(o, ",,", ""), ",")
	return slices.Contains(flags, "bind") || slices.Contains(flags, "rbind")
}
