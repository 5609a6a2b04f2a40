package firewall

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// A Variant is how one set of iptables' chains stands to forwarded packets.
type Variant struct {
	// Program that shows it: "iptables-nft", "ip6tables-legacy", ...
	Program string
	// Policy of FORWARD: ACCEPT or DROP; "" when the program cannot read it.
	Policy string
	// Docker says that dockerd keeps its chains there, UFW that ufw does.
	Docker, UFW bool
	// Rule says that Berth's rule is where it belongs.
	Rule bool
	// Blocked is a rule that drops everything before Berth's rule is reached, as
	// `iptables -S` shows it, and "" if there is none.
	Blocked string
}

// Legacy reports whether the variant is one of iptables-legacy, whose changes are
// not events of nftables and need a lock.
func (v Variant) Legacy() bool { return strings.HasSuffix(v.Program, "-legacy") }

// Variants lists the variants of iptables that have a FORWARD chain. The error is
// of the first program that fails; what others say is there beside it.
func (m *Manager) Variants() ([]Variant, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var (
		out   []Variant
		first error
	)
	for _, v := range variants() {
		ok, _, err := m.present(v)
		if err == nil && ok {
			var seen Variant
			seen, err = m.viewLocked(v)
			out = append(out, seen)
		}
		if err != nil && first == nil {
			first = fmt.Errorf("%s: %w", v.program(), err)
		}
	}
	return out, first
}

func (m *Manager) viewLocked(v variant) (Variant, error) {
	out := Variant{Program: v.program()}
	err := m.links.In(func() error {
		ipt, err := m.programs.open(v)
		if err != nil {
			return err
		}
		return out.read(ipt)
	})
	return out, err
}

func (v *Variant) read(ipt *iptables.IPTables) error {
	chains, err := ipt.ListChains(filterTable)
	if err != nil {
		return err
	}
	v.Docker = slices.Contains(chains, "DOCKER")
	v.UFW = slices.Contains(chains, "ufw-before-forward")
	forward, err := ipt.List(filterTable, forwardChain)
	if err != nil {
		return err
	}
	for _, line := range forward {
		if policy, ok := strings.CutPrefix(line, "-P "+forwardChain+" "); ok {
			v.Policy = policy
		}
	}
	wrong, err := missingRule(ipt)
	if err != nil {
		return err
	}
	v.Rule = !wrong
	_, rules, err := chainsOf(ipt)
	if err != nil {
		return err
	}
	v.Blocked = blockedBy(rules)
	return nil
}

// general is a rule for all packets that drops them.
var general = regexp.MustCompile(`^-A \S+( -m comment --comment ("[^"]*"|\S+))? -j (DROP|REJECT)( --reject-with \S+)?$`)

// blockedBy finds the general drop that stands before Berth's rule, given the
// rules of FORWARD and DOCKER-USER.
func blockedBy(rules map[string][]string) string {
	for _, line := range rules[forwardChain] {
		switch {
		case isOurs(line):
			return ""
		case general.MatchString(line):
			return line
		case line == "-A "+forwardChain+" -j "+userChain:
			for _, line := range rules[userChain] {
				if isOurs(line) {
					return ""
				}
				if general.MatchString(line) {
					return line
				}
			}
		}
	}
	return ""
}
