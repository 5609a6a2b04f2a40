package hostport

import (
	"errors"
	"net/netip"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/options"
)

// A filter says which packets a socket takes. It is not locked: nobody else has
// the socket, and its port may come to need another one.
type filter uint8

const (
	// filterAll drops every packet, so that no client gets through to Berth when
	// the rules are away.
	filterAll filter = iota
	// filterRemote drops what was not sent to ::1. The rules take all else, and no
	// packet for ::1 comes from outside.
	filterRemote
	// filterNone takes every packet.
	filterNone
)

// filterFor is the filter of a socket that leads to an address of this target.
func (t Target) filterFor(k key, to netip.Addr) filter {
	loopback := netip.IPv6Loopback()
	switch {
	case k.host.Is4() || k.proto == options.SCTP || t.Network.NoProxy:
		return filterAll
	case to.Is4():
		return filterNone
	case k.host.IsUnspecified() || k.host == loopback:
		return filterRemote
	default:
		return filterAll
	}
}

// served reports whether the proxy has packets to expect.
func (f filter) served() bool { return f != filterAll }

// The IPv6 header, whatever the packet's data begins with (SKF_NET_OFF), and the
// destination in it.
const (
	ipHeader     = 0xfff00000
	destination6 = ipHeader + 24
)

// classic is the filter as a program for one socket, nil for none. The kernel
// copies it for each socket, which costs about 5 KiB and 20 µs.
func (f filter) classic() []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		result = unix.BPF_RET | unix.BPF_K
	)
	switch f {
	case filterNone:
		return nil
	case filterRemote:
		return []unix.SockFilter{
			{Code: load, K: destination6}, {Code: equal, K: 0, Jf: 7},
			{Code: load, K: destination6 + 4}, {Code: equal, K: 0, Jf: 5},
			{Code: load, K: destination6 + 8}, {Code: equal, K: 0, Jf: 3},
			{Code: load, K: destination6 + 12}, {Code: equal, K: 1, Jf: 1},
			{Code: result, K: 0xffffffff},
			{Code: result, K: 0},
		}
	default:
		return []unix.SockFilter{{Code: result, K: 0}}
	}
}

// An instruction of eBPF, as the kernel has it.
type instruction struct {
	code uint8
	// registers: the destination in the lower half, the source in the upper.
	registers uint8
	offset    int16
	value     int32
}

// shared is the filter as a program for all sockets, nil for none.
func (f filter) shared() []instruction {
	const (
		set      = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K
		move     = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X
		load     = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		notEqual = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K
		exit     = unix.BPF_JMP | unix.BPF_EXIT
		// offsets are signed in an instruction.
		destination = destination6 - 1<<32
	)
	switch f {
	case filterNone:
		return nil
	case filterRemote:
		return []instruction{
			{code: move, registers: 6 | 1<<4}, // where load expects the packet
			{code: load, value: destination}, {code: notEqual, offset: 8, value: 0},
			{code: load, value: destination + 4}, {code: notEqual, offset: 6, value: 0},
			{code: load, value: destination + 8}, {code: notEqual, offset: 4, value: 0},
			{code: load, value: destination + 12}, {code: notEqual, offset: 2, value: 1},
			{code: set, value: -1}, {code: exit},
			{code: set, value: 0}, {code: exit},
		}
	default:
		return []instruction{{code: set, value: 0}, {code: exit}}
	}
}

// programs are the shared filters in the kernel, by filter; -1 where the kernel
// does not let the process have one: that takes CAP_BPF, CAP_SYS_ADMIN or
// kernel.unprivileged_bpf_disabled=0.
type programs [filterNone]int

func newPrograms() *programs {
	var p programs
	for f := range p {
		p[f] = loadProgram(filter(f).shared())
	}
	return &p
}

func (p *programs) close() {
	for f, fd := range p {
		if fd >= 0 {
			unix.Close(fd)
		}
		p[f] = -1
	}
}

func loadProgram(code []instruction) int {
	license := []byte("\x00")
	attr := struct {
		kind, count      uint32
		code, license    uint64
		logLevel, logLen uint32
		log              uint64
		version, flags   uint32
	}{
		kind: unix.BPF_PROG_TYPE_SOCKET_FILTER, count: uint32(len(code)),
		code: uint64(uintptr(unsafe.Pointer(&code[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1
	}
	return int(fd)
}

// set gives the socket this filter in the place of the one it has.
func (p *programs) set(fd int, f filter) error {
	if f == filterNone {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil // it had none
		}
		return err
	}
	if p[f] >= 0 {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, p[f])
	}
	program := f.classic()
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}
