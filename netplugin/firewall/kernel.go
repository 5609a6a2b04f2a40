package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// chunk is how many elements go into one message: the length of the list is a
	// 16-bit number there, and google/nftables sends what is left of a longer one.
	chunk = 256
	// buffer is the size in bytes of the socket's buffers: a transaction is one
	// write, and each of its messages is acknowledged. The kernel's default ends
	// at some hundred networks.
	buffer = 64 << 20
)

// kernel speaks to nftables in one network namespace. It is not safe for
// concurrent use.
type kernel struct {
	netns int
	conn  *nftables.Conn
	// raw asks for the generation, for which the library has no call.
	raw *mdlayher.Conn
}

// state is what the kernel has of one table.
type state struct {
	// exists says that there is a table of Berth's name, whole that its sets,
	// chains and rules are as they should be; only then the rest is set.
	exists, whole bool
	elements      elements
	forwarding    bool
}

func openKernel(ns *os.File) (*kernel, error) {
	k := &kernel{}
	if ns != nil {
		k.netns = int(ns.Fd())
	}
	return k, k.open()
}

func (k *kernel) open() error {
	resize := func(c *mdlayher.Conn) error { return errors.Join(c.SetReadBuffer(buffer), c.SetWriteBuffer(buffer)) }
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(k.netns), nftables.WithSockOptions(resize))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	raw, err := mdlayher.Dial(unix.NETLINK_NETFILTER, &mdlayher.Config{NetNS: k.netns})
	if err != nil {
		return errors.Join(fmt.Errorf("open nftables: %w", err), conn.CloseLasting())
	}
	k.conn, k.raw = conn, raw
	return nil
}

func (k *kernel) close() error { return errors.Join(k.conn.CloseLasting(), k.raw.Close()) }

// flush sends the transaction. After an error the socket may still hold answers
// to it, so that a new one is opened.
func (k *kernel) flush() error {
	err := k.conn.Flush()
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("change nftables: %w", err), k.reset())
}

// reset forgets a transaction that has been begun.
func (k *kernel) reset() error { return errors.Join(k.close(), k.open()) }

// generation counts all changes of nftables in the namespace, by whomever.
func (k *kernel) generation() (uint32, error) {
	reply, err := k.raw.Execute(mdlayher.Message{
		Header: mdlayher.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: mdlayher.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, fmt.Errorf("read the nftables generation: %w", err)
	}
	for _, m := range reply {
		if len(m.Data) < 4 {
			continue
		}
		attrs, err := mdlayher.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("read the nftables generation: %w", err)
		}
		for _, a := range attrs {
			if a.Type == unix.NFTA_GEN_ID && len(a.Data) == 4 {
				return binary.BigEndian.Uint32(a.Data), nil
			}
		}
	}
	return 0, errors.New("read the nftables generation: no answer")
}

// read compares what the kernel has with the constant part of t.
func (k *kernel) read(t table) (state, error) {
	tables, err := k.conn.ListTablesOfFamily(t.family)
	if err != nil {
		return state{}, fmt.Errorf("list nftables tables: %w", err)
	}
	at := slices.IndexFunc(tables, func(x *nftables.Table) bool { return x.Name == TableName })
	if at < 0 {
		return state{}, nil
	}
	of := tables[at]
	s := state{exists: true}
	chainsWhole, err := k.readChains(t, of, &s)
	if err != nil || !chainsWhole {
		return s, err
	}
	s.elements, err = k.readSets(t, of)
	if err != nil {
		return state{}, err
	}
	s.whole = s.elements != nil
	return s, nil
}

func (k *kernel) readChains(t table, of *nftables.Table, s *state) (whole bool, err error) {
	chains, err := k.conn.ListChainsOfTableFamily(t.family)
	if err != nil {
		return false, fmt.Errorf("list nftables chains: %w", err)
	}
	have := map[string]*nftables.Chain{}
	for _, c := range chains {
		if c.Table.Name == TableName {
			have[c.Name] = c
		}
	}
	_, s.forwarding = have[forwardingChain]
	whole = true
	for _, want := range t.chains {
		c, ok := have[want.name]
		if !ok || !sameChain(want, c) {
			return false, nil
		}
		rules, err := k.conn.GetRules(of, c)
		if err != nil {
			return false, fmt.Errorf("list rules of nftables chain %s: %w", want.name, err)
		}
		if len(rules) != len(want.rules) {
			return false, nil
		}
		for i, r := range rules {
			same, err := sameRule(t, want.rules[i].exprs, r.Exprs)
			if err != nil {
				return false, err
			}
			whole = whole && same
		}
	}
	return whole, nil
}

func sameChain(want chain, c *nftables.Chain) bool {
	if want.hook == nil {
		return c.Hooknum == nil
	}
	return c.Hooknum != nil && *c.Hooknum == *want.hook &&
		c.Priority != nil && *c.Priority == want.priority &&
		c.Policy != nil && *c.Policy == nftables.ChainPolicyAccept && c.Type == want.kind
}

// sameRule compares expressions in the form in which they are sent.
func sameRule(t table, want, have []expr.Any) (bool, error) {
	if len(want) != len(have) {
		return false, nil
	}
	for i := range want {
		w, err := expr.Marshal(byte(t.family), want[i])
		if err != nil {
			return false, err
		}
		h, err := expr.Marshal(byte(t.family), have[i])
		if err != nil {
			return false, err
		}
		if string(w) != string(h) {
			return false, nil
		}
	}
	return true, nil
}

// readSets returns nil when a set is missing or holds what Berth never puts there.
func (k *kernel) readSets(t table, of *nftables.Table) (elements, error) {
	sets, err := k.conn.GetSets(of)
	if err != nil {
		return nil, fmt.Errorf("list nftables sets: %w", err)
	}
	out := elements{}
	for _, name := range setNames() {
		at := slices.IndexFunc(sets, func(s *nftables.Set) bool { return s.Name == string(name) })
		if at < 0 || !sameSet(t.set(of, name), sets[at]) {
			return nil, nil
		}
		list, err := k.conn.GetSetElements(sets[at])
		if err != nil {
			return nil, fmt.Errorf("list elements of nftables set %s: %w", name, err)
		}
		known, ok := recognise(shapeOf(name, t.v6), list)
		if !ok {
			return nil, nil
		}
		out[name] = known
	}
	return out, nil
}

// recognise decodes a set; ok is false when it holds what Berth never puts there.
func recognise(s shape, list []nftables.SetElement) (known members, ok bool) {
	known, err := decode(s, list)
	return known, err == nil
}

func sameSet(want, have *nftables.Set) bool {
	return want.KeyType.Name == have.KeyType.Name && want.IsMap == have.IsMap && want.DataType.Name == have.DataType.Name &&
		want.Interval == have.Interval
}

// change adds to the transaction what brings a table to what is wanted, and says
// whether that was anything. It makes the table anew unless it is whole. When
// current, only what was touched can differ.
func (k *kernel) change(s *side, current bool) (queued bool, err error) {
	t, have := s.table, s.have
	of := &nftables.Table{Name: TableName, Family: t.family}
	if !have.whole {
		if have.exists {
			k.conn.DelTable(of)
		}
		if err := k.build(t, of); err != nil {
			return false, err
		}
		have, current, queued = state{elements: newElements()}, false, true
	}
	for _, name := range setNames() {
		add, remove := s.want.steps(name, have.elements[name], !current)
		// Removals first: a subnet may make room for a larger one.
		set := t.set(of, name)
		if err := k.elements(set, t.v6, remove, nil, k.conn.SetDeleteElements); err != nil {
			return false, err
		}
		if err := k.elements(set, t.v6, add, s.want.elements[name], k.conn.SetAddElements); err != nil {
			return false, err
		}
		queued = queued || len(add)+len(remove) > 0
	}
	if s.forwarding == have.forwarding {
		return queued, nil
	}
	mark := &nftables.Chain{Name: forwardingChain, Table: of}
	if s.forwarding {
		k.conn.AddChain(mark)
	} else {
		k.conn.DelChain(mark)
	}
	return true, nil
}

func (k *kernel) elements(
	set *nftables.Set, v6 bool, list []member, values members, send func(*nftables.Set, []nftables.SetElement) error,
) error {
	shape := shapeOf(setName(set.Name), v6)
	for part := range slices.Chunk(list, chunk) {
		if err := send(set, encode(shape, part, values)); err != nil {
			return fmt.Errorf("nftables set %s: %w", set.Name, err)
		}
	}
	return nil
}

func (k *kernel) build(t table, of *nftables.Table) error {
	k.conn.AddTable(of)
	ids := map[string]uint32{}
	for i, name := range setNames() {
		set := t.set(of, name)
		// The library numbers sets by a counter that is shared without a lock.
		set.ID = uint32(i + 1)
		ids[set.Name] = set.ID
		if err := k.conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("make nftables set %s: %w", name, err)
		}
	}
	policy := nftables.ChainPolicyAccept
	chains := make([]*nftables.Chain, len(t.chains))
	for i, c := range t.chains {
		chains[i] = &nftables.Chain{Name: c.name, Table: of}
		if c.hook != nil {
			chains[i].Type, chains[i].Hooknum, chains[i].Priority, chains[i].Policy = c.kind, c.hook, &c.priority, &policy
		}
		k.conn.AddChain(chains[i])
	}
	for i, c := range t.chains {
		for _, r := range c.rules {
			k.conn.AddRule(&nftables.Rule{Table: of, Chain: chains[i], Exprs: r.exprs})
		}
	}
	return nil
}

// remove takes the table away if it is there.
func (k *kernel) remove(t table, have state) {
	if have.exists {
		k.conn.DelTable(&nftables.Table{Name: TableName, Family: t.family})
	}
}
