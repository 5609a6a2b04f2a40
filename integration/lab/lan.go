package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// The LAN's addresses. Every LAN has the same ones: LANs do not see each other.
var (
	lanSubnet4 = netip.MustParsePrefix("198.51.100.0/24")
	lanSubnet6 = netip.MustParsePrefix("2001:db8:1::/64")
)

const (
	routerIndex    = 1
	neighbourIndex = 2
	firstHostIndex = 11
)

// A LAN is a switch with a router at 198.51.100.1 and a neighbour at
// 198.51.100.2, where an echo server (StartEcho) listens on 80 and 8080; hosts get .11, .12 and so on, and 2001:db8:1::1, ::2, ::b … The
// router is the hosts' gateway and forwards, but leads nowhere else.
type LAN struct {
	// Name is unique on the machine, as a host's.
	Name string
	// Router and Neighbour are hosts without an engine.
	Router, Neighbour *Host

	mu    sync.Mutex
	hosts map[string]int // name to index, kept over reboots
}

// LANOptions say what a LAN is.
type LANOptions struct {
	// Name is unique on the machine; at most 17 characters.
	Name string
	// Engine is whose Debian root router and neighbour have; 20.10 when empty.
	Engine string
	// Detached LANs stay when the process that made them ends.
	Detached bool
}

// NewLAN makes a LAN for a test and removes it at the test's end.
func NewLAN(tb testing.TB, opts LANOptions) *LAN {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := MakeLAN(ctx, opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Error(err)
		}
	})
	return l
}

// MakeLAN makes a LAN; the caller closes it.
func MakeLAN(ctx context.Context, opts LANOptions) (*LAN, error) {
	if opts.Engine == "" {
		opts.Engine = Engines()[0].Version
	}
	l := &LAN{Name: opts.Name, hosts: map[string]int{opts.Name + "-rt": routerIndex, opts.Name + "-nb": neighbourIndex}}
	err := l.makeSwitch(ctx)
	if err == nil {
		l.Router, err = l.member(ctx, opts, "-rt")
	}
	if err == nil {
		l.Neighbour, err = l.member(ctx, opts, "-nb")
	}
	if err == nil {
		err = writeSysctls(ctx, l.Router, "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
	}
	for _, port := range []int{80, 8080} {
		if err == nil {
			err = l.Neighbour.StartEcho(ctx, port)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make lan %s: %w", opts.Name, err), l.Close())
	}
	return l, nil
}

func (l *LAN) makeSwitch(ctx context.Context) error {
	if err := addNetNS(ctx, l.netns()); err != nil {
		return err
	}
	if err := ip(ctx, "-n", l.netns(), "link", "add", "sw", "type", "bridge", "mcast_snooping", "0"); err != nil {
		return err
	}
	return ip(ctx, "-n", l.netns(), "link", "set", "sw", "up")
}

func (l *LAN) member(ctx context.Context, opts LANOptions, suffix string) (*Host, error) {
	return New(ctx, Options{Name: opts.Name + suffix, Engine: opts.Engine, NoEngine: true, Detached: opts.Detached, LAN: l})
}

// writeSysctls sets files below /proc/sys to 1 in the host.
func writeSysctls(ctx context.Context, h *Host, files ...string) error {
	for _, f := range files {
		if _, err := h.Exec(ctx, "busybox", "sh", "-c", "echo 1 > /proc/sys/"+f); err != nil {
			return err
		}
	}
	return nil
}

func (l *LAN) netns() string { return netnsPrefix + l.Name + "-sw" }

// index is a host's place in the subnets; the first call for a name decides it.
func (l *LAN) index(name string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i, ok := l.hosts[name]; ok {
		return i
	}
	next := firstHostIndex
	for _, i := range l.hosts {
		next = max(next, i+1)
	}
	l.hosts[name] = next
	return next
}

// Addr4 and Addr6 are the addresses of the host on the LAN.
func (l *LAN) Addr4(h *Host) netip.Addr { return nth(lanSubnet4, l.index(h.Name)) }

// Addr6 is the host's IPv6 address; see Addr4.
func (l *LAN) Addr6(h *Host) netip.Addr { return nth(lanSubnet6, l.index(h.Name)) }

// mac is the hardware address of the host's link with the number nic, which a reboot
// does not change.
func (l *LAN) mac(h *Host, nic int) string {
	return fmt.Sprintf("02:00:5e:00:%02x:%02x", 0x53+nic, l.index(h.Name))
}

// nth is the address with the number n in a subnet; n is below 256.
func nth(p netip.Prefix, n int) netip.Addr {
	raw := p.Addr().AsSlice()
	raw[len(raw)-1] = byte(n)
	addr, _ := netip.AddrFromSlice(raw)
	return addr
}

// attach gives a booted host its eth0 and further links. The pairs vanish with the
// host's namespace.
func (l *LAN) attach(ctx context.Context, h *Host) error {
	var steps [][]string
	for nic := range max(1, h.opts.NICs) {
		port, name := fmt.Sprintf("p%d-%d", l.index(h.Name), nic), fmt.Sprintf("eth%d", nic)
		// The kernel removes a dead namespace's links a little later than the namespace.
		_ = ip(ctx, "-n", l.netns(), "link", "del", port)
		steps = append(steps,
			[]string{"-n", l.netns(), "link", "add", port, "type", "veth", "peer", "name", name, "address", l.mac(h, nic), "netns", h.netns()},
			[]string{"-n", l.netns(), "link", "set", port, "master", "sw", "up"},
			[]string{"-n", h.netns(), "link", "set", name, "up"})
	}
	steps = append(steps,
		[]string{"-n", h.netns(), "addr", "add", fmt.Sprintf("%s/%d", l.Addr4(h), lanSubnet4.Bits()), "brd", "+", "dev", "eth0"},
		[]string{"-n", h.netns(), "addr", "add", fmt.Sprintf("%s/%d", l.Addr6(h), lanSubnet6.Bits()), "dev", "eth0", "nodad"})
	if l.index(h.Name) != routerIndex {
		steps = append(steps,
			[]string{"-n", h.netns(), "route", "add", "default", "via", nth(lanSubnet4, routerIndex).String()},
			[]string{"-n", h.netns(), "-6", "route", "add", "default", "via", nth(lanSubnet6, routerIndex).String(), "dev", "eth0"})
	}
	for _, args := range steps {
		if err := ip(ctx, args...); err != nil {
			return fmt.Errorf("attach %s to lan %s: %w", h.Name, l.Name, err)
		}
	}
	return nil
}

// Close removes router, neighbour and switch. Hosts on the LAN are closed first.
func (l *LAN) Close() error {
	var errs []error
	for _, h := range []*Host{l.Router, l.Neighbour} {
		if h != nil {
			errs = append(errs, h.Close())
		}
	}
	errs = append(errs, deleteNetNS(l.netns()))
	return errors.Join(errs...)
}

// StartEcho starts a server in the host that answers every TCP connection or
// HTTP request on the port with one line, the address of who asked; UDP likewise.
// It is started again after a crash, but not after a reboot.
func (h *Host) StartEcho(ctx context.Context, port int) error {
	name := fmt.Sprintf("echo-%d", port)
	_, err := call(ctx, h.Dir, request{
		Op: "start", Name: name, Restart: true, Log: filepath.Join(h.Dir, "log", name+".log"),
		Argv: []string{"/proc/1/exe", echoName, fmt.Sprint(port)},
	})
	if err != nil {
		return err
	}
	return h.eventually(ctx, 5*time.Second, "busybox", "wget", "-qO-", fmt.Sprintf("http://127.0.0.1:%d/", port))
}

// eventually repeats a command in the host until it succeeds.
func (h *Host) eventually(ctx context.Context, within time.Duration, argv ...string) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		_, err := h.Exec(ctx, argv...)
		if err == nil {
			return nil
		}
		if pause(ctx, 30*time.Millisecond) != nil {
			return fmt.Errorf("not within %s: %w", within, err)
		}
	}
}
