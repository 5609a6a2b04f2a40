package netplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/shared/state"
)

// A Mode makes networks and endpoints on the host. Every method may be repeated:
// Ensure repairs what is there, Remove succeeds when there is nothing. None of
// them touches what is not Berth's; it is a fault.Conflict to find such a thing
// where a link should be.
//
// The driver calls it for one network at a time, for different networks
// concurrently. It has recorded the network and endpoint before the first Ensure,
// and forgets them after the last Remove.
type Mode interface {
	// Restore is called once, before all others: it lets the traffic of
	// networks and published ports that are up go on while they are ensured
	// one by one, and forgets all others.
	Restore(context.Context, []options.Network, []options.Endpoint) error
	// Adopt completes the spec of a network that is about to be made by what
	// is on the host: an MTU that the user left open, a bridge that exists. It
	// changes nothing.
	Adopt(context.Context, options.Network) (options.Network, error)
	// Drift says in words, by network ID, what somebody has changed on
	// networks that were ensured. Those that are as they should be, or that
	// nothing is known of, are left out.
	Drift([]options.Network) (map[string]string, error)
	// EnsureNetwork makes the network or repairs it. After an error some of
	// it may exist; the driver then calls RemoveNetwork.
	EnsureNetwork(context.Context, options.Network) error
	// RemoveNetwork removes the network. Its endpoints have been removed.
	RemoveNetwork(context.Context, options.Network) error
	// EnsureEndpoint makes the endpoint of a network that exists or repairs
	// it. The container's end may have moved into the container.
	EnsureEndpoint(context.Context, options.Network, options.Endpoint) error
	// RemoveEndpoint removes the endpoint with its published ports. Its network
	// may be gone.
	RemoveEndpoint(context.Context, options.Network, options.Endpoint) error
	// ReservePorts picks and holds host ports for what an endpoint that exists
	// wants to publish, in the place of those it holds. Nothing but this process
	// keeps them.
	ReservePorts(context.Context, options.Network, options.Endpoint, []options.PortRequest) ([]options.PublishedPort, error)
	// EnsurePorts makes the endpoint's Ports work and no others of it. It may
	// fail for some and still serve the rest.
	EnsurePorts(context.Context, options.Network, options.Endpoint) error
	// RemovePorts ends the publishing and lets go of the ports.
	RemovePorts(context.Context, options.Network, options.Endpoint) error
}

// Links is what the driver asks the host. *link.Handle has it.
type Links interface {
	// Owned lists all links of Berth on the host.
	Owned() ([]link.Link, error)
	// Get returns the link of a name; ok is false when there is none.
	Get(name string) (l link.Link, ok bool, err error)
	// Elsewhere lists the links of endpoints that are in other namespaces.
	Elsewhere() ([]link.Link, error)
	// Routes lists the destinations the host knows a way to.
	Routes() ([]link.Route, error)
	// Delete removes a link of this owner.
	Delete(name string, owner link.Owner) error
	// Watch calls fn for each change of a link until ctx ends.
	Watch(ctx context.Context, fn func(link.Event)) error
}

// A Config is what a Driver works with. State, LeaseLog, Log, Links, Bridge and LAN are needed.
type Config struct {
	// State holds the records; see OpenState. The driver does not close it.
	State *state.DB
	// LeaseLog is the file of pools and addresses; see shared/journal for what lies
	// beside it.
	LeaseLog string
	Log      *logrus.Entry
	Links    Links
	// Bridge makes networks of the mode bridge, LAN those of macvlan and ipvlan.
	Bridge, LAN Mode
	// Prober asks on LANs for addresses before they are given out; nil asks nobody.
	// Its Ours is Driver.OwnMAC. The driver does not close it.
	Prober *probe.Prober
	// DHCP takes addresses from DHCP servers; nil takes none. It notifies
	// Driver.HearDHCP. The driver does not close it.
	DHCP *dhcp.Manager
	// KeyByMAC keeps addresses for MAC addresses instead of names of containers; see
	// IPAMCapabilities.
	KeyByMAC bool
	// Supernets are where automatic pools come from, first the user's; a
	// family without any gets the defaults of netplugin/ipam.
	Supernets []ipam.Supernet
	// Resolvers names a resolv.conf(5): automatic pools keep clear of its
	// name servers. "" is none.
	Resolvers string
	// Now is the clock, nil time.Now. Random makes IDs, nil crypto/rand.
	Now    func() time.Time
	Random io.Reader
}

// A Driver answers dockerd's calls for networks and addresses. All methods may be
// called concurrently, once Recover has returned.
type Driver struct {
	log       *logrus.Entry
	links     Links
	bridge    Mode
	lan       Mode
	resolvers string
	now       func() time.Time
	store     *store
	prober    *probe.Prober
	spares    *probe.Spares
	dhcp      *dhcp.Manager
	partings  *partings
	keyByMAC  bool
	// host tells this host's clients from others' at DHCP servers.
	host string
	// locks has one lock for each network ID, held over a whole call.
	locks *keylock.Locker

	mu sync.Mutex
	// broken are the networks that could not be repaired when they were
	// tried last. Guarded by mu.
	broken map[string]bool
	// dead are the endpoints whose link was found missing or unused, and
	// since when. Guarded by mu.
	dead map[string]time.Time
	// unserved are the endpoints of which some ports are not published, since
	// somebody else has them. Guarded by mu.
	unserved map[string]bool
	// watched end the watch for strangers on the LAN of a pool. Guarded by mu.
	watched map[string]func()
	// macs counts the endpoints on LANs by their MAC address. Guarded by mu.
	macs map[string]int
	// requesting are the clients for whom a DHCP server is being asked, see clientOf.
	// Guarded by mu.
	requesting map[string]bool
	// compared are the pools that a DHCP server was found to see otherwise. Guarded by
	// mu.
	compared map[string]bool
	// conflicts counts addresses that somebody else on the LAN was found to have.
	conflicts atomic.Int64
	// collected counts endpoints that were removed because their container was
	// gone.
	collected atomic.Int64
}

// New reads the records. The error is unavailable when they are damaged. The driver
// is to be closed.
func New(cfg Config) (*Driver, error) {
	if cfg.State == nil || cfg.LeaseLog == "" || cfg.Log == nil || cfg.Links == nil || cfg.Bridge == nil || cfg.LAN == nil {
		return nil, errors.New("network driver: State, LeaseLog, Log, Links, Bridge and LAN are needed")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = random()
	}
	records, err := openStore(cfg)
	if err != nil {
		return nil, err
	}
	d := &Driver{
		log:       cfg.Log,
		links:     cfg.Links,
		bridge:    cfg.Bridge,
		lan:       cfg.LAN,
		resolvers: cfg.Resolvers,
		now:       cfg.Now,
		store:     records,
		locks:     keylock.New(),
		broken:    make(map[string]bool),
		dead:      make(map[string]time.Time),
		unserved:  make(map[string]bool),

		prober: cfg.Prober, dhcp: cfg.DHCP, keyByMAC: cfg.KeyByMAC, host: records.host.ULA.String(),
		watched: make(map[string]func()), macs: make(map[string]int), requesting: make(map[string]bool), compared: make(map[string]bool),
	}
	d.partings = newPartings(d.release)
	if d.prober != nil {
		d.spares = probe.NewSpares(d.prober)
	}
	return d, nil
}

// Close ends what New has begun, when all calls have ended.
func (d *Driver) Close() error {
	var err error
	if d.spares != nil {
		err = d.spares.Close()
	}
	d.mu.Lock()
	watched := d.watched
	d.watched = nil
	d.mu.Unlock()
	for _, stop := range watched {
		stop()
	}
	d.partings.close()
	return errors.Join(err, d.store.leases.close())
}

// Network returns the side of the driver that answers NetworkDriver.*.
func (d *Driver) Network() pluginapi.NetworkDriver { return d }

// IPAM returns the side of the driver that answers IpamDriver.*.
func (d *Driver) IPAM() pluginapi.IPAMDriver { return d }

// undoTimeout is for taking back what a request did that failed, perhaps because
// its own time had run out.
const undoTimeout = 5 * time.Second

// undoContext is a context for that.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// warn logs what options.Parse… found.
func (d *Driver) warn(warnings []string, fields logrus.Fields) {
	for _, w := range warnings {
		d.log.WithFields(fields).Warn(w)
	}
}

func (d *Driver) setBroken(network string, broken bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if broken {
		d.broken[network] = true
		return
	}
	delete(d.broken, network)
}

func (d *Driver) isBroken(network string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.broken[network]
}

// unknownNetwork is the answer where a user has to act: dockerd never sends
// CreateNetwork again.
func unknownNetwork(id string) error {
	return fault.NotFound("network %s is not known to Berth (was its state directory changed?); remove the network and create it again", short(id))
}

// short is an ID as `docker ps` shows it.
func short(id string) string {
	const n = 12
	return id[:min(n, len(id))]
}

// removed reads the answer of a Mode's Remove. A conflict is a link of somebody
// else by the name of ours, so ours is gone.
func (d *Driver) removed(err error) error {
	if errdefs.IsConflict(err) {
		d.log.WithError(err).Warn("a link of Berth was replaced by another one, which stays")
		return nil
	}
	return err
}

// during says in which step something failed.
func during(step string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", step, err)
}
