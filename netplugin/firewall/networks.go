package firewall

import "maps"

// putLocked adds a network or replaces that of its bridge.
func (m *Manager) putLocked(n Network) {
	// Which elements an endpoint has depends on its network.
	endpoints := m.endpointsOf(n.Bridge)
	for _, ep := range endpoints {
		m.dropEndpointLocked(ep.ID)
	}
	m.dropLocked(n.Bridge)
	m.networks[n.Bridge] = n
	for _, s := range m.sides() {
		s.want.put(n)
	}
	for _, ep := range endpoints {
		m.putEndpointLocked(ep)
	}
}

func (m *Manager) dropLocked(bridge string) {
	n, ok := m.networks[bridge]
	if !ok {
		return
	}
	delete(m.networks, bridge)
	for _, s := range m.sides() {
		s.want.drop(n)
	}
}

// replaceLocked puts these networks and endpoints in the place of all others.
func (m *Manager) replaceLocked(networks map[string]Network, endpoints []Endpoint) {
	m.replaceEndpointsLocked(nil)
	for bridge := range maps.Clone(m.networks) {
		m.dropLocked(bridge)
	}
	for _, s := range m.sides() {
		s.want.forgetAll()
	}
	for _, n := range networks {
		m.putLocked(n)
	}
	m.replaceEndpointsLocked(endpoints)
}

// adoptLocked takes over, once, what the tables hold. Of the networks only the
// bridges are known until they are told.
func (m *Manager) adoptLocked() error {
	if m.adopted {
		return nil
	}
	if _, err := m.readLocked(); err != nil {
		return err
	}
	for _, s := range m.sides() {
		for _, bridge := range s.want.adopt(s.have.elements) {
			m.networks[bridge] = Network{Bridge: bridge}
		}
	}
	// The chains of others have not been looked at.
	m.generation = 0
	m.adopted = true
	return nil
}
