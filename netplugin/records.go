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
//
// Version 3 moved pools and leases into a log of their own (see leaseStore), which
// happens when the driver opens it.
const schemaVersion = 3

// OpenState opens the driver's records, one file for each host. The errors are
// those of state.Open.
func OpenState(path string) (*state.DB, error) {
	return state.Open(path, state.Options{
		Version:    schemaVersion,
		Migrations: []state.Migration{none, none},
	})
}

// none is a migration with nothing to do.
func none(*bolt.Tx) error { return nil }

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
	// Pools are those of Berth's that the network was made with, in case the log of
	// addresses is damaged.
	Pools []ipam.Pool `json:",omitempty"`
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

// A leaseRecord is an address in use, as version 2 stored it.
type leaseRecord struct {
	Pool  string
	Lease ipam.Lease
}

// A hostRecord is what the host keeps from its first start. Its key is hostKey.
type hostRecord struct {
	// ULA is the /48 of automatic IPv6 pools.
	ULA netip.Prefix
	// LeaseLog says that there is a log of addresses.
	LeaseLog bool `json:",omitempty"`
}

const hostKey = "host"

func endpointKey(network, endpoint string) string { return network + "/" + endpoint }

// buckets are all records of the driver.
type buckets struct {
	networks  state.Bucket[networkRecord]
	endpoints state.Bucket[endpointRecord]
	host      state.Bucket[hostRecord]
	// oldPools and oldLeases are those of version 2.
	oldPools  state.Bucket[ipam.Pool]
	oldLeases state.Bucket[leaseRecord]
}

func newBuckets() buckets {
	return buckets{
		networks:  state.NewBucket[networkRecord]("networks"),
		endpoints: state.NewBucket[endpointRecord]("endpoints"),
		host:      state.NewBucket[hostRecord]("host"),
		oldPools:  state.NewBucket[ipam.Pool]("pools"),
		oldLeases: state.NewBucket[leaseRecord]("leases"),
	}
}
