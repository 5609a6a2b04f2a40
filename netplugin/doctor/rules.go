package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/shared/control"
)

// rules asks whether Berth's own rules are whole.
func rules(ctx context.Context, in Input) ([]control.Finding, error) {
	if in.Firewall == nil {
		return nil, nil
	}
	drift, err := in.Firewall.Check(ctx)
	if err != nil {
		return nil, err
	}
	if drift == "" {
		return one(ok("Berth's rules are whole"))
	}
	return one(warn("Berth repairs this within seconds. If it is found again and again, another program undoes the repair: look for it in the log of the host.",
		"nft monitor", "Berth's rules are not whole: %s", drift))
}

// variants looks at the chains of iptables that forwarded packets pass.
func variants(_ context.Context, in Input) ([]control.Finding, error) {
	if in.Firewall == nil {
		return nil, nil
	}
	list, err := in.Firewall.Variants()
	if err == nil && len(list) == 0 {
		return one(ok("iptables is not in use"))
	}
	var (
		out    []control.Finding
		docker []string
	)
	if err != nil {
		out = append(out, fail("Packets of containers may be dropped there, as Berth cannot add its rule.", "apt-get install iptables",
			"a variant of iptables cannot be read: %v", err))
	}
	for _, v := range list {
		if v.Policy == "" {
			continue // It could not be read.
		}
		out = append(out, variant(in, v))
		if v.Docker && !strings.HasPrefix(v.Program, "ip6") {
			docker = append(docker, v.Program)
		}
		if v.UFW && !strings.HasPrefix(v.Program, "ip6") {
			out = append(out, ufw(in))
		}
	}
	if len(docker) > 1 {
		out = append(out, warn(
			"Docker uses one of them; what is in the other is left over from before and is still applied to its containers. Berth keeps its rule in both.",
			"update-alternatives --display iptables\niptables-legacy -F && iptables-legacy -t nat -F && iptables-legacy -P FORWARD ACCEPT",
			"Docker's chains are in %s", strings.Join(docker, " and in ")))
	}
	return out, nil
}

func variant(in Input, v firewall.Variant) control.Finding {
	switch {
	case v.Blocked != "":
		return fail("Nothing is forwarded, for Docker's own networks as well. Berth leaves the rules of the administrator as they are.",
			fmt.Sprintf("%s %s", v.Program, strings.Replace(v.Blocked, "-A", "-D", 1)),
			"%s drops everything before Berth's rule is reached: %s", v.Program, v.Blocked)
	case !v.Rule && len(in.Bridges) > 0:
		return warn("Berth puts it back within seconds.", v.Program+" -S FORWARD",
			"%s: Berth's rule is not where it belongs, and the FORWARD policy is %s", v.Program, v.Policy)
	case len(in.Bridges) == 0:
		return ok("%s: the FORWARD policy is %s; Berth adds its rule with the first network", v.Program, v.Policy)
	default:
		return ok("%s: the FORWARD policy is %s, and Berth's rule accepts what Berth has let through", v.Program, v.Policy)
	}
}

func ufw(in Input) control.Finding {
	f := ok("ufw is active; Berth's rule lets containers through FORWARD")
	name := "BRIDGE"
	if names := sortedBridges(in); len(names) > 0 {
		name = names[0]
	}
	f.Detail = fmt.Sprintf("Packets from containers to the host itself are subject to ufw's incoming rules; `ufw allow in on %s` accepts those of one network.", name)
	return f
}

const (
	lockFile = "/run/xtables.lock"
	lockCure = "docker plugin disable -f berth-net\ndocker plugin set berth-net xtables-lock.source=/run/xtables.lock\ndocker plugin enable berth-net"
)

// xtablesLock asks whether iptables-legacy here waits for that of the host: in a
// managed plugin the lock is its own file unless it is told the host's.
func xtablesLock(_ context.Context, in Input) ([]control.Finding, error) {
	if in.Firewall == nil {
		return nil, nil
	}
	// What cannot be read is a finding of variants.
	list, _ := in.Firewall.Variants()
	for _, v := range list {
		if !v.Legacy() {
			continue
		}
		info, err := os.Stat(lockFile)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode().IsRegular() {
			return one(ok("%s has a lock that is shared with the host", v.Program))
		}
		return one(warn("Two programs that change iptables-legacy at the same time may undo each other's change.", lockCure,
			"%s is in use, but its lock is not shared with the host", v.Program))
	}
	return one(ok("iptables-nft needs no lock"))
}

// obstacles looks at the firewalls of others in nftables.
func obstacles(_ context.Context, in Input) ([]control.Finding, error) {
	if in.Firewall == nil {
		return nil, nil
	}
	list, err := in.Firewall.Obstacles()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return one(ok("no other firewall drops forwarded packets in nftables"))
	}
	var out []control.Finding
	for _, o := range list {
		out = append(out, obstacle(in, o))
	}
	return out, nil
}

func obstacle(in Input, o firewall.Obstacle) control.Finding {
	isFirewalld := strings.HasPrefix(o.Chain, "inet firewalld ")
	switch {
	case o.Owned && isFirewalld:
		return fail("firewalld lets nobody else change its rules. Published ports work; containers do not reach the outside until their bridges are in a zone that accepts.",
			trusted(in), "firewalld's chain %s drops packets of Berth's networks", o.Chain)
	case o.Owned:
		return fail("The table belongs to a process, which alone can change it: give it a rule that accepts packets with mark 0x10000000/0x10000000.",
			"nft list table "+tableOf(o.Chain), "nftables chain %s drops packets of Berth's networks", o.Chain)
	case o.Early:
		return fail("It comes before Berth's chains, so that no packet carries their decision yet. Give the chain a priority above -10, or let it accept the bridges of Berth.",
			"nft list table "+tableOf(o.Chain), "nftables chain %s drops packets of Berth's networks", o.Chain)
	case !o.Open && len(in.Bridges) > 0:
		return warn("Berth puts its rule there within seconds.", "nft list chain "+o.Chain, "nftables chain %s drops packets of Berth's networks", o.Chain)
	case !o.Open:
		return ok("nftables chain %s drops forwarded packets; Berth adds its rule with the first network", o.Chain)
	}
	f := ok("nftables chain %s drops forwarded packets, and Berth's rule accepts what Berth has let through", o.Chain)
	if isFirewalld {
		f.Detail = "Packets from containers to the host itself are subject to firewalld's zones. To accept them all: " +
			strings.ReplaceAll(trusted(in), "\n", "; ")
	}
	return f
}

// trusted puts the bridges into firewalld's zone that accepts.
func trusted(in Input) string {
	names := sortedBridges(in)
	if len(names) == 0 {
		names = []string{"BRIDGE"}
	}
	var b strings.Builder
	for _, name := range names {
		b.WriteString("firewall-cmd --permanent --zone=trusted --add-interface=" + name + "\n")
	}
	return b.String() + "firewall-cmd --reload"
}

// tableOf is "inet t" of "inet t chain".
func tableOf(chain string) string {
	if i := strings.LastIndexByte(chain, ' '); i >= 0 {
		return chain[:i]
	}
	return chain
}
