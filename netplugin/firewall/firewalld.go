package firewall

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// others is what is remembered about the chains of others.
type others struct {
	// native are tables called filter, by family, that iptables-nft cannot read:
	// they are not iptables' own, and are written like any other table.
	native map[nftables.TableFamily]bool
	// told are the chains whose trouble has been logged.
	told map[string]bool
}

// An Obstacle is a chain that drops whatever nobody has accepted among forwarded
// packets, in an nftables table that neither Berth nor iptables owns: firewalld's,
// or one of the administrator's.
type Obstacle struct {
	// Chain is family, table and chain in nft's words: "inet firewalld filter_FORWARD".
	Chain string
	// Owned says that the table belongs to a process, which alone can change it
	// (firewalld with NftablesTableOwner=yes).
	Owned bool
	// Early says that packets come there before Berth has decided about them.
	Early bool
	// Open says that Berth's rule is where it belongs; never with Owned or Early.
	Open bool
}

// Obstacles lists the chains of others that drop forwarded packets, beside those
// of iptables.
func (m *Manager) Obstacles() ([]Obstacle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	hooks, err := m.hooksLocked(false)
	if err != nil {
		return nil, err
	}
	var out []Obstacle
	for _, h := range hooks {
		if p := h.place(); p.needed {
			o := Obstacle{Chain: h.String(), Owned: h.owned, Early: h.early()}
			o.Open = p.right && !o.Owned && !o.Early
			out = append(out, o)
		}
	}
	return out, nil
}

// A hook is a base chain of others through which forwarded packets go.
type hook struct {
	chain *nftables.Chain
	owned bool
	// rules of its table, by chain.
	rules map[string][]foreignRule
}

func (h hook) String() string {
	family := map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
	}[h.chain.Table.Family]
	return family + " " + h.chain.Table.Name + " " + h.chain.Name
}

// early says that the chain comes before Berth's, so that no packet has a mark.
func (h hook) early() bool { return h.chain.Priority != nil && *h.chain.Priority <= priorityBefore }

func (h hook) dropsByPolicy() bool {
	return h.chain.Policy != nil && *h.chain.Policy == nftables.ChainPolicyDrop
}

// A place is where Berth's rule belongs in a chain.
type place struct {
	// needed says that the chain drops what nothing in it accepts.
	needed bool
	// before is the handle of the rule that does so; 0 is the chain's policy.
	before uint64
	// right says that exactly one rule of Berth's is there and it stands directly
	// before that, ours are all of them.
	right bool
	ours  []uint64
}

// place finds where Berth's rule belongs: directly before the first rule that
// ends with everything dropped or rejected, so that rules about certain packets,
// which somebody has meant, come first.
func (h hook) place() place {
	var p place
	last := false // the rule just seen is Berth's
	for _, r := range h.rules[h.chain.Name] {
		if r.ours {
			p.ours = append(p.ours, r.handle)
			last = !p.needed
			continue
		}
		if p.needed {
			continue
		}
		if h.closes(r, map[string]bool{}) {
			p.needed, p.before, p.right = true, r.handle, last
			continue
		}
		last = false
		if r.always && r.verdict == expr.VerdictAccept {
			p.right = len(p.ours) == 0
			return p
		}
	}
	if !p.needed {
		p.needed, p.right = h.dropsByPolicy(), last
	}
	switch {
	case !p.needed:
		p.right = len(p.ours) == 0
	case len(p.ours) != 1:
		p.right = false
	}
	return p
}

// closes says that packets can come from this rule to one that drops or rejects
// without asking what they are.
func (h hook) closes(r foreignRule, seen map[string]bool) bool {
	switch r.verdict {
	case expr.VerdictDrop:
		return r.always
	case expr.VerdictJump, expr.VerdictGoto:
		if seen[r.target] {
			return false
		}
		seen[r.target] = true
		for _, next := range h.rules[r.target] {
			if h.closes(next, seen) {
				return true
			}
			if next.always && next.ends() {
				return false
			}
		}
		return false
	default:
		return false
	}
}

// hooksLocked lists the base chains of others that forwarded packets pass, without
// those that iptables looks after unless all.
func (m *Manager) hooksLocked(all bool) ([]hook, error) {
	chains, err := m.kernel.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var hooks []hook
	for _, c := range chains {
		if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Type == nftables.ChainTypeFilter && m.isOthers(c, all) {
			hooks = append(hooks, hook{chain: c})
		}
	}
	if len(hooks) == 0 {
		return nil, nil
	}
	owned, err := m.kernel.ownedTables()
	if err != nil {
		return nil, err
	}
	for i, h := range hooks {
		t := h.chain.Table
		if h.rules, err = m.kernel.foreignRules(t, ""); err != nil {
			return nil, err
		}
		h.owned = owned[tableKey{t.Family, t.Name}]
		hooks[i] = h
	}
	return hooks, nil
}

// isOthers leaves out Berth's chains, iptables' unless all, and those of Docker's nftables
// backend, which writes its table anew whenever it starts and drops nothing but
// what is for its own bridges.
func (m *Manager) isOthers(c *nftables.Chain, all bool) bool {
	switch c.Table.Family {
	case nftables.TableFamilyINet:
		return true
	case nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
	default:
		return false
	}
	switch c.Table.Name {
	case TableName, "docker-bridges":
		return false
	case filterTable:
		return all || c.Name != forwardChain || m.others.native[c.Table.Family]
	case "mangle", "security", "raw", "nat":
		return c.Name != forwardChain
	default:
		return true
	}
}

// keepHooksLocked puts the rule where it belongs in chains of others.
func (m *Manager) keepHooksLocked() error {
	hooks, err := m.hooksLocked(false)
	if err != nil {
		return err
	}
	for _, h := range hooks {
		p := h.place()
		if p.right {
			continue
		}
		if p.needed && (h.owned || h.early()) {
			m.tellLocked(h)
			continue
		}
		if err := m.changeHook(h, p); err != nil {
			return err
		}
	}
	return nil
}

// tellLocked logs, once, that a chain stays closed.
func (m *Manager) tellLocked(h hook) {
	if m.others.told[h.String()] {
		return
	}
	if m.others.told == nil {
		m.others.told = map[string]bool{}
	}
	m.others.told[h.String()] = true
	why := "comes before Berth's: give it a priority above -10"
	if h.owned {
		why = "can be changed by its owner only: put the bridges of Berth into a zone that accepts, as `docker berth doctor` says"
	}
	m.log.Warnf("nftables chain %s drops packets of Berth's networks and %s", h, why)
}

// missingHookLocked names a chain of others in which the rule is not as it should
// be, "" if there is none.
func (m *Manager) missingHookLocked() (string, error) {
	hooks, err := m.hooksLocked(false)
	if err != nil {
		return "", err
	}
	for _, h := range hooks {
		p := h.place()
		if p.right || p.needed && (h.owned || h.early()) {
			continue
		}
		return "the rule in nftables chain " + h.String() + " is missing or misplaced", nil
	}
	return "", nil
}

// dropHooksLocked takes the rule away from all chains of others.
func (m *Manager) dropHooksLocked() error {
	hooks, err := m.hooksLocked(true)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range hooks {
		if p := h.place(); len(p.ours) > 0 && !h.owned {
			errs = append(errs, m.changeHook(h, place{ours: p.ours}))
		}
	}
	return errors.Join(errs...)
}

// changeHook removes Berth's rules from a chain and, where one is needed, adds one,
// in one transaction.
func (m *Manager) changeHook(h hook, p place) error {
	conn := m.kernel.conn
	for _, handle := range p.ours {
		if err := conn.DelRule(&nftables.Rule{Table: h.chain.Table, Chain: h.chain, Handle: handle}); err != nil {
			return err
		}
	}
	if p.needed {
		r := &nftables.Rule{
			Table: h.chain.Table, Chain: h.chain, Position: p.before,
			Exprs:    join(matchMarkBit(), verdict("accept", expr.VerdictAccept, "")).exprs,
			UserData: userdata.AppendString(nil, userdata.TypeComment, ruleComment),
		}
		if p.before != 0 {
			conn.InsertRule(r)
		} else {
			conn.AddRule(r)
		}
	}
	err := m.kernel.flush()
	m.generation = 0
	if errors.Is(err, unix.ENOENT) {
		// The owner was writing it anew at this moment, as firewalld does in a reload;
		// its next change is seen.
		m.log.WithError(err).Debugf("nftables chain %s has changed meanwhile", h)
		return nil
	}
	if err != nil {
		return fmt.Errorf("chain %s of nftables: %w", h, err)
	}
	return nil
}

// isIncompatible tells what iptables-nft says of a table, or of a chain with
// another priority, that is not its own.
func isIncompatible(err error) bool {
	text := err.Error()
	return strings.Contains(text, "is incompatible, use 'nft' tool") || strings.Contains(text, "CHAIN_ADD failed (Operation not supported)")
}

// noteNativeLocked remembers whether the filter table of a family is not iptables'
// own.
func (m *Manager) noteNativeLocked(v variant, native bool) {
	if m.others.native == nil {
		m.others.native = map[nftables.TableFamily]bool{}
	}
	m.others.native[v.family()] = native
}

// alwaysNames are the expressions that let every packet through to the next one.
var alwaysNames = []string{"counter", "log", "last", "notrack"}

// isCondition says whether an expression may end the rule for some packets.
func isCondition(name string) bool { return !slices.Contains(alwaysNames, name) }
