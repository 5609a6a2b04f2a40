// Package firewall keeps Berth's networks apart from each other, from Docker's
// and from the outside, lets their containers out, gives that traffic the host's
// address, and leads what reaches published ports to the containers.
//
// All decisions are made in two nftables tables of Berth's own, one per family.
// Chains and rules there are constant; a network is a few elements of sets and a
// published port one element of a map, so that neither the packets' way nor a
// change depends on the number of networks and ports. A packet's way through
// `forward`:
//
//	from a Berth bridge to the same bridge       accepted (also bridged frames, with br_netfilter);
//	                                             without ICC answers and published ports only
//	... from an internal network                 dropped
//	... to another Berth bridge                  published ports
//	... to another container network's bridge    published ports, if its own rules accept them
//	... to anything else                         accepted
//	to a Berth bridge, internal                  dropped
//	to a Berth bridge, answer                    accepted
//	to a Berth bridge, else                      published ports, and what the gateway mode and
//	                                             trusted links open
//
// A port is published by the translation of its destination in `prerouting` and
// `output`; a connection so translated needs no other proof in `forward`. On routed
// networks it is the container's own port that is published, which a set knows.
// The network's policy decides about both.
//
// Through `input`, containers reach the host as they do on Docker's networks,
// except that on an internal network only the bridge's own addresses answer.
//
// Accepted packets carry Mark, for which one rule in DOCKER-USER or FORWARD
// accepts them there too: an accept in nftables does not keep a packet from a
// DROP in another chain of the same hook. The rule is kept in each variant of
// iptables that has a FORWARD chain. What firewalld or ufw drop in tables of
// their own is dropped.
//
// docs/firewall.md shows all rules. The tables need Linux 5.6.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/link"
)

// Options of New.
type Options struct {
	// Links works in the namespace whose rules are kept, and outlives the Manager.
	Links *link.Handle
	// Log receives repairs and what cannot be done; nil is the standard logger.
	Log *logrus.Entry
	// Repaired, if not nil, is called by Watch after each repair with what was
	// found, in words. It must not call the Manager.
	Repaired func(found string)
}

// A Manager keeps the rules of all networks of one network namespace. It is safe
// for concurrent use. Its calls are idempotent.
type Manager struct {
	links *link.Handle
	log   *logrus.Entry
	// repaired is never nil.
	repaired func(found string)

	// mu is held while the rules are changed, which takes milliseconds, or as long
	// as somebody else holds iptables' lock.
	mu       sync.Mutex
	kernel   *kernel
	programs programs
	others   others
	// localnet are the bridges of RouteLocalnet.
	localnet map[string]bool
	// networks by bridge. Until the first Sync also those that an earlier Berth has
	// left in the tables and about which this one has not been told yet.
	networks map[string]Network
	adopted  bool
	// endpoints that publish ports, by ID, by bridge and by port.
	endpoints map[string]*Endpoint
	byBridge  map[string]map[string]*Endpoint
	claims    claims
	// foreign are the bridges of other networks; watched says that events keep
	// them current.
	foreign []string
	watched bool
	ip, ip6 *side
	// generation of nftables at which the sides' have was true; 0 is unknown.
	generation uint32
}

// A side is one family's table.
type side struct {
	table table
	want  *ruleset
	have  state
	// same says that have and want are known to differ in touched elements only.
	same bool
	// forwarding says that Berth has turned forwarding on for the family.
	forwarding bool
}

// New opens the firewall of the namespace of opts.Links. It changes nothing.
func New(opts Options) (*Manager, error) {
	log := opts.Log
	if log == nil {
		log = logrus.NewEntry(logrus.StandardLogger())
	}
	k, err := openKernel(opts.Links.NetNS())
	if err != nil {
		return nil, err
	}
	repaired := opts.Repaired
	if repaired == nil {
		repaired = func(string) {}
	}
	return &Manager{
		links: opts.Links, log: log, repaired: repaired, kernel: k, programs: programs{}, localnet: map[string]bool{},
		networks: map[string]Network{}, endpoints: map[string]*Endpoint{}, byBridge: map[string]map[string]*Endpoint{}, claims: claims{},
		ip:  &side{table: newTable(false), want: newRuleset(false)},
		ip6: &side{table: newTable(true), want: newRuleset(true)},
	}, nil
}

func (m *Manager) sides() []*side { return []*side{m.ip, m.ip6} }

// Close closes the sockets; the rules stay.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.kernel.close()
}

// Sync makes the rules exactly those of the given networks and of endpoints on
// their bridges, whatever is there: missing tables are made, wrong ones replaced,
// elements of unknown networks and endpoints removed. What was written is read
// back. Of endpoints that want the same port, the first keeps it; the others lose
// that port only, which is logged.
//
// Until the first Sync, what an earlier Berth has left in the tables stays, so
// that traffic goes on while this one is told its networks one by one.
func (m *Manager) Sync(ctx context.Context, networks []Network, endpoints []Endpoint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.adopted = true
	before := maps.Clone(m.networks)
	var endpointsBefore []Endpoint
	for _, ep := range m.endpoints {
		endpointsBefore = append(endpointsBefore, *ep)
	}
	wanted := map[string]Network{}
	for _, n := range networks {
		wanted[n.Bridge] = n
	}
	m.replaceLocked(wanted, endpoints)
	err := m.applyLocked(ctx, true)
	if err != nil {
		m.replaceLocked(before, endpointsBefore)
	}
	return err
}

// Ensure adds the network or replaces what its bridge had before; its endpoints
// keep their ports. added says that the bridge was unknown; after an error it is as
// it was. For a bridge that was known, it also repairs what others have done to the
// tables; Watch does so in any case.
func (m *Manager) Ensure(ctx context.Context, n Network) (added bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.adoptLocked(); err != nil {
		return false, err
	}
	before, known := m.networks[n.Bridge]
	m.putLocked(n)
	apply := m.applyNewLocked
	if known {
		apply = m.applyReadLocked
	}
	if err := apply(ctx); err != nil {
		if known {
			m.putLocked(before)
		} else {
			m.dropLocked(n.Bridge)
		}
		return false, err
	}
	return !known, nil
}

// Remove takes the network of this bridge away, and the ports of its endpoints; an
// unknown one is success. With the last network go the tables, the rules in chains
// of others, and forwarding if Berth turned it on and no other network can rely on
// it.
func (m *Manager) Remove(ctx context.Context, bridge string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.adoptLocked(); err != nil {
		return err
	}
	before, known := m.networks[bridge]
	endpoints := m.endpointsOf(bridge)
	for _, ep := range endpoints {
		m.dropEndpointLocked(ep.ID)
	}
	if known {
		for _, s := range m.sides() {
			s.want.forgetPorts(before)
		}
	}
	m.dropLocked(bridge)
	err := m.applyNewLocked(ctx)
	if err != nil && known {
		m.putLocked(before)
		for _, ep := range endpoints {
			m.putEndpointLocked(ep)
		}
	}
	return err
}

// emptyLocked says that no network is left.
func (m *Manager) emptyLocked() bool { return len(m.networks) == 0 }

// applyReadLocked is applyLocked for what may be known already.
func (m *Manager) applyReadLocked(ctx context.Context) error { return m.applyLocked(ctx, false) }

// applyNewLocked is applyLocked for a network that has come or gone. It does not
// look first at what others have changed, if it can be helped: dockerd changes
// nftables with every `network create`, and to read all networks and ports of a host
// for one of them is what would make the hundredth slow.
func (m *Manager) applyNewLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !m.watched || !m.wholeLocked() || m.emptyLocked() {
		return m.applyLocked(ctx, false)
	}
	// An adopted bridge is foreign before and after its network.
	m.wantForeignLocked()
	current, err := m.currentLocked()
	if err != nil {
		return err
	}
	if !m.writeUnreadLocked() {
		return m.applyLocked(ctx, false)
	}
	return m.xtablesLocked(current)
}

// applyLocked brings the kernel to what is wanted. When thorough, nothing that
// was known about the kernel is relied upon, and the result is read back.
func (m *Manager) applyLocked(ctx context.Context, thorough bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if thorough {
		m.generation = 0
	}
	if thorough || !m.watched {
		if err := m.refreshForeignLocked(); err != nil {
			return err
		}
	}
	// An adopted bridge is foreign before and after its network.
	m.wantForeignLocked()
	current, err := m.readLocked()
	if err != nil {
		return err
	}
	if m.emptyLocked() {
		return m.teardownLocked()
	}
	wrote, err := m.writeLocked(current)
	if err != nil {
		return err
	}
	if thorough && wrote {
		m.generation = 0
		if _, err := m.readLocked(); err != nil {
			return err
		}
		if problem := m.differs(); problem != "" {
			return fmt.Errorf("nftables kept only part of what was written: %s", problem)
		}
	}
	return m.xtablesLocked(current && !thorough)
}

func (m *Manager) refreshForeignLocked() error {
	foreign, err := foreignBridges(m.links)
	if err != nil {
		return err
	}
	m.foreign = foreign
	m.wantForeignLocked()
	return nil
}

// wholeLocked says that both tables were as they should be when they were read last.
func (m *Manager) wholeLocked() bool { return m.ip.have.whole && m.ip6.have.whole }

// currentLocked says that nobody has changed nftables since it was read last.
func (m *Manager) currentLocked() (bool, error) {
	generation, err := m.kernel.generation()
	return err == nil && generation == m.generation && generation != 0, err
}

// writeUnreadLocked writes what has changed without a look at what others have
// changed. If that was in Berth's tables, the transaction fails, or the check that
// follows every change finds it. done is false when all is to be read first.
func (m *Manager) writeUnreadLocked() (done bool) {
	_, err := m.writeLocked(true)
	if err != nil {
		m.log.WithError(err).Info("the change does not fit what nftables has; reading it anew")
	}
	return err == nil
}

// readLocked makes the sides' have true. current says that it was: nobody has
// changed nftables since the last time.
func (m *Manager) readLocked() (current bool, err error) {
	if current, err := m.currentLocked(); err != nil || current {
		return current, err
	}
	generation, err := m.kernel.generation()
	if err != nil {
		return false, err
	}
	for _, s := range m.sides() {
		if s.have, err = m.kernel.read(s.table); err != nil {
			return false, err
		}
		s.forwarding, s.same = s.forwarding || s.have.forwarding, false
	}
	m.generation = generation
	return false, nil
}

// differs says in words what is wrong in the tables, "" if nothing.
func (m *Manager) differs() string {
	var problems []string
	for _, s := range m.sides() {
		if p := s.differs(); p != "" {
			problems = append(problems, "table "+s.table.keyword+" "+TableName+" "+p)
		}
	}
	return strings.Join(problems, "; ")
}

func (s *side) differs() string {
	switch {
	case !s.have.exists:
		return "is missing"
	case !s.have.whole:
		return "was changed"
	case s.have.forwarding != s.forwarding:
		return "lacks its mark that forwarding was turned on"
	case s.same && len(s.want.touched) == 0:
		return ""
	}
	for _, name := range setNames() {
		have, want := s.have.elements[name], s.want.elements[name]
		lacks, extra := want.missing(have), have.missing(want)
		if len(lacks)+len(extra) > 0 {
			shape := shapeOf(name, s.table.v6)
			return fmt.Sprintf("set %s lacks %v and has also %v", name, shape.texts(lacks, want), shape.texts(extra, have))
		}
	}
	s.same = true
	return ""
}

// writeLocked changes both tables in one transaction, if they differ. When
// current, only what was touched can differ.
func (m *Manager) writeLocked(current bool) (wrote bool, err error) {
	for _, s := range m.sides() {
		queued, err := m.kernel.change(s, current)
		if err != nil {
			return false, errors.Join(err, m.kernel.reset())
		}
		wrote = wrote || queued
	}
	if wrote {
		before := m.generation
		if err := m.kernel.flush(); err != nil {
			m.generation = 0
			return false, err
		}
		// More than one change means that somebody else was there as well.
		if m.generation, err = m.kernel.generation(); err != nil || before == 0 || m.generation != before+1 {
			m.generation = 0
		}
	}
	for _, s := range m.sides() {
		s.written(current)
	}
	return wrote, err
}

// written notes that the kernel has what is wanted.
func (s *side) written(current bool) {
	for _, name := range setNames() {
		if !current || !s.have.whole {
			if s.have.elements == nil {
				s.have.elements = elements{}
			}
			s.have.elements[name] = maps.Clone(s.want.elements[name])
			continue
		}
		for x := range s.want.touched[name] {
			if value, ok := s.want.elements[name][x]; ok {
				s.have.elements[name][x] = value
			} else {
				delete(s.have.elements[name], x)
			}
		}
	}
	s.have.exists, s.have.whole, s.have.forwarding = true, true, s.forwarding
	s.same = s.same || !current
	s.want.settled()
}

// xtablesLocked keeps the rules in iptables' chains. current says that nothing
// has changed in nftables, iptables-nft's tables included.
func (m *Manager) xtablesLocked(current bool) error {
	if current {
		legacy, err := m.legacyInUse()
		if err != nil || !legacy {
			return err
		}
	}
	if err := m.keepRulesLocked(); err != nil {
		return fmt.Errorf("accept forwarded packets beside Docker's rules: %w", err)
	}
	return nil
}

func (m *Manager) teardownLocked() error {
	var errs []error
	if err := m.dropRulesLocked(); err != nil {
		errs = append(errs, fmt.Errorf("remove the rule from Docker's chains: %w", err))
	}
	for _, s := range m.sides() {
		m.kernel.remove(s.table, s.have)
	}
	errs = append(errs, m.kernel.flush(), m.restoreForwarding())
	for _, s := range m.sides() {
		s.have, s.want, s.same = state{}, newRuleset(s.table.v6), false
	}
	m.networks, m.generation = map[string]Network{}, 0
	m.endpoints, m.byBridge, m.claims = map[string]*Endpoint{}, map[string]map[string]*Endpoint{}, claims{}
	return errors.Join(errs...)
}
