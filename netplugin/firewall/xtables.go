package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
)

const (
	// ruleComment tells Berth's rule in chains of others.
	ruleComment = commentPrefix + "accepted in nftables table berth"
	// commentPrefix begins it in all versions.
	commentPrefix = "berth: "
	// lockSeconds is how long to wait for dockerd and others that hold the lock.
	lockSeconds = 5
	filterTable = "filter"
	// userChain is the chain that dockerd keeps for the rules of others.
	userChain    = "DOCKER-USER"
	forwardChain = "FORWARD"
)

// ruleSpec is the one rule that Berth keeps in each variant of iptables.
func ruleSpec() []string {
	return []string{
		"-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", Mark, Mark),
		"-m", "comment", "--comment", ruleComment,
		"-j", "ACCEPT",
	}
}

// A variant is one of the four sets of chains that may drop forwarded packets.
type variant struct {
	v6     bool
	legacy bool
}

func variants() []variant {
	return []variant{{}, {v6: true}, {legacy: true}, {legacy: true, v6: true}}
}

// program is the name that pins the variant; what "iptables" is differs from
// host to host and from plugin to host.
func (v variant) program() string {
	name := "iptables"
	if v.v6 {
		name = "ip6tables"
	}
	if v.legacy {
		return name + "-legacy"
	}
	return name + "-nft"
}

func (v variant) family() nftables.TableFamily {
	if v.v6 {
		return nftables.TableFamilyIPv6
	}
	return nftables.TableFamilyIPv4
}

// present says whether the variant has a FORWARD chain in the namespace. It never
// brings one into being: to ask the program is enough to load legacy tables.
func (m *Manager) present(v variant) (ok, drops bool, err error) {
	if v.legacy {
		ok, err = m.legacyPresent(v)
		return ok, true, err
	}
	chains, err := m.kernel.conn.ListChainsOfTableFamily(v.family())
	if err != nil {
		return false, false, fmt.Errorf("list nftables chains: %w", err)
	}
	for _, c := range chains {
		if c.Table.Name == filterTable && c.Name == forwardChain {
			return true, c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop, nil
		}
	}
	return false, false, nil
}

func (m *Manager) legacyPresent(v variant) (bool, error) {
	path := "/proc/thread-self/net/ip_tables_names"
	if v.v6 {
		path = "/proc/thread-self/net/ip6_tables_names"
	}
	var names []byte
	err := m.links.In(func() (err error) {
		names, err = os.ReadFile(path)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for legacy iptables: %w", err)
	}
	return slices.ContainsFunc(bytes.Fields(names), func(n []byte) bool { return string(n) == filterTable }), nil
}

// legacyInUse says whether some legacy table is there, whose changes nftables'
// generation does not count.
func (m *Manager) legacyInUse() (bool, error) {
	for _, v := range variants() {
		if !v.legacy {
			continue
		}
		if ok, err := m.legacyPresent(v); err != nil || ok {
			return ok, err
		}
	}
	return false, nil
}

// keepRulesLocked puts Berth's rule into all chains of others that drop forwarded
// packets.
func (m *Manager) keepRulesLocked() error {
	err := errors.Join(m.xtables(adding, keepRule), m.keepHooksLocked())
	if err != nil {
		m.generation = 0 // Tried again by whoever comes next.
	}
	return err
}

// dropRulesLocked takes it away from all of them.
func (m *Manager) dropRulesLocked() error {
	return errors.Join(m.xtables(removing, dropRule), m.dropHooksLocked())
}

// missingRulesLocked says in words where the rule is not as it should be, "" if
// everywhere it is.
func (m *Manager) missingRulesLocked() (string, error) {
	problem, err := m.missingHookLocked()
	if err != nil || problem != "" {
		return problem, err
	}
	err = m.xtables(looking, func(ipt *iptables.IPTables) error {
		wrong, err := missingRule(ipt)
		if wrong {
			problem = "the rule in chain DOCKER-USER or FORWARD of iptables is missing or misplaced"
		}
		return err
	})
	return problem, err
}

// A purpose is what xtables is for.
type purpose int

const (
	looking purpose = iota
	adding
	removing
)

// xtables runs fix on each variant that is present, unless all is well there
// already. Only adding shows that a table is not iptables' own.
func (m *Manager) xtables(why purpose, fix func(*iptables.IPTables) error) error {
	for _, v := range variants() {
		ok, drops, err := m.present(v)
		if err != nil {
			return err
		}
		if !ok || why != adding && !v.legacy && m.others.native[v.family()] {
			continue
		}
		if why != removing && !v.legacy {
			if right, err := m.kernel.hasRule(v); err == nil && right {
				continue
			}
		}
		err = m.links.In(func() error {
			ipt, err := m.programs.open(v)
			if err != nil {
				return err
			}
			return fix(ipt)
		})
		if why == adding && !v.legacy {
			m.noteNativeLocked(v, err != nil && isIncompatible(err))
		}
		switch {
		case err == nil:
		case !v.legacy && isIncompatible(err):
			// A table called filter that is not iptables' own, and so one of those of
			// keepHooksLocked.
		case drops:
			return fmt.Errorf("%s: %w", v.program(), err)
		default:
			m.log.WithError(err).Warnf("%s: no rule kept in chain %s, which accepts", v.program(), forwardChain)
		}
	}
	return nil
}

// programs finds the iptables programs and remembers their versions.
type programs map[variant]*iptables.IPTables

func (p programs) open(v variant) (*iptables.IPTables, error) {
	if ipt, ok := p[v]; ok {
		return ipt, nil
	}
	path, err := exec.LookPath(v.program())
	if err != nil {
		return nil, fmt.Errorf("the host filters forwarded packets with %s, but that program is missing: install iptables: %w", v.program(), err)
	}
	protocol := iptables.ProtocolIPv4
	if v.v6 {
		protocol = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.Path(path), iptables.IPFamily(protocol), iptables.Timeout(lockSeconds))
	if err != nil {
		return nil, err
	}
	p[v] = ipt
	return ipt, nil
}

// chainsOf lists the rules of FORWARD and, if FORWARD jumps there, of
// DOCKER-USER. The last of them is where Berth's rule belongs.
func chainsOf(ipt *iptables.IPTables) (names []string, rules map[string][]string, err error) {
	rules = map[string][]string{}
	list := func(name string) error {
		lines, err := ipt.List(filterTable, name)
		if err != nil {
			return err
		}
		names = append(names, name)
		for _, line := range lines {
			if strings.HasPrefix(line, "-A ") {
				rules[name] = append(rules[name], line)
			}
		}
		return nil
	}
	if err := list(forwardChain); err != nil {
		return nil, nil, err
	}
	if slices.Contains(rules[forwardChain], "-A "+forwardChain+" -j "+userChain) {
		if err := list(userChain); err != nil {
			return nil, nil, err
		}
	}
	return names, rules, nil
}

// isOurs tells Berth's rule, of this version or another.
func isOurs(line string) bool { return strings.Contains(line, `--comment "`+commentPrefix) }

// returns is the rule with which Engines up to 27 end DOCKER-USER.
const returns = "-A " + userChain + " -j RETURN"

// missingRule says whether the rule is not exactly where it belongs.
func missingRule(ipt *iptables.IPTables) (bool, error) {
	names, rules, err := chainsOf(ipt)
	if err != nil {
		return false, err
	}
	home := names[len(names)-1]
	for _, name := range names {
		n := 0
		for _, line := range rules[name] {
			if isOurs(line) {
				n++
			}
		}
		if name == home && n != 1 || name != home && n != 0 {
			return true, nil
		}
	}
	if lines := rules[home]; home == userChain {
		return !isOurs(lines[userPosition(lines)-1]), nil
	}
	return false, nil
}

// userPosition is the position, from 1, of the last rule of DOCKER-USER that does
// not merely return; 0 if there is none.
func userPosition(lines []string) int {
	n := len(lines)
	if n > 0 && lines[n-1] == returns {
		n--
	}
	return n
}

// keepRule puts the rule where it belongs and takes it away elsewhere.
//
// In DOCKER-USER it stands behind all rules of the administrator's, whenever they
// were added, so that they decide first, and before the RETURN with which older
// Engines end that chain. In FORWARD it is put first, as whatever drops there is
// the policy or a general rule; one that is put before it later stays there: it
// drops Docker's packets as well.
func keepRule(ipt *iptables.IPTables) error {
	wrong, err := missingRule(ipt)
	if err != nil || !wrong {
		return err
	}
	if err := dropRule(ipt); err != nil {
		return err
	}
	names, rules, err := chainsOf(ipt)
	if err != nil {
		return err
	}
	home := names[len(names)-1]
	position := 1
	if home == userChain {
		position = userPosition(rules[home]) + 1
	}
	return ipt.Insert(filterTable, home, position, ruleSpec()...)
}

// dropRule removes every rule of Berth's. The chain DOCKER-USER is looked at even
// when nothing jumps there any more.
func dropRule(ipt *iptables.IPTables) error {
	for _, name := range []string{forwardChain, userChain} {
		lines, err := ipt.List(filterTable, name)
		var failed *iptables.Error
		if errors.As(err, &failed) && name == userChain {
			continue // no such chain
		}
		if err != nil {
			return err
		}
		for _, line := range lines {
			if spec, ok := strings.CutPrefix(line, "-A "+name+" "); ok && isOurs(line) {
				if err := ipt.DeleteIfExists(filterTable, name, words(spec)...); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// words splits a rule as iptables prints it; only double quotes group.
func words(spec string) []string {
	var out []string
	for i, part := range strings.Split(spec, `"`) {
		if i%2 == 1 {
			out = append(out, part)
			continue
		}
		out = append(out, strings.Fields(part)...)
	}
	return out
}
