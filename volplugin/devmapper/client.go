package devmapper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	controlPath = "/dev/mapper/control"
	// The control device has a fixed number: misc, minor 236.
	controlMajor, controlMinor = 10, 236

	maxName = unix.DM_NAME_LEN - 1
	maxUUID = unix.DM_UUID_LEN - 1

	// firstBuffer is enough for nearly every answer; lastBuffer bounds what is asked
	// for when it is not.
	firstBuffer, lastBuffer = 16 << 10, 4 << 20

	// removePatience is how long a removal waits for somebody, like a scanner of
	// new devices, who has the device open for a moment.
	removePatience = 2 * time.Second
)

// udevFlags tell udev's rules, through the upper half of the event number, to make
// no links and to open nothing: DM_UDEV_DISABLE_DM_RULES_FLAG, …SUBSYSTEM…, …DISK…,
// …OTHER…, …LIBRARY_FALLBACK and, without which the rest is not believed,
// DM_UDEV_PRIMARY_SOURCE_FLAG. The lower half, the cookie that libdevmapper waits
// for, is 0.
const udevFlags = (0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40) << 16

// A Client talks to device-mapper. It must be closed. Its methods may be called
// concurrently; Suspend, Message and Remove may block as long as the devices below.
type Client struct {
	control *os.File
	nodes   string
}

// A Device is what the kernel tells of a device.
type Device struct {
	Name, UUID string
	Number     Number
	// Opened is how many have it open: a mounted file system, a device on top of it.
	Opened int
	// Active: it has a table. A device without one was left by somebody who was
	// killed while he made it.
	Active, Suspended, ReadOnly bool
}

// Open prepares to talk to device-mapper. nodes is the directory for device nodes,
// which is made where it is missing; it must be on a file system that is not mounted
// nodev, as /dev is. The error is unavailable, in words, where the kernel has no
// device-mapper or it is out of reach.
func Open(nodes string) (*Client, error) {
	if err := os.MkdirAll(nodes, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for device nodes: %w", err)
	}
	control, err := openControl(nodes)
	if err != nil {
		return nil, err
	}
	c := &Client{control: control, nodes: nodes}
	if _, err := c.do(unix.DM_VERSION, &request{}); err != nil {
		return nil, errors.Join(fault.Unavailable("device-mapper does not answer: %w", err), control.Close())
	}
	return c, nil
}

// openControl opens the control device, through a node of our own where /dev has
// none.
func openControl(nodes string) (*os.File, error) {
	control, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		path := filepath.Join(nodes, "control")
		if err := makeNode(path, unix.S_IFCHR, Number{Major: controlMajor, Minor: controlMinor}); err != nil {
			return nil, fmt.Errorf("make node of device-mapper's control device: %w", err)
		}
		control, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	switch {
	case err == nil:
		return control, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, fs.ErrNotExist):
		return nil, fault.Unavailable("this host's kernel has no device-mapper, or has not loaded it: modprobe dm_mod")
	case errors.Is(err, fs.ErrPermission):
		return nil, fault.Unavailable("device-mapper is out of berthd's reach: it needs CAP_SYS_ADMIN and access to all devices: %w", err)
	}
	return nil, fmt.Errorf("open device-mapper: %w", err)
}

// Close releases the client. Devices and their nodes stay.
func (c *Client) Close() error { return c.control.Close() }

// NodePath is where the node of the device with that name is, after Node.
func (c *Client) NodePath(name string) string { return filepath.Join(c.nodes, name) }

// Node makes the node of a device, or makes it lead to this one, and returns its
// path.
func (c *Client) Node(d Device) (string, error) {
	if err := checkName(d.Name); err != nil {
		return "", err
	}
	path := c.NodePath(d.Name)
	if err := makeNode(path, unix.S_IFBLK, d.Number); err != nil {
		return "", fmt.Errorf("make node of device %s: %w", d.Name, err)
	}
	return path, nil
}

// makeNode replaces whatever other node has the path, as after a reboot with a /dev
// that stays.
func makeNode(path string, kind uint32, n Number) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil && st.Mode&unix.S_IFMT == kind && st.Rdev == n.dev() {
		return nil
	}
	if err == nil {
		if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
			return err
		}
	}
	// Two may do this at once for one device.
	if err := unix.Mknod(path, kind|0o600, int(n.dev())); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// Targets lists the kinds of target that the kernel has loaded, with their versions.
// Making a table loads those that it lacks, where it may.
func (c *Client) Targets() (map[string]string, error) {
	answer, err := c.do(unix.DM_LIST_VERSIONS, &request{})
	if err != nil {
		return nil, fmt.Errorf("list device-mapper's targets: %w", err)
	}
	return decodeVersions(answer.data)
}

// HasTarget tells whether the kernel has a kind of target; it loads its module where
// it may.
func (c *Client) HasTarget(kind string) (bool, error) {
	_, err := c.do(unix.DM_GET_TARGET_VERSION, &request{name: kind})
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EINVAL):
		return false, nil
	case errors.Is(err, unix.ENOTTY): // before 5.4
		loaded, err := c.Targets()
		return loaded[kind] != "", err
	}
	return false, fmt.Errorf("ask for device-mapper's target %s: %w", kind, err)
}

// List gives the names and numbers of all devices of the host.
func (c *Client) List() (map[string]Number, error) {
	answer, err := c.do(unix.DM_LIST_DEVICES, &request{})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return decodeNames(answer.data)
}

// Find tells of a device. The error wraps fs.ErrNotExist when there is none.
func (c *Client) Find(name string) (Device, error) {
	answer, err := c.do(unix.DM_DEV_STATUS, &request{name: name})
	if err != nil {
		return Device{}, wrap("look for", name, err)
	}
	return answer.device(), nil
}

// Create makes a device with a table and starts it. The error wraps fs.ErrExist when
// the name is taken. When it fails no device is left.
func (c *Client) Create(name, uuid string, readOnly bool, table ...Target) (Device, error) {
	if err := checkName(name); err != nil {
		return Device{}, err
	}
	if len(uuid) > maxUUID {
		return Device{}, fmt.Errorf("UUID of device %s has %d bytes: at most %d are allowed", name, len(uuid), maxUUID)
	}
	if _, err := c.do(unix.DM_DEV_CREATE, &request{name: name, uuid: uuid}); err != nil {
		return Device{}, wrap("create", name, err)
	}
	err := c.Load(name, readOnly, table...)
	if err == nil {
		err = c.Resume(name)
	}
	var dev Device
	if err == nil {
		dev, err = c.Find(name)
	}
	if err == nil {
		_, err = c.Node(dev)
	}
	if err != nil {
		return Device{}, errors.Join(err, c.Remove(name))
	}
	return dev, nil
}

// Load gives a device a table that the next Resume puts in the place of its present
// one.
func (c *Client) Load(name string, readOnly bool, table ...Target) error {
	payload, err := encodeTable(table)
	if err != nil {
		return fmt.Errorf("table of device %s: %w", name, err)
	}
	r := &request{name: name, payload: payload, count: len(table)}
	if readOnly {
		r.flags = unix.DM_READONLY_FLAG
	}
	_, err = c.do(unix.DM_TABLE_LOAD, r)
	return wrap("load table of", name, err)
}

// Suspend lets no more I/O through. A file system that is mounted from the device is
// frozen first: all that was written is on the device, and whoever writes waits.
func (c *Client) Suspend(name string) error {
	_, err := c.do(unix.DM_DEV_SUSPEND, &request{name: name, flags: unix.DM_SUSPEND_FLAG})
	return wrap("suspend", name, err)
}

// SuspendNow is Suspend without a look at what is mounted: nothing is frozen and
// nothing written. What is under way is kept, and done by the table that Resume starts.
func (c *Client) SuspendNow(name string) error {
	_, err := c.do(unix.DM_DEV_SUSPEND, &request{name: name, flags: unix.DM_SUSPEND_FLAG | unix.DM_SKIP_LOCKFS_FLAG | unix.DM_NOFLUSH_FLAG})
	return wrap("suspend", name, err)
}

// Resume undoes Suspend and starts a table that was loaded. It does nothing when
// there is nothing to do.
func (c *Client) Resume(name string) error {
	_, err := c.do(unix.DM_DEV_SUSPEND, &request{name: name, event: udevFlags})
	return wrap("resume", name, err)
}

// Remove removes a device and its node. Missing is no error. The error wraps
// unix.EBUSY when somebody has it open for longer than two seconds.
func (c *Client) Remove(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	limit := time.Now().Add(removePatience)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		_, err := c.do(unix.DM_DEV_REMOVE, &request{name: name, event: udevFlags})
		if errors.Is(err, unix.EBUSY) && time.Now().Before(limit) {
			time.Sleep(wait)
			continue
		}
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return wrap("remove", name, err)
		}
		if err := os.Remove(c.NodePath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
}

// Message sends a message to the target at a sector and returns the answer, which
// most messages have none of.
func (c *Client) Message(name string, sector uint64, text string) (string, error) {
	payload := make([]byte, 8, 8+len(text)+1)
	*(*uint64)(unsafe.Pointer(&payload[0])) = sector
	payload = append(append(payload, text...), 0)
	answer, err := c.do(unix.DM_TARGET_MSG, &request{name: name, payload: payload})
	if err != nil {
		return "", wrap("send "+text+" to", name, err)
	}
	if answer.head.Flags&unix.DM_DATA_OUT_FLAG == 0 {
		return "", nil
	}
	return cString(answer.data), nil
}

// Table gives the table that a device works by.
func (c *Client) Table(name string) ([]Target, error) {
	return c.table(name, unix.DM_STATUS_TABLE_FLAG)
}

// Status is Table with what each target says of its state in place of its
// parameters. A suspended device is not disturbed.
func (c *Client) Status(name string) ([]Target, error) {
	return c.table(name, unix.DM_NOFLUSH_FLAG)
}

func (c *Client) table(name string, flags uint32) ([]Target, error) {
	answer, err := c.do(unix.DM_TABLE_STATUS, &request{name: name, flags: flags})
	if err != nil {
		return nil, wrap("ask for state of", name, err)
	}
	targets, err := decodeTable(answer.data, int(answer.head.Target_count))
	if err != nil {
		return nil, fmt.Errorf("state of device %s: %w", name, err)
	}
	return targets, nil
}

// request is one call.
type request struct {
	name, uuid string
	flags      uint32
	event      uint32
	count      int
	payload    []byte
}

type answer struct {
	head unix.DmIoctl
	data []byte
}

func (a answer) device() Device {
	return Device{
		Name:      cString(a.head.Name[:]),
		UUID:      cString(a.head.Uuid[:]),
		Number:    numberOf(a.head.Dev),
		Opened:    int(a.head.Open_count),
		Active:    a.head.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
		Suspended: a.head.Flags&unix.DM_SUSPEND_FLAG != 0,
		ReadOnly:  a.head.Flags&unix.DM_READONLY_FLAG != 0,
	}
}

// do makes one call, again with more room for the answer when that did not fit. The
// error is the bare errno.
func (c *Client) do(command uintptr, r *request) (answer, error) {
	if len(r.name) > maxName {
		return answer{}, unix.ENAMETOOLONG
	}
	for size := max(firstBuffer, unix.SizeofDmIoctl+len(r.payload)); ; size *= 4 {
		// Words, for the alignment that the kernel's structures ask for.
		words := make([]uint64, (size+7)/8)
		buf := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
		head := (*unix.DmIoctl)(unsafe.Pointer(&words[0]))
		head.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}
		head.Data_size, head.Data_start = uint32(len(buf)), unix.SizeofDmIoctl
		head.Flags, head.Event_nr, head.Target_count = r.flags, r.event, uint32(r.count)
		copy(head.Name[:], r.name)
		copy(head.Uuid[:], r.uuid)
		copy(buf[unix.SizeofDmIoctl:], r.payload)
		for {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, c.control.Fd(), command, uintptr(unsafe.Pointer(&words[0])))
			if errno == unix.EINTR {
				continue
			}
			if errno != 0 {
				return answer{}, errno
			}
			break
		}
		runtime.KeepAlive(c)
		if head.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			if size > lastBuffer {
				return answer{}, unix.ENOBUFS
			}
			continue
		}
		// Not up to Data_size: that counts no entry of an empty list.
		start := min(max(int(head.Data_start), unix.SizeofDmIoctl), len(buf))
		return answer{head: *head, data: buf[start:]}, nil
	}
}

// wrap says what was tried, and tells missing and taken by the usual errors.
func wrap(what, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s device %s: %w", what, name, fs.ErrNotExist)
	case errors.Is(err, unix.EBUSY) && what == "create":
		return fmt.Errorf("%s device %s: %w", what, name, fs.ErrExist)
	}
	return fmt.Errorf("%s device %s: %w", what, name, err)
}

// checkName refuses what is no file name too.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || name == "control" || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no device name", name)
	}
	return nil
}
