// Package link makes, reads and removes network links with their addresses, limits
// and sysctls, and tells neighbours of new addresses. It is the only package that
// speaks route netlink.
//
// Every link that Berth makes carries a mark: a link group from its first moment
// and an alias with the ID of the network or endpoint. A link without the mark is
// never changed or removed; a bridge that is adopted is given addresses, which are
// taken away again. The package does not know what a network is: which
// links there should be is decided by the mode packages.
package link

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// DefaultSysctlRoot is where the kernel shows the network sysctls. It is
// read-only in a managed plugin, which mounts a writable view elsewhere.
const DefaultSysctlRoot = "/proc/sys/net"

// Options of Open.
type Options struct {
	// NetNS is the network namespace to work in; nil is that of the process.
	NetNS *os.File
	// SysctlRoot is a writable view of /proc/sys/net; "" is DefaultSysctlRoot.
	SysctlRoot string
}

// A Handle is a pair of netlink sockets bound to one network namespace. It is
// safe for concurrent use; the kernel makes changes of links one at a time.
type Handle struct {
	ns     *os.File
	sysctl string
	// nl carries what the netlink library has words for, raw the rest.
	nl  *netlink.Handle
	raw *nl.SocketHandle
}

// Open opens the sockets. Close them with Close.
func Open(opts Options) (*Handle, error) {
	h := &Handle{ns: opts.NetNS, sysctl: opts.SysctlRoot}
	if h.sysctl == "" {
		h.sysctl = DefaultSysctlRoot
	}
	ns := netns.None()
	if h.ns != nil {
		ns = netns.NsHandle(h.ns.Fd())
	}
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		handle.Close()
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	// The kernel's own words ("can not enslave a bridge to a bridge") are better
	// than an errno alone. Kernels before 4.12 do not know the option.
	_ = socket.SetExtAck(true)
	// The kernel filters dumps of addresses only then. Kernels before 4.20 do not.
	_ = unix.SetsockoptInt(socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	h.nl, h.raw = handle, &nl.SocketHandle{Socket: socket}
	return h, nil
}

// Close closes the sockets. No call may be under way.
func (h *Handle) Close() {
	h.nl.Close()
	h.raw.Close()
}

// NetNS is the namespace the handle works in, nil for that of the process.
func (h *Handle) NetNS() *os.File { return h.ns }

// In runs fn on a thread in the handle's namespace, as InNamespace does.
func (h *Handle) In(fn func() error) (err error) {
	if nsErr := InNamespace(h.ns, func() { err = fn() }); nsErr != nil {
		return nsErr
	}
	return err
}

// InNamespace runs fn on a thread in the network namespace, nil for that of the
// process: file names below /proc and child processes then mean that namespace, and a
// socket that fn opens belongs to it for ever. The error is that fn was not run.
func InNamespace(ns *os.File, fn func()) error {
	if ns == nil {
		fn()
		return nil
	}
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread dies instead of coming back to the runtime in
		// the wrong namespace. The main thread cannot die; hold it and use another.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err = InNamespace(ns, fn)
			runtime.UnlockOSThread()
			return
		}
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		fn()
	}()
	<-done
	return err
}

func (h *Handle) request(msgType, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(msgType, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: h.raw}
	return req
}

// dumpTries bounds the repeats of one dump. A dump is interrupted when links
// change meanwhile, which on a busy host is often, but not many times in a row.
const dumpTries = 20

// dump repeats a dump until it was not interrupted.
func dump[T any](read func() ([]T, error)) ([]T, error) {
	var (
		list []T
		err  error
	)
	for range dumpTries {
		list, err = retry(read)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}

// retry repeats a call that a signal has interrupted.
func retry[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if !errors.Is(err, unix.EINTR) || errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
}

// do is retry for a call without a result.
func do(call func() error) error {
	_, err := retry(func() (struct{}, error) { return struct{}{}, call() })
	return err
}
