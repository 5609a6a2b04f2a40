package firewall

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TableName is the name of Berth's tables, one of family ip and one of ip6.
const TableName = "berth"

// A rule is one constant rule, as text in the words of `nft list` and as the
// kernel's expressions. Tests hold the two against each other in a real kernel.
type rule struct {
	text  string
	exprs []expr.Any
}

// A chain is one constant chain. hook is nil for one that is only jumped to.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
	// text of the line that declares a base chain.
	text  string
	rules []rule
}

// A table describes the constant part of Berth's table of one family.
type table struct {
	v6     bool
	family nftables.TableFamily
	// keyword is the family in nft's words.
	keyword string
	chains  []chain
}

// priorityBefore is the priority of the filter chains: before those of iptables
// and of Docker's nftables backend (0), since a mark set later is of no use
// there, and a drop is final wherever it is.
const priorityBefore = -10

// priorityLast is after everything that may look at the mark.
const priorityLast = 300

// forwardingChain is an empty chain without a hook. It is there when Berth has
// turned forwarding on for the family, and so tells the next berthd, too: a
// reboot clears both.
const forwardingChain = "turned_on_forwarding"

func newTable(v6 bool) table {
	t := table{v6: v6, family: nftables.TableFamilyIPv4, keyword: "ip"}
	if v6 {
		t.family, t.keyword = nftables.TableFamilyIPv6, "ip6"
	}
	t.chains = slices.Concat(t.filterChains(), t.natChains())
	return t
}

// base is a chain that packets go through by themselves.
func base(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority, text string, rules ...rule) chain {
	return chain{name, kind, hook, priority, text, rules}
}

// filterChains decide which packets pass.
func (t table) filterChains() []chain {
	return []chain{
		// A packet that Berth has accepted: say so to the rules of others.
		{name: "accepted", rules: []rule{
			join(setMarkBit(), accept()),
		}},
		// To a published port, by whatever way it was found. An accept without the
		// mark leaves the decision to the host's own rules.
		{name: "published", rules: []rule{
			join(oif(setHost), accept()),
			join(t.allowedSource(), to("accepted")),
			join(oif(setLimited), drop()),
			to("accepted"),
		}},
		// Between containers of one network.
		{name: "within", rules: []rule{
			join(iif(setICC), to("accepted")),
			join(answer(), to("accepted")),
			join(translated(), to("accepted")),
			drop(),
		}},
		// To the containers of a routed network.
		{name: "routing", rules: []rule{
			join(t.directPort(setDirect), to("published")),
			join(t.directPort(setDirectRanges), to("published")),
			join(t.echoRequest(), to("accepted")),
			drop(),
		}},
		// From one Berth network to another.
		{name: "across", rules: []rule{
			join(notOif(setOpen), drop()),
			join(answer(), to("accepted")),
			join(translated(), to("published")),
			join(oif(setRouted), to("routing")),
			drop(),
		}},
		// To another container network, of whose published ports its own rules decide.
		{name: "abroad", rules: []rule{
			join(answer(), to("accepted")),
			join(translated(), accept()),
			drop(),
		}},
		// From a container. The order decides: its own network, then the networks
		// it must not reach, then outside.
		{name: "leaving", rules: []rule{
			join(linkPair(setSame), to("within")),
			join(notIif(setOpen), drop()),
			join(oif(setBridges), to("across")),
			join(oif(setForeign), to("abroad")),
			to("accepted"),
		}},
		// To a container, from anything but a Berth bridge.
		{name: "entering", rules: []rule{
			join(notOif(setOpen), drop()),
			join(answer(), to("accepted")),
			join(translated(), to("published")),
			join(oif(setRouted), to("routing")),
			join(notIif(setForeign), oif(setUnprotected), to("published")),
			join(linkPair(setTrusted), t.directPort(setDirect), to("published")),
			join(linkPair(setTrusted), t.directPort(setDirectRanges), to("published")),
			drop(),
		}},
		base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, priorityBefore,
			"type filter hook forward priority filter - 10; policy accept;",
			// A mark from elsewhere must not open Docker's chains.
			join(matchMarkBit(), clearMarkBit()),
			join(iif(setBridges), to("leaving")),
			join(oif(setBridges), to("entering")),
		),
		// Containers of an internal network reach the addresses of their own bridge
		// and no other address of the host.
		base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, priorityBefore,
			"type filter hook input priority filter - 10; policy accept;",
			join(notIif(setBridges), accept()),
			join(iif(setOpen), accept()),
			join(answer(), accept()),
			join(fibType("local", unix.RTN_LOCAL), accept()),
			join(fibType("broadcast", unix.RTN_BROADCAST), accept()),
			join(fibType("multicast", unix.RTN_MULTICAST), accept()),
			drop(),
		),
		base("unmark", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, priorityLast,
			"type filter hook postrouting priority 300; policy accept;",
			join(matchMarkBit(), clearMarkBit()),
		),
	}
}

// natChains translate addresses.
func (t table) natChains() []chain {
	outside := join(rule{`oifname != "lo"`, notLoopback()}, notOif(setBridges))
	masquerade := rule{"masquerade", []expr.Any{&expr.Masq{}}}
	publish := chain{name: "publish", rules: []rule{
		// One address before all, single ports before ranges.
		t.translate(mapPublishedAt), t.translate(mapRangesAt), t.translate(mapPublished), t.translate(mapRanges),
	}}
	prerouting := base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest,
		"type nat hook prerouting priority dstnat; policy accept;",
		// What is published on 127.0.0.1 must not be reached from another machine,
		// whatever sysctls the host has.
		join(t.loopbackAddr("daddr"), verdict("return", expr.VerdictReturn, "")),
		join(localAddr(), to(publish.name)),
	)
	output := base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest,
		"type nat hook output priority -100; policy accept;",
		join(localAddr(), to(publish.name)),
	)
	postrouting := base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource,
		"type nat hook postrouting priority srcnat; policy accept;",
		// To a published port of the same network: without this the container would
		// answer past the host.
		join(translated(), t.sourceOnOif(), masquerade),
		join(outside, t.translateSource()),
		join(outside, t.sourceIn(setSources), masquerade),
	)
	// What br_netfilter shows of frames that are only switched is as much theirs as
	// that of a switch outside.
	guard := base("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw,
		"type filter hook prerouting priority raw; policy accept;",
		join(iif(setSwitched), untracked()),
	)
	if t.v6 {
		// [::1] cannot leave the loopback link.
		output.rules = slices.Insert(output.rules, 0, prerouting.rules[0])
		return []chain{guard, publish, prerouting, output, postrouting}
	}
	postrouting.rules = slices.Insert(postrouting.rules, 0, join(t.loopbackAddr("saddr"), oif(setBridges), masquerade))
	// With route_localnet on, which ports published on 127.0.0.1 need, the bridge
	// would take packets from and to there.
	guard.rules = append(guard.rules,
		join(iif(setBridges), t.loopbackAddr("saddr"), drop()),
		join(iif(setBridges), t.loopbackAddr("daddr"), drop()),
	)
	return []chain{guard, publish, prerouting, output, postrouting}
}
