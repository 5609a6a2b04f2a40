package vmlab

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// lanStory is an engine with Berth on a host of a LAN, where a neighbour is on VLAN 50
// too, and has addresses there that are next for containers.
type lanStory struct {
	lan             *guest.LAN
	host, neighbour *guest.Node
	berthd          *guest.Daemon
	atFirst         string // the host's network before there were containers
}

// tellLANStory plays what a user does with docker on a LAN.
func tellLANStory(t *testing.T) {
	s := furnishLAN(t)
	on := func(t *testing.T) *lanStory {
		s.host, s.neighbour = s.host.On(t), s.neighbour.On(t)
		return s
	}
	tell(t, on, []chapter[*lanStory]{
		{"ipvlan l2 with access to the host", (*lanStory).ipvlanL2},
		{"a VLAN with its neighbours", (*lanStory).vlan50},
		{"VLANs go with the last network unless they are foreign", (*lanStory).lastOnVLAN},
		{"Berth is killed and a network removed meanwhile", (*lanStory).killed},
		{"the host loses its power", (*lanStory).powerLost},
		{"ipvlan l3s", (*lanStory).ipvlanL3S},
		{"nothing is left", (*lanStory).nothingLeft},
	})
}

func furnishLAN(t *testing.T) *lanStory {
	lan := guest.NewLAN(t)
	s := &lanStory{lan: lan, host: lan.NewNode(t, "host"), neighbour: lan.NewNode(t, "neighbour")}
	s.neighbour.Must("sh", "-ec", `
		ip addr add fd77::12/64 dev eth0 nodad
		ip link add link eth0 name eth0.50 type vlan id 50
		ip link set eth0.50 up
		for addr in 10.50.0.9/24 10.50.0.64/24 10.50.0.65/24 10.50.0.66/24 fd50::9/64; do
			ip addr add $addr dev eth0.50 nodad
		done
		ip route add 10.71.0.0/16 via 10.77.0.1
		ip route add fd71::/64 via fd77::11`)
	s.host.Must("ip", "addr", "add", "fd77::11/64", "dev", "eth0", "nodad")
	s.addForeignVLAN()
	s.startBerthd()
	s.host.StartEngine()
	s.atFirst = s.network()
	return s
}

// addForeignVLAN does what the host's own configuration does at boot.
func (s *lanStory) addForeignVLAN() {
	s.host.Must("sh", "-ec", `
		ip link add link eth0 name eth0.60 type vlan id 60
		ip link set eth0.60 addrgenmode none up`)
}

func (s *lanStory) startBerthd() {
	s.berthd = s.host.StartBerthNetworks(filepath.Join(Dir, "berthd"))
}

// network is all of the host's network that Berth may change.
func (s *lanStory) network() string {
	return s.host.Must("sh", "-ec", `
		ip -brief link
		ip -brief addr
		ip route show table all
		ip -6 route show table all
		ip rule
		ip neigh show proxy
		ip -6 neigh show proxy
		nft list ruleset`)
}

// create makes a network of Berth's with addresses of Berth's.
func (s *lanStory) create(line string) {
	s.host.Docker("network create -d " + guest.NetworkDriver + " --ipam-driver " + guest.NetworkDriver + " " + line)
}

// run starts a container that does nothing.
func (s *lanStory) run(line string) *guest.Container {
	args := strings.Fields(line)
	s.host.Docker("run -d --name " + line + " " + guest.Image + " sleep 100000")
	return s.host.Container(args[0])
}

// A place is somewhere that a program can run.
type place interface {
	Try(argv ...string) guest.Result
}

// ping has to be answered by each address.
func ping(t *testing.T, from place, addrs ...string) {
	t.Helper()
	r := from.Try(append([]string{"sh", "-c", "for addr; do busybox ping -c 1 -W 5 $addr || exit; done", "ping"}, addrs...)...)
	assert.NilError(t, r.Err, "%s", r.Out)
}

// noPing has to be answered by none.
func noPing(t *testing.T, from place, addrs ...string) {
	t.Helper()
	r := from.Try(append([]string{"sh", "-c", "for addr; do ! busybox ping -c 1 -W 1 $addr || exit; done", "ping"}, addrs...)...)
	assert.NilError(t, r.Err, "%s", r.Out)
}

// has says whether the host has a link.
func (s *lanStory) has(link string) bool {
	return s.host.Try("ip", "link", "show", "dev", link).Err == nil
}

// hasLinkOf says in which way a container is on its network.
func hasLinkOf(t *testing.T, c *guest.Container, kind string) {
	t.Helper()
	shown := strings.Join(strings.Fields(c.Must("ip", "-d", "link", "show", "dev", "eth0")), " ")
	assert.Assert(t, strings.Contains(shown, kind), "%s", shown)
}

func mac(n *guest.Node) string {
	return strings.TrimSpace(n.Must("cat", "/sys/class/net/eth0/address"))
}

func (s *lanStory) ipvlanL2(t *testing.T) {
	s.create("--ipv6 --subnet 10.77.0.0/24 --gateway 10.77.0.254 --ip-range 10.77.0.128/25 --subnet fd77::/64 -o parent=eth0 -o ipvlan_mode=l2 -o host-access=10.77.0.100,fd77::100 office")
	mail := s.run("mail --network office --restart always --ip 10.77.0.130 --ip6 fd77::130")
	hasLinkOf(t, mail, "ipvlan mode l2 bridge")
	assert.Assert(t, strings.Contains(mail.Must("ip", "link", "show", "dev", "eth0"), mac(s.host)), "not the parent's MAC address")
	s.officeIsReached(t)
	s.host.DockerFails("network create -d "+guest.NetworkDriver+" --subnet 10.78.0.0/24 -o parent=eth0 -o mode=macvlan other",
		patient, "the kernel does not put macvlan links beside ipvlan links")
	s.host.DockerFails("network create -d "+guest.NetworkDriver+" --ipam-driver "+guest.NetworkDriver+
		" --subnet 10.77.0.0/24 --gateway 10.77.0.254 --ipam-opt parent=eth0 --ipam-opt dhcp=true -o parent=eth0 -o ipvlan_mode=l2 other",
		patient, "dhcp=true", "use mode macvlan")
}

// officeIsReached says that container mail and all others of its segment have each other.
func (s *lanStory) officeIsReached(t *testing.T) {
	t.Helper()
	mail := s.host.Container("mail")
	assert.Equal(t, mail.Networks["office"].IPAddress, "10.77.0.130")
	ping(t, mail, s.neighbour.Addr, "fd77::12", "10.77.0.100", "fd77::100")
	ping(t, s.neighbour, "10.77.0.130", "fd77::130", s.host.Addr, "fd77::11")
	ping(t, s.host, "10.77.0.130", "fd77::130", s.neighbour.Addr, "fd77::12")
}

func (s *lanStory) vlan50(t *testing.T) {
	tagged := s.lan.CountVLAN(t, s.host.Name, 50)
	s.create("--ipv6 --subnet 10.50.0.0/24 --gateway 10.50.0.254 --ip-range 10.50.0.64/30 --subnet fd50::/64 -o parent=eth0.50 -o host-access=10.50.0.100,fd50::100 v50")
	assert.Assert(t, strings.Contains(s.host.Must("ip", "-d", "link", "show", "dev", "eth0.50"), "vlan protocol 802.1Q id 50"))
	web := s.run("web --network v50 --restart always")
	hasLinkOf(t, web, "macvlan mode bridge")
	s.webIsReached(t)
	assert.Assert(t, tagged() > 0, "no frame had the tag")
	noPing(t, web, s.neighbour.Addr)

	// Those before are the neighbour's.
	conflicts := s.host.Must(filepath.Join(Dir, "docker-berth"), "lease", "ls", "--filter", "state=conflict", "--format", "{{.Address}} {{.MAC}}")
	theirs := mac(s.neighbour)
	for _, addr := range []string{"10.50.0.64", "10.50.0.65", "10.50.0.66"} {
		assert.Assert(t, strings.Contains(conflicts, addr+" "+theirs), "%s", conflicts)
	}
	for _, c := range []struct{ asked, taken string }{
		{"--ip 10.50.0.65", "10.50.0.65"},
		{"--ip 10.50.0.80 --ip6 fd50::9", "fd50::9"}, // the range of IPv4 is full
	} {
		s.host.DockerFails("run --rm --network v50 "+c.asked+" "+guest.Image+" true", patient, c.taken, theirs)
	}
}

// webIsReached says that container web and all others of its VLAN have each other.
func (s *lanStory) webIsReached(t *testing.T) {
	t.Helper()
	web := s.host.Container("web")
	addr4, addr6 := web.Networks["v50"].IPAddress, web.Networks["v50"].GlobalIPv6Address
	assert.Equal(t, addr4, "10.50.0.67", "the only one that the neighbour does not have")
	ping(t, web, "10.50.0.9", "fd50::9", "10.50.0.100", "fd50::100")
	ping(t, s.neighbour, addr4, addr6)
	ping(t, s.host, addr4, addr6)
}

func (s *lanStory) lastOnVLAN(t *testing.T) {
	s.create("--subnet 10.51.0.0/24 -o parent=eth0.51 one")
	s.create("--subnet 10.52.0.0/24 -o parent=eth0.51 two")
	s.create("--subnet 10.60.0.0/24 -o parent=eth0.60 -o ipvlan_mode=l2 foreign")
	s.host.Docker("network rm foreign one")
	assert.Assert(t, s.has("eth0.60"), "it was there before")
	assert.Assert(t, s.has("eth0.51"), "network two is on it")
}

func (s *lanStory) killed(t *testing.T) {
	s.berthd.Signal(t, unix.SIGKILL)
	s.berthd.WaitEnd(t)
	s.officeIsReached(t)
	s.webIsReached(t)
	removal := s.host.Start("removal", "docker", "network", "rm", "two")
	eventually(t, "the engine finds that Berth is away", func() bool {
		return strings.Contains(s.host.EngineLog(), "Unable to connect to plugin")
	})
	s.startBerthd()
	removal.WaitEnd(t)
	assert.Equal(t, strings.TrimSpace(removal.Log(t)), "two")
	assert.Assert(t, !s.has("eth0.51"), "VLAN 51 is still there")
	wiki := s.run("wiki --network office")
	addrs := wiki.Networks["office"]
	ping(t, s.host.Container("mail"), addrs.IPAddress, addrs.GlobalIPv6Address)
	ping(t, wiki, s.neighbour.Addr, "fd77::12", "10.77.0.130", "fd77::130", "10.77.0.100", "fd77::100")
	s.host.Docker("rm -f wiki")
}

func (s *lanStory) powerLost(t *testing.T) {
	s.host.LosePower()
	s.berthd.WaitEnd(t)
	assert.Assert(t, !s.has("eth0.50"))
	s.addForeignVLAN()
	s.startBerthd()
	s.host.RestartEngine()
	eventually(t, "the containers run again", func() bool { return s.host.Runs("mail") && s.host.Runs("web") })
	s.officeIsReached(t)
	s.webIsReached(t)
	s.host.Docker("rm -f mail")
	s.host.Docker("network rm office")
}

func (s *lanStory) ipvlanL3S(t *testing.T) {
	s.create("--ipv6 --subnet 10.71.0.0/24 --subnet 10.71.1.0/24 --subnet fd71::/64 -o parent=eth0 -o host-access=true -o ipvlan_mode=l3s routed")
	far := s.run("far --network routed --ip 10.71.1.9 --ip6 fd71::9")
	hasLinkOf(t, far, "ipvlan mode l3s bridge")
	routes := far.Must("ip", "route") + "\n" + far.Must("ip", "-6", "route")
	for _, half := range []string{"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"} {
		assert.Assert(t, strings.Contains(routes, half+" dev eth0"), "%s", routes)
	}
	assert.Assert(t, !strings.Contains(routes, "default"), "%s", routes)
	ping(t, far, s.neighbour.Addr, "fd77::12", s.host.Addr, "fd77::11")
	ping(t, s.host, "10.71.1.9", "fd71::9")
	ping(t, s.neighbour, "10.71.1.9", "fd71::9")
	// The host's own rules hold for what goes in.
	s.host.Must("nft", "add table ip stop; add chain ip stop in { type filter hook input priority 0; }; add rule ip stop in ip daddr 10.71.1.9 drop")
	noPing(t, s.neighbour, "10.71.1.9")
	s.host.Must("nft", "delete table ip stop")
	s.host.Docker("rm -f far")
	s.host.Docker("network rm routed")
}

func (s *lanStory) nothingLeft(t *testing.T) {
	s.host.Docker("rm -f web")
	s.host.Docker("network rm v50")
	assert.Equal(t, s.network(), s.atFirst)
	for _, what := range []string{"network", "endpoint", "lease", "pool"} {
		assert.Equal(t, s.host.Must(filepath.Join(Dir, "docker-berth"), what, "ls", "--quiet"), "", what)
	}
}
