package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
)

const (
	// snapLen is what is read of a frame in bytes.
	snapLen = 512
	// receiveBuffer in bytes is room for about a thousand frames. What does not fit is
	// lost, which the second probe makes up for.
	receiveBuffer = 1 << 20
	// Where the fields of frames are.
	etherTypeAt  = 12
	nextHeaderAt = ethernetLen + 6
	hopLimitAt   = ethernetLen + 7
)

// claims is the filter that lets only ARP and Neighbor Solicitations and
// Advertisements to the socket. Those of a VLAN on the link belong to another
// network, in which the same address is another one: the kernel shows them without
// their tag, which is asked for. VLAN 0 is no VLAN but a priority.
func claims() ([]bpf.RawInstruction, error) {
	const accept, drop = 15, 16
	return bpf.Assemble([]bpf.Instruction{
		/* 0 */ bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		/* 1 */ bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 3},
		/* 2 */ bpf.LoadExtension{Num: bpf.ExtVLANTag},
		/* 3 */ bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xfff},
		/* 4 */ bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: drop - 5},
		/* 5 */ bpf.LoadAbsolute{Off: etherTypeAt, Size: 2},
		/* 6 */ bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipTrue: accept - 7},
		/* 7 */ bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IPV6, SkipTrue: drop - 8},
		/* 8 */ bpf.LoadAbsolute{Off: nextHeaderAt, Size: 1},
		/* 9 */ bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: drop - 10},
		/* 10 */ bpf.LoadAbsolute{Off: hopLimitAt, Size: 1},
		/* 11 */ bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: hopLimit, SkipTrue: drop - 12},
		/* 12 */ bpf.LoadAbsolute{Off: icmpType, Size: 1},
		/* 13 */ bpf.JumpIf{Cond: bpf.JumpEqual, Val: solicit, SkipTrue: accept - 14},
		/* 14 */ bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: advertise, SkipTrue: drop - 15},
		/* 15 */ bpf.RetConstant{Val: snapLen},
		/* 16 */ bpf.RetConstant{},
	})
}

// A socket hears what one link receives and sends, its own frames excepted.
type socket struct {
	// file is waited for by the runtime, and closing it ends a read.
	file  *os.File
	index int
}

// openSocket opens a socket on the link, in the namespace of the handle. A link
// that is down is heard as soon as it is up.
func openSocket(h *link.Handle, index int) (*socket, error) {
	fd := -1
	// Of no protocol: nothing comes in before the filter is there.
	err := h.In(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	if err := prepare(fd, index); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("prepare a packet socket: %w", err)
	}
	return &socket{file: os.NewFile(uintptr(fd), "packet socket"), index: index}, nil
}

func prepare(fd, index int) error {
	raw, err := claims()
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		program[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &filter); err != nil {
		return err
	}
	// Beyond the limit of the host only with CAP_NET_ADMIN; less is no error.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	// Of all protocols: only then does the socket see what macvlan siblings send by
	// the link.
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index})
}

// networkOrder turns a protocol number as the kernel wants it.
func networkOrder(p uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, p))
}

// control runs fn with the descriptor, which stays open meanwhile.
func (s *socket) control(fn func(fd int) error) error {
	raw, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	if controlErr := raw.Control(func(fd uintptr) { err = fn(int(fd)) }); controlErr != nil {
		return controlErr
	}
	return err
}

// member lets the link receive a multicast address, or no longer. The kernel counts.
func (s *socket) member(group mac, in bool) error {
	option := unix.PACKET_DROP_MEMBERSHIP
	if in {
		option = unix.PACKET_ADD_MEMBERSHIP
	}
	m := unix.PacketMreq{Ifindex: int32(s.index), Type: unix.PACKET_MR_MULTICAST, Alen: uint16(len(group))}
	copy(m.Address[:], group[:])
	return s.control(func(fd int) error { return unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, option, &m) })
}

// send sends a frame by a link, which may be another than that of the socket.
func (s *socket) send(by int, frame []byte, to mac, protocol uint16) error {
	sa := &unix.SockaddrLinklayer{Ifindex: by, Halen: uint8(len(to)), Protocol: networkOrder(protocol)}
	copy(sa.Addr[:], to[:])
	return s.control(func(fd int) error {
		for {
			err := unix.Sendto(fd, frame, unix.MSG_DONTWAIT, sa)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	})
}

func (s *socket) close() { s.file.Close() }
