package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/control"
)

// A feature is something that the kernel must have, and how to try it.
type feature struct {
	what, without, cure string
	fatal               bool
	try                 func() error
}

func features() []feature {
	return []feature{
		{"nftables maps of several fields with ranges (Linux 5.6)", "Ports cannot be published.", "modprobe nf_tables", true, tryMap},
		{"nftables expression fib", "Berth's rules cannot be loaded.", "modprobe nft_fib_inet", true, tryFib},
		{"address translation in nftables", "Containers cannot share the host's address.", "modprobe nft_chain_nat && modprobe nft_masq", true, tryNAT},
		{"bridges", "No network can be made.", "modprobe bridge", true, func() error { return tryLink("bridge") }},
		{"isolated bridge ports (Linux 4.18)", "`icc=false` does not keep containers apart.", "", false, tryIsolation},
		{"veth pairs", "No container can be connected.", "modprobe veth", true, func() error { return tryLink("veth") }},
		{"ifb links", "`rate.out` cannot be used.", "modprobe ifb", false, func() error { return tryLink("ifb") }},
		{"queueing discipline tbf", "Bandwidth cannot be limited.", "modprobe sch_tbf", false, func() error { return tryQdisc("tbf") }},
		{"queueing discipline ingress", "`rate.out` cannot be used.", "modprobe sch_ingress", false, func() error { return tryQdisc("ingress") }},
		{"classifier u32", "`rate.out` cannot be used.", "modprobe cls_u32", false, func() error { return tryFilter("u32") }},
		{"action mirred", "`rate.out` cannot be used.", "modprobe act_mirred", false, func() error { return tryAction("mirred") }},
	}
}

// kernelFeatures tries everything in a network namespace that is gone afterwards. A
// managed plugin may not make one (CAP_SYS_ADMIN): then only the release is known.
func kernelFeatures(ctx context.Context, _ Input) ([]control.Finding, error) {
	found, err := try(ctx, features())
	if errors.Is(err, unix.EPERM) {
		return releaseFinding(release())
	}
	return found, err
}

// releaseFinding judges a kernel by its release.
func releaseFinding(release string) ([]control.Finding, error) {
	recent, err := atLeast(release, 5, 6)
	if err != nil {
		return nil, err
	}
	if !recent {
		return one(fail("Rules for published ports need nftables maps of several fields with ranges.", "", "the kernel %s is older than Linux 5.6", release))
	}
	return one(ok("the kernel %s is recent enough; what a network lacks of it shows when the network is made", release))
}

// atLeast compares a release, as 6.1.0-18-amd64, with a version.
func atLeast(release string, major, minor int) (bool, error) {
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return a > major || a == major && b >= minor, nil
}

func try(ctx context.Context, list []feature) ([]control.Finding, error) {
	errs := make([]error, len(list))
	if err := inThrowaway(func() {
		for i, f := range list {
			if errs[i] = ctx.Err(); errs[i] == nil {
				errs[i] = f.try()
			}
		}
	}); err != nil {
		return nil, err
	}
	var out []control.Finding
	for i, f := range list {
		switch {
		case errs[i] == nil:
		case f.fatal:
			out = append(out, fail(f.without, f.cure, "the kernel lacks %s: %v", f.what, errs[i]))
		default:
			out = append(out, warn(f.without, f.cure, "the kernel lacks %s: %v", f.what, errs[i]))
		}
	}
	if len(out) == 0 {
		out = append(out, ok("the kernel %s has all that Berth uses", release()))
	}
	return out, nil
}

// inThrowaway runs fn on a thread in a network namespace of its own; both end with
// it.
func inThrowaway(fn func()) error {
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked, so that the thread ends. The main thread cannot: hold it
		// and use another.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err = inThrowaway(fn)
			runtime.UnlockOSThread()
			return
		}
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("make a network namespace to try the kernel in: %w", err)
			return
		}
		fn()
	}()
	<-done
	return err
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// tryRules loads what add adds to a table.
func tryRules(add func(*nftables.Conn, *nftables.Table) error) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	if err := add(conn, conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "try"})); err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return err
	}
	conn.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "try"})
	return conn.Flush()
}

func tryMap() error {
	return tryRules(func(conn *nftables.Conn, table *nftables.Table) error {
		return conn.AddSet(&nftables.Set{
			Table: table, Name: "m", ID: 1, IsMap: true, Interval: true, Concatenation: true,
			KeyType:  nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService),
			DataType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService),
		}, nil)
	})
}

func tryFib() error {
	return tryRules(func(conn *nftables.Conn, table *nftables.Table) error {
		chain := conn.AddChain(&nftables.Chain{Name: "c", Table: table})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Fib{Register: unix.NFT_REG_1, ResultADDRTYPE: true, FlagDADDR: true},
		}})
		return nil
	})
}

func tryNAT() error {
	return tryRules(func(conn *nftables.Conn, table *nftables.Table) error {
		chain := conn.AddChain(&nftables.Chain{
			Name: "c", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
		return nil
	})
}

// tryLink makes a link of a kind.
func tryLink(kind string) error {
	info, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.IFLA_INFO_KIND, Data: []byte(kind)}})
	if err != nil {
		return err
	}
	attrs, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{
		{Type: unix.IFLA_IFNAME, Data: []byte("t" + kind + "\x00")},
		{Type: unix.NLA_F_NESTED | unix.IFLA_LINKINFO, Data: info},
	})
	if err != nil {
		return err
	}
	return ask(unix.RTM_NEWLINK, mdlayher.Create|mdlayher.Excl, append(make([]byte, unix.SizeofIfInfomsg), attrs...))
}

// tryIsolation looks at the release: older kernels ignore the attribute without a
// word.
func tryIsolation() error {
	recent, err := atLeast(release(), 4, 18)
	if err == nil && !recent {
		err = fmt.Errorf("this is Linux %s", release())
	}
	return err
}

// Sizes of struct tcmsg and struct tcamsg, and the attributes of traffic control
// that unix has no names for.
const (
	sizeofTcmsg  = 20
	sizeofTcamsg = 4
	tcaKind      = 1 // TCA_KIND, TCA_ACT_KIND
	tcaActTab    = 1 // TCA_ACT_TAB
	tcHandle     = 0x0001_0000
	tcRoot       = 0xffff_ffff
	tcIngress    = 0xffff_fff1
)

// tcmsg is a struct tcmsg for lo.
func tcmsg(handle, parent, info uint32) ([]byte, error) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return nil, err
	}
	b := make([]byte, 4, sizeofTcmsg)
	for _, v := range []uint32{uint32(lo.Index), handle, parent, info} {
		b = appendNative(b, v)
	}
	return b, nil
}

func tryQdisc(kind string) error {
	parent, handle := uint32(tcRoot), uint32(tcHandle)
	if kind == "ingress" {
		parent, handle = tcIngress, 0xffff_0000
	}
	msg, err := tcmsg(handle, parent, 0)
	if err != nil {
		return err
	}
	return tryKind(unix.RTM_NEWQDISC, msg, kind)
}

// tryFilter needs the ingress discipline to be there.
func tryFilter(kind string) error {
	const priority, allPackets = 1 << 16, 0x0300 // in network byte order
	if err := tryQdisc("ingress"); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	msg, err := tcmsg(0, 0xffff_0000, priority|allPackets)
	if err != nil {
		return err
	}
	return tryKind(unix.RTM_NEWTFILTER, msg, kind)
}

func tryAction(kind string) error {
	name, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: tcaKind, Data: []byte(kind + "\x00")}})
	if err != nil {
		return err
	}
	first, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NLA_F_NESTED | 1, Data: name}})
	if err != nil {
		return err
	}
	table, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NLA_F_NESTED | tcaActTab, Data: first}})
	if err != nil {
		return err
	}
	return known(ask(unix.RTM_NEWACTION, mdlayher.Create, append(make([]byte, sizeofTcamsg), table...)))
}

// tryKind asks for something of a kind without its parameters.
func tryKind(message mdlayher.HeaderType, msg []byte, kind string) error {
	attrs, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: tcaKind, Data: []byte(kind + "\x00")}})
	if err != nil {
		return err
	}
	return known(ask(message, mdlayher.Create, append(msg, attrs...)))
}

// known sorts the answers to a request without parameters: a kind that exists asks
// for them.
func known(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// ask sends one request of route netlink in the namespace of this thread.
func ask(message mdlayher.HeaderType, flags mdlayher.HeaderFlags, data []byte) error {
	conn, err := mdlayher.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	_, err = conn.Execute(mdlayher.Message{
		Header: mdlayher.Header{Type: message, Flags: flags | mdlayher.Request | mdlayher.Acknowledge},
		Data:   data,
	})
	if closeErr := conn.Close(); err == nil {
		err = closeErr
	}
	var op *mdlayher.OpError
	if errors.As(err, &op) && op.Message != "" {
		return fmt.Errorf("%w (%s)", op.Err, strings.TrimSpace(op.Message))
	}
	return err
}

func appendNative(b []byte, v uint32) []byte { return binary.NativeEndian.AppendUint32(b, v) }
