package guest

import "time"

// VolumeDriver is the name under which an engine knows Berth's volumes, whichever
// way Berth runs.
const VolumeDriver = "berth-vol"

// NetworkDriver is the name under which an engine knows Berth's networks and
// addresses.
const NetworkDriver = "berth-net"

// StartBerthVolumes runs the volume service beside the engine, with data as its
// root, and waits for its socket. It has to be there when the engine first asks
// for the driver.
func (n *Node) StartBerthVolumes(berthd, data string) *Daemon {
	n.t.Helper()
	return n.startBerth(VolumeDriver, berthd, "volume", "--data", data)
}

// StartBerthNetworks runs the network service beside the engine, as
// StartBerthVolumes does the volume service.
func (n *Node) StartBerthNetworks(berthd string) *Daemon {
	n.t.Helper()
	return n.startBerth(NetworkDriver, berthd, "network")
}

func (n *Node) startBerth(driver, berthd string, args ...string) *Daemon {
	n.t.Helper()
	socket := "/run/docker/plugins/" + driver + ".sock"
	n.Must("mkdir", "-p", "/run/docker/plugins")
	argv := append([]string{berthd}, args...)
	d := n.Start("berthd", append(argv, "--socket", socket, "--state", "/var/lib/berth")...)
	d.waitUp(n.t, time.Minute, n.listens(socket))
	return d
}

// InstallBerthVolumes makes the managed plugin from its directory and enables it
// with data, a directory of the node, as its root.
func (n *Node) InstallBerthVolumes(dir, data string) {
	n.t.Helper()
	n.Must("mkdir", "-p", "/var/lib/berth", data)
	n.Docker("plugin create " + VolumeDriver + " " + dir)
	n.Docker("plugin set " + VolumeDriver + " data.source=" + data)
	n.Docker("plugin enable " + VolumeDriver)
}
