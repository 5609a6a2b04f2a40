package hostport

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// A batch is one Reserve under way. What the endpoint held before is not touched
// until all is found.
type batch struct {
	m *Manager
	t Target
	// next is what the endpoint is to hold; before is what it holds.
	next   map[key]destination
	before map[key]*socket
	// opened are the sockets that the batch has opened, set aside those of the
	// endpoint itself that had to make room for one of them.
	opened, aside []*socket
	// kept leads from a port of the container to what the endpoint holds for it.
	kept map[slot][]key
	// start is where the search in a range goes on.
	start     map[choice]uint16
	ephemeral *ephemeral
}

// A choice is a range of ports on certain addresses.
type choice struct {
	proto       options.Proto
	first, last uint16
	hosts       [2]netip.Addr
}

// reserveLocked is Reserve on a thread in the namespace.
func (m *Manager) reserveLocked(ctx context.Context, t Target, want []options.PortRequest) ([]options.PublishedPort, error) {
	groups, ports, impossible := expand(t, want, hasIPv6())
	if len(impossible) > 0 && !t.Network.Internal {
		m.log.WithField("endpoint", t.Endpoint).WithField("ports", len(impossible)).
			Infof("not published, as the container's addresses do not allow it: %s and the like", impossible[0])
	}
	b := &batch{
		m: m, t: t, next: make(map[key]destination, 2*len(groups)), before: maps.Clone(m.held[t.Endpoint]),
		kept: map[slot][]key{}, start: map[choice]uint16{},
	}
	for k, s := range b.before {
		at := slot{k.proto, s.to.port}
		b.kept[at] = append(b.kept[at], k)
	}
	ports, err := b.placeAll(ctx, groups, ports)
	if err != nil {
		b.rollback()
		return nil, err
	}
	maps.DeleteFunc(b.before, func(k key, _ *socket) bool {
		_, wanted := b.next[k]
		return wanted
	})
	m.dropAllLocked(slices.Collect(maps.Values(b.before)))
	for k, to := range b.next {
		m.held[t.Endpoint][k].to = to
	}
	return coalesce(ports), nil
}

// placeAll finds ports for the groups and adds them to ports. Fixed ones have no
// choice; then comes what is held already, so that nothing else chooses it.
func (b *batch) placeAll(ctx context.Context, groups []group, ports []options.PublishedPort) ([]options.PublishedPort, error) {
	choosing := slices.IndexFunc(groups, func(g group) bool { return !g.fixed() })
	if choosing < 0 {
		choosing = len(groups)
	}
	place := func(groups []group) error {
		for _, g := range groups {
			if err := ctx.Err(); err != nil {
				return err
			}
			port, err := b.place(g)
			if err != nil {
				return err
			}
			ports = g.appendTo(ports, port)
		}
		return nil
	}
	if err := place(groups[:choosing]); err != nil {
		return nil, err
	}
	var rest []group
	for _, g := range groups[choosing:] {
		if port, ok := b.keep(g); ok {
			ports = g.appendTo(ports, port)
		} else {
			rest = append(rest, g)
		}
	}
	if err := place(rest); err != nil {
		return nil, err
	}
	return ports, nil
}

// appendTo adds the group's bindings on this host port.
func (g group) appendTo(ports []options.PublishedPort, port uint16) []options.PublishedPort {
	for _, b := range g.bindings {
		ports = append(ports, options.PublishedPort{
			Proto: g.proto, Host: b.host, HostPort: port, Container: b.container, ContainerPort: g.container, Count: 1,
		})
	}
	return ports
}

// keep takes a port that the endpoint holds for the same port of the container.
func (b *batch) keep(g group) (uint16, bool) {
	for _, k := range b.kept[slot{g.proto, g.container}] {
		if _, taken := b.next[k]; taken || !g.ephemeral() && (k.port < g.first || k.port > g.last) {
			continue
		}
		for _, binding := range g.bindings {
			if binding.host == k.host && b.try(g, k.port) == nil {
				return k.port, true
			}
		}
	}
	return 0, false
}

// place finds a port for the group and takes it.
func (b *batch) place(g group) (uint16, error) {
	switch {
	case g.fixed():
		return g.first, b.try(g, g.first)
	case g.ephemeral():
		return b.placeEphemeral(g)
	}
	c := choice{proto: g.proto, first: g.first, last: g.last}
	for i, binding := range g.bindings {
		if i < len(c.hosts) {
			c.hosts[i] = binding.host
		}
	}
	from := b.start[c]
	if from == 0 || len(g.bindings) > len(c.hosts) {
		from = g.first
	}
	for port := int(from); port <= int(g.last); port++ {
		if b.taken(g, uint16(port)) {
			continue
		}
		err := b.try(g, uint16(port))
		if err == nil {
			b.start[c] = uint16(port)
		}
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return uint16(port), err
		}
	}
	return 0, fault.Conflict("Bind for %s-%d failed: port is already allocated: none of %d-%d/%s is free on %s",
		key{g.proto, g.first, g.bindings[0].host}, g.last, g.first, g.last, g.proto, g.hosts())
}

func (b *batch) placeEphemeral(g group) (uint16, error) {
	if b.ephemeral == nil {
		e := readEphemeral()
		b.ephemeral = &e
	}
	e := b.ephemeral
	size := int(e.last) - int(e.first) + 1
	offset := int(b.m.cursor) % size
	for i := range size {
		port := e.first + uint16((offset+i)%size)
		if e.reserved[port] || b.taken(g, port) {
			continue
		}
		err := b.try(g, port)
		if err == nil {
			b.m.cursor = uint16((offset + i + 1) % size)
		}
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return port, err
		}
	}
	return 0, fault.Exhausted("Bind for %s failed: all ports are allocated: none of %d-%d/%s (net.ipv4.ip_local_port_range) is free on %s",
		key{g.proto, 0, g.bindings[0].host}, e.first, e.last, g.proto, g.hosts())
}

// hosts are the addresses of the group in words.
func (g group) hosts() string {
	text := ""
	for i, b := range g.bindings {
		if i > 0 {
			text += " and "
		}
		text += b.host.String()
	}
	return text
}

// taken reports whether trying the port is a waste of time.
func (b *batch) taken(g group, port uint16) bool {
	for _, binding := range g.bindings {
		k := key{g.proto, port, binding.host}
		if _, ok := b.next[k]; ok {
			return true
		}
		if s := b.m.table.exact(k); s != nil && s.owner != b.t.Endpoint {
			return true
		}
	}
	return false
}

// try takes the port on all addresses of the group, or on none.
func (b *batch) try(g group, port uint16) error {
	opened := len(b.opened)
	for i, binding := range g.bindings {
		k := key{g.proto, port, binding.host}
		err := b.take(k, destination{binding.container, g.container})
		if err == nil {
			continue
		}
		b.m.dropAllLocked(b.opened[opened:])
		b.opened = b.opened[:opened]
		for _, done := range g.bindings[:i] {
			delete(b.next, key{g.proto, port, done.host})
		}
		return err
	}
	return nil
}

// take makes sure that the endpoint holds the key.
func (b *batch) take(k key, to destination) error {
	if other, ok := b.next[k]; ok {
		return fault.Conflict("Bind for %s failed: port is already allocated: %s/%s is to lead to port %d and to port %d of the same container: %w",
			k, k, k.proto, other.port, to.port, unix.EADDRINUSE)
	}
	if _, ok := b.before[k]; ok {
		b.next[k] = to
		return nil
	}
	s, err := b.m.openLocked(b.t, k, to)
	if errors.Is(err, unix.EADDRINUSE) && b.makeRoom(k) {
		s, err = b.m.openLocked(b.t, k, to)
	}
	if err != nil {
		return b.m.bindError(k, err)
	}
	b.opened = append(b.opened, s)
	b.next[k] = to
	return nil
}

// makeRoom lets go of what the endpoint itself holds in the way of k and does not
// want any more.
func (b *batch) makeRoom(k key) bool {
	made := false
	for _, s := range slices.Clone(b.m.table[k.slot()]) {
		if _, wanted := b.next[s.key]; wanted || s.owner != b.t.Endpoint || !s.overlaps(k) {
			continue
		}
		if _, ok := b.before[s.key]; !ok {
			continue
		}
		delete(b.before, s.key)
		b.m.dropAllLocked([]*socket{s})
		b.aside = append(b.aside, s)
		made = true
	}
	return made
}

// rollback brings back what the endpoint held before.
func (b *batch) rollback() {
	b.m.dropAllLocked(b.opened)
	for _, old := range b.aside {
		s, err := b.m.openLocked(b.t, old.key, old.to)
		if err == nil {
			err = b.m.armLocked(b.t, s, old.to)
		}
		if err != nil {
			b.m.log.WithError(b.m.bindError(old.key, err)).WithField("endpoint", b.t.Endpoint).
				Error("a published port was lost while others were picked")
		}
	}
}
