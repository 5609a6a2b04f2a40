package netfs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	// lookupTime bounds finding the server's address.
	lookupTime = 5 * time.Second
	// dialTime bounds the first word with the server, for each of its addresses.
	dialTime = 5 * time.Second
	// pointMode of directories that are mounted on: nobody writes into one that is
	// not mounted by mistake.
	pointMode = 0
	// maxCredentials bounds a file of credentials, in bytes.
	maxCredentials = 4 << 10
)

// A Mounter mounts shares below a directory that nobody else uses. Its methods may be
// called concurrently for different shares.
type Mounter struct {
	base  string
	mount MountFunc
}

// A MountFunc does what mount(2) does.
type MountFunc func(source, target, fstype string, flags uintptr, data string) error

// NewMounter uses the directory base, which is made when the first share is mounted.
// mount is for tests; nil is mount(2).
func NewMounter(base string, mount MountFunc) (*Mounter, error) {
	if mount == nil {
		mount = unix.Mount
	}
	if !filepath.IsAbs(base) {
		return nil, fault.Invalid("directory of shares %q: want an absolute path", base)
	}
	return &Mounter{base: filepath.Clean(base), mount: mount}, nil
}

// Path at which the share is mounted, now or later.
func (m *Mounter) Path(s Share) string {
	sum := sha256.Sum256([]byte(s.ID()))
	return filepath.Join(m.base, hex.EncodeToString(sum[:8]))
}

// Mounted tells whether the share is. It does not touch the server.
func (m *Mounter) Mounted(s Share) (bool, error) {
	n, err := layers(m.Path(s))
	return n > 0, err
}

// layers counts the mounts at exactly path.
func layers(path string) (int, error) {
	// mountinfo shows paths without symbolic links.
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	path = filepath.Join(dir, filepath.Base(path))
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return info.Mountpoint != path, false
	})
	if err != nil {
		return 0, fmt.Errorf("read mountinfo: %w", err)
	}
	return len(mounts), nil
}

// Mount mounts the share unless it is mounted. When the directory is missing on the
// server, the nearest one above it that can be mounted is, and the rest is made in it.
// Errors about the server are unavailable. ctx bounds all but mount(2) itself.
func (m *Mounter) Mount(ctx context.Context, s Share) error {
	mounted, err := m.Mounted(s)
	if err != nil || mounted {
		return err
	}
	point := m.Path(s)
	if err := makePoint(point); err != nil {
		return err
	}
	address, err := s.reach(ctx)
	if err != nil {
		return err
	}
	err = m.attach(ctx, s, s.path, address, point)
	if errors.Is(err, fs.ErrNotExist) {
		if err = m.makeMissing(ctx, s, address); err == nil {
			err = m.attach(ctx, s, s.path, address, point)
		}
	}
	return err
}

func makePoint(point string) error {
	if err := os.MkdirAll(filepath.Dir(point), 0o700); err != nil {
		return fmt.Errorf("directory of shares: %w", err)
	}
	if err := os.Mkdir(point, pointMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("directory of shares: %w", err)
	}
	return nil
}

// Unmount unmounts the share; one that is not mounted is no error. The error is a
// conflict when it is busy. lazy takes it out of sight whoever uses it, and does not
// wait for the server.
func (m *Mounter) Unmount(s Share, lazy bool) error {
	point := m.Path(s)
	n, err := layers(point)
	if err != nil {
		return err
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	for range n {
		switch err := unix.Unmount(point, flags); err {
		case nil, unix.EINVAL, unix.ENOENT:
		case unix.EBUSY:
			return fault.Conflict("unmount share %s: it is busy", s)
		default:
			return fmt.Errorf("unmount share %s: %w", s, err)
		}
	}
	// rmdir fails on whatever is not an empty, unmounted directory.
	if err := unix.Rmdir(point); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove mount point %s: %w", point, err)
	}
	return nil
}

// reach finds the server's address and speaks to it, where that can be done. A server
// that is down is found out here and not within mount(2), which takes minutes.
func (s Share) reach(ctx context.Context) (netip.Addr, error) {
	host := s.server
	if s.addr != "" {
		host = s.addr
	}
	addresses, err := lookup(ctx, host)
	if err != nil {
		return netip.Addr{}, fault.Unavailable("share %s: find the address of server %s: %w", s, host, err)
	}
	if proto, _ := s.get("proto"); strings.HasSuffix(proto, "6") {
		addresses = slices.DeleteFunc(addresses, netip.Addr.Is4)
	}
	if len(addresses) == 0 {
		return netip.Addr{}, fault.Unavailable("share %s: server %s has no IPv6 address", s, host)
	}
	port := s.probePort()
	if port == "" {
		return addresses[0], nil
	}
	var errs []error
	for _, address := range addresses {
		dialer := net.Dialer{Timeout: dialTime}
		conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(address.String(), port))
		if err == nil {
			return address, conn.Close()
		}
		errs = append(errs, err)
	}
	return netip.Addr{}, fault.Unavailable("share %s: server %s does not answer: %w", s, host, errors.Join(errs...))
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if address, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{address}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	for i, address := range found {
		found[i] = address.Unmap()
	}
	// Few servers listen on IPv6 alone.
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return found, nil
}

// probePort is where the server listens for TCP, "" when that is not known.
func (s Share) probePort() string {
	if port, ok := s.get("port"); ok {
		return port
	}
	if s.cifs {
		return "445"
	}
	proto, _ := s.get("proto")
	_, rdma := s.get("rdma")
	_, udp := s.get("udp")
	// Version 3 asks the server's port mapper.
	if versions := s.versions(); rdma || udp || strings.HasPrefix(proto, "udp") || strings.HasPrefix(proto, "rdma") || len(versions) == 1 && versions[0] == "3" {
		return ""
	}
	return "2049"
}

// versions of NFS to try, in order; "" is what the options say.
func (s Share) versions() []string {
	version, given := s.get("vers", "nfsvers")
	_, minor := s.get("minorversion")
	for _, o := range s.data {
		if o.name == "v3" || o.name == "v4" || strings.HasPrefix(o.name, "v4.") {
			version, given = o.name[1:], true
		}
	}
	switch {
	case given && version == "4" && !minor, !given && s.source.Type == "nfs4":
		return []string{"4.2", "4.1", "4.0"}
	case given && strings.HasPrefix(version, "3"):
		return []string{"3"}
	case given:
		return []string{""}
	}
	return []string{"4.2", "4.1", "4.0", "3"}
}

// attach calls mount(2) for a directory of the share's server.
func (m *Mounter) attach(ctx context.Context, s Share, dir string, address netip.Addr, target string) error {
	if s.cifs {
		data, err := s.cifsData(dir, address)
		if err != nil {
			return err
		}
		return s.failed(dir, m.mount(s.at(dir), target, "cifs", s.flags, data))
	}
	var err error
	for _, version := range s.versions() {
		if err := ctx.Err(); err != nil {
			return err
		}
		err = m.mount(s.at(dir), target, "nfs", s.flags, s.nfsData(version, address))
		if !errors.Is(err, unix.EPROTONOSUPPORT) {
			break
		}
	}
	return s.failed(dir, err)
}

// at is String for another directory of the server.
func (s Share) at(dir string) string {
	s.path = dir
	return s.String()
}

// nfsData is mount(2)'s data for NFS. version replaces what the options say unless "".
func (s Share) nfsData(version string, address netip.Addr) string {
	var list []string
	for _, o := range s.data {
		isVersion := o.name == "vers" || o.name == "nfsvers" || o.name == "v3" || o.name == "v4" || strings.HasPrefix(o.name, "v4.")
		if version == "" || !isVersion {
			list = append(list, o.String())
		}
	}
	if version != "" {
		list = append(list, "vers="+version)
	}
	return strings.Join(append(list, "addr="+address.String()), ",")
}

// cifsData is mount(2)'s data for CIFS. It holds secrets.
func (s Share) cifsData(dir string, address netip.Addr) (string, error) {
	name, prefix, _ := strings.Cut(strings.TrimPrefix(dir, "/"), "/")
	list := []string{"ip=" + address.String(), `unc=\\` + s.server + `\` + name}
	if prefix != "" {
		list = append(list, "prefixpath="+prefix)
	}
	for _, o := range s.data {
		if isCredentials(o.name) {
			more, err := readCredentials(o.value)
			if err != nil {
				return "", fault.Unavailable("share %s: %w", s, err)
			}
			for _, o := range more {
				list = append(list, o.name+"="+strings.ReplaceAll(o.value, ",", ",,"))
			}
			continue
		}
		o.value = strings.ReplaceAll(o.value, ",", ",,")
		list = append(list, o.String())
	}
	return strings.Join(list, ","), nil
}

// readCredentials reads a file of lines username=, password= and domain=, as
// mount.cifs has it.
func readCredentials(file string) ([]option, error) {
	// A FIFO must not be waited on.
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w (the file is looked for where Berth runs; a managed plugin sees /state and /data)", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("credentials: %s is not a file", file)
	}
	var list []option
	lines := bufio.NewScanner(io.LimitReader(f, maxCredentials))
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "=")
		name = strings.TrimSpace(name)
		switch {
		case !ok || strings.HasPrefix(name, "#"):
		case name == "username" || name == "user":
			list = append(list, option{"username", value, true})
		case name == "password" || name == "pass":
			list = append(list, option{"password", value, true})
		case name == "domain" || name == "dom" || name == "workgroup":
			list = append(list, option{"domain", value, true})
		}
	}
	return list, lines.Err()
}

// makeMissing makes the share's directory on the server.
func (m *Mounter) makeMissing(ctx context.Context, s Share, address netip.Addr) (err error) {
	top := "/"
	if s.cifs {
		name, _, _ := strings.Cut(s.path[1:], "/")
		top += name
	}
	if s.path == top {
		return fault.Unavailable("share %s: the server has no such directory", s)
	}
	point := m.Path(s) + ".parent"
	if err := makePoint(point); err != nil {
		return err
	}
	defer func() {
		if errDir := unix.Rmdir(point); err == nil && errDir != nil {
			err = errDir
		}
	}()
	parent := path.Dir(s.path)
	for {
		err := m.attach(ctx, s, parent, address, point)
		if err == nil {
			break
		}
		if parent == top || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
			return fault.Unavailable("share %s: the directory is missing on the server, and none above it can be mounted to make it: %w", s, err)
		}
		parent = path.Dir(parent)
	}
	defer func() {
		if errMount := unix.Unmount(point, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err == nil && errMount != nil {
			err = errMount
		}
	}()
	dir, err := rooted.Open(point)
	if err != nil {
		return fault.Unavailable("share %s: %w", s, err)
	}
	rest := strings.Split(strings.Trim(strings.TrimPrefix(s.path, parent), "/"), "/")
	for _, name := range rest {
		errMake := dir.EnsureDir(name, 0o755)
		next, err := dir.Dir(name)
		if err != nil && errMake != nil {
			err = errMake
		}
		if errClose := dir.Close(); err == nil {
			err = errClose
		}
		if err != nil {
			var failed *fs.PathError
			if errors.As(err, &failed) {
				err = failed.Err
			}
			return fault.Unavailable("share %s: the directory is missing on the server and cannot be made below %s: %w", s, s.at(parent), err)
		}
		dir = next
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// failed words an error of mount(2).
func (s Share) failed(dir string, err error) error {
	if err == nil {
		return nil
	}
	hint := ""
	switch {
	case errors.Is(err, unix.ENODEV):
		hint = "; the kernel has no " + s.source.Type + " (modprobe " + strings.TrimSuffix(s.source.Type, "4") + " on the host)"
	case errors.Is(err, unix.EINVAL):
		hint = "; is there an option in o that the kernel does not know?"
	case errors.Is(err, unix.EPROTONOSUPPORT):
		hint = "; the server does not speak this version"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		hint = "; does the server let this host in?"
		if s.cifs {
			hint = "; are username and password right?"
		}
	}
	return fault.Unavailable("mount share %s: %w%s", s.at(dir), err, hint)
}
