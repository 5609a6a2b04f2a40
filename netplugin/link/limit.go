package link

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// What a container receives leaves the host's end of its link, where a token
// bucket delays it. What it sends arrives there, where nothing can be delayed: it
// is sent through a link of kind ifb, the endpoint's limiter, with a token bucket
// of its own, and comes back as if it had just arrived.
const (
	limiterKind = "ifb"
	// limiterPrefix takes the place of the two letters in front of the digits in
	// the name of the host's end.
	limiterPrefix = "bi"
)

// limiterName is the name of the limiter of an endpoint.
func limiterName(host string) string {
	return limiterPrefix + host[min(len(limiterPrefix), len(host)):]
}

// A bucket is a token bucket, in bytes and bytes per second.
type bucket struct {
	rate uint64
	// burst may pass at once. It holds what becomes due between two ticks of the
	// kernel's slowest clock, and some full packets.
	burst uint32
	// limit is the length of the queue before packets are dropped.
	limit uint32
}

const (
	// ticks per second of a kernel built with HZ=100.
	ticks = 100
	// leastBurst holds ten full frames of Ethernet, leastFrames are enough of larger
	// ones: fewer slow TCP down.
	leastBurst  = 10 * 1514
	leastFrames = 4
	// queue is how many thousandths of a second a packet waits at most, unless the
	// queue would hold fewer than leastFrames.
	queue = 50
	// frame is the length of an Ethernet header with a VLAN tag.
	frame = 18
)

// bucketOf is the bucket for a rate in bits per second on a link of this MTU.
func bucketOf(rate int64, mtu int) bucket {
	b := bucket{rate: uint64(rate) / 8}
	least := leastFrames * uint64(mtu+frame)
	b.burst = uint32(max(b.rate/ticks, leastBurst, least))
	b.limit = uint32(max(b.rate*queue/1000, least)) + b.burst
	return b
}

// limit sets the wanted limits of a new host's end, and its guard.
func (h *Handle) limit(v Veth, host Link) error {
	if err := h.limitRates(v, host); err != nil {
		return err
	}
	// Last: diverting clears away what is in its way.
	return h.guard(v, host)
}

func (h *Handle) limitRates(v Veth, host Link) error {
	if v.RateIn != 0 {
		if err := h.delay(host, bucketOf(v.RateIn, host.MTU)); err != nil {
			return limitError("rate.in", "sch_tbf", err)
		}
	}
	if v.RateOut == 0 {
		return nil
	}
	limiter, err := h.ensureLimiter(v)
	if err != nil {
		return err
	}
	if err := h.delay(limiter, bucketOf(v.RateOut, host.MTU)); err != nil {
		return limitError("rate.out", "sch_tbf", err)
	}
	return h.divert(host, limiter, v.Guarded)
}

// repairLimits is limit for an end that may have had others.
func (h *Handle) repairLimits(v Veth, host Link) error {
	if v.RateOut == 0 {
		if err := h.deleteLimiter(v.Host, OfEndpoint(v.EndpointID)); err != nil {
			return err
		}
	}
	return h.limit(v, host)
}

// delay makes a token bucket the way out of a link. The same again changes nothing
// for the packets in it.
func (h *Handle) delay(l Link, b bucket) error {
	return do(func() error {
		return h.nl.QdiscReplace(&netlink.Tbf{
			// Without a handle the kernel replaces whatever other discipline is there.
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Index, Parent: netlink.HANDLE_ROOT},
			Rate:       b.rate,
			Buffer:     netlink.Xmittime(b.rate, b.burst),
			Limit:      b.limit,
		})
	})
}

// ensureLimiter makes the limiter of an endpoint, or repairs it.
func (h *Handle) ensureLimiter(v Veth) (Link, error) {
	name, owner := limiterName(v.Host), OfEndpoint(v.EndpointID)
	l, ok, err := h.claim(name, owner)
	if err != nil {
		return Link{}, err
	}
	if ok && l.Kind != limiterKind {
		return Link{}, fault.Conflict("link %q of endpoint %s is a %s, not an %s", name, v.EndpointID, l.Kind, limiterKind)
	}
	if !ok {
		err := h.create(name, nil, 0, 0, kindInfo(limiterKind))
		if errors.Is(err, unix.EOPNOTSUPP) {
			return Link{}, limitError("rate.out", "ifb", err)
		}
		if err != nil {
			return Link{}, createError("limiter", name, err)
		}
		if l, ok, err = h.Get(name); err == nil && !ok {
			err = fmt.Errorf("link %q is gone again", name)
		}
		if err == nil {
			err = h.disableIPv6(name)
		}
		if err != nil {
			return Link{}, err
		}
	}
	if l.Up {
		return l, nil
	}
	if err := h.change(l.Index, change{alias: owner.String(), up: true}); err != nil {
		return Link{}, fmt.Errorf("set up link %q: %w", name, err)
	}
	return l, nil
}

// deleteLimiter removes the limiter of an endpoint, if it has one.
func (h *Handle) deleteLimiter(host string, owner Owner) error {
	l, ok, err := h.Get(limiterName(host))
	if err != nil || !ok || l.Kind != limiterKind || l.Owner != owner && !l.Owner.halfMade() {
		return err
	}
	return h.deleteIndex(l)
}

// ingress is the discipline of what arrives by a link, of which there is one at most.
func ingress(host Link) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: host.Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0),
	}}
}

// divert sends all that arrives by a link through the limiter, unless the guard stops
// it.
func (h *Handle) divert(host, limiter Link, guarded bool) error {
	ref := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: host.Name, Index: host.Index}}
	filters, err := dump(func() ([]netlink.Filter, error) { return h.nl.FilterList(ref, netlink.HANDLE_MIN_INGRESS) })
	if err == nil && divertsTo(filters, limiter.Index, guarded) {
		return nil
	}
	// Whatever is there goes, with its filters.
	err = do(func() error { return h.nl.QdiscDel(ingress(host)) })
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear ingress of link %q: %w", host.Name, err)
	}
	if err := do(func() error { return h.nl.QdiscAdd(ingress(host)) }); err != nil {
		return limitError("rate.out", "sch_ingress", err)
	}
	err = do(func() error {
		return h.nl.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: host.Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: divertPriority, Protocol: unix.ETH_P_ALL,
			},
			Actions: []netlink.Action{netlink.NewMirredAction(limiter.Index)},
		})
	})
	return limitError("rate.out", "cls_u32 or act_mirred", err)
}

// divertsTo reports whether the filters are the one that divert sets, and that of the
// guard.
func divertsTo(filters []netlink.Filter, limiter int, guarded bool) bool {
	found := false
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && guarded && b.Priority == guardPriority {
			continue
		}
		u, ok := f.(*netlink.U32)
		if !ok {
			return false
		}
		if len(u.Actions) == 0 {
			continue // The kernel's own table, which is listed as well.
		}
		m, ok := u.Actions[0].(*netlink.MirredAction)
		all := u.Sel != nil && len(u.Sel.Keys) == 1 && u.Sel.Keys[0].Mask == 0
		if found || !ok || !all || len(u.Actions) > 1 || m.Ifindex != limiter || u.Protocol != unix.ETH_P_ALL || u.Sel.Flags&nl.TC_U32_TERMINAL == 0 {
			return false
		}
		found = true
	}
	return found
}

// limitError names the option and the module without which the kernel cannot do
// it.
func limitError(option, module string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("option %s: the kernel has no %s (a module of this name is missing): %w", option, module, err)
	}
	return fmt.Errorf("option %s: %w", option, err)
}
