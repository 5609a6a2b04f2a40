package netplugin

import (
	"net/netip"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/state"
)

// schemaVersion is that of all buckets below. The names of the fields of the
// record types, and of the types in them, are the schema.
//
// Version 2 added published ports, gateway modes and policies. Their zero values
// mean what version 1 did, so nothing is migrated; but a daemon of version 1 would
// open networks that they close, and must not read them.
const schemaVersion = 2

// OpenState opens the driver's records, one file for each host. The errors are
// those of state.Open.
func OpenState(path string) (*state.DB, error) {
	return state.Open(path, state.Options{
		Version:    schemaVersion,
		Migrations: []state.Migration{func(*bolt.Tx) error { return nil }},
	})
}

// A phase says how far a record is from what the host has.
type phase string

const (
	// phaseCreating: some of it may exist. dockerd has no answer; undo.
	phaseCreating phase = "creating"
	// phaseReady: all of it should exist.
	phaseReady phase = "ready"
	// phaseRemoving: some of it may still exist; go on removing.
	phaseRemoving phase = "removing"
)

// A networkRecord is a network. Its key is the network ID.
type networkRecord struct {
	Phase phase
	Spec  options.Network
	// NamedBridge says that the user chose the bridge's name.
	NamedBridge bool
	// Space is the address space of the subnets, which tells the IPAM driver
	// that gave them out; "" when there are none.
	Space string
	// Since is when the network was created.
	Since time.Time
}

// An endpointRecord is an endpoint. Its key is NETWORK ID "/" ENDPOINT ID.
type endpointRecord struct {
	Phase phase
	Spec  options.Endpoint
	// Since is when the endpoint was created.
	Since time.Time
}

// A poolRecord is an address pool. Its key is the pool ID.
type poolRecord = ipam.Pool

// A leaseRecord is an address in use. Its key is POOL ID "|" ADDRESS; pool IDs
// have slashes in them.
type leaseRecord struct {
	Pool  string
	Lease ipam.Lease
}

// A hostRecord is what the host keeps from its first start. Its key is hostKey.
type hostRecord struct {
	// ULA is the /48 of automatic IPv6 pools.
	ULA netip.Prefix
}

const hostKey = "host"

func endpointKey(network, endpoint string) string { return network + "/" + endpoint }

func leaseKey(pool string, addr netip.Addr) string { return pool + "|" + addr.String() }

// buckets are all records of the driver.
type buckets struct {
	networks  state.Bucket[networkRecord]
	endpoints state.Bucket[endpointRecord]
	pools     state.Bucket[poolRecord]
	leases    state.Bucket[leaseRecord]
	host      state.Bucket[hostRecord]
}

func newBuckets() buckets {
	return buckets{
		networks:  state.NewBucket[networkRecord]("networks"),
		endpoints: state.NewBucket[endpointRecord]("endpoints"),
		pools:     state.NewBucket[poolRecord]("pools"),
		leases:    state.NewBucket[leaseRecord]("leases"),
		host:      state.NewBucket[hostRecord]("host"),
	}
}
