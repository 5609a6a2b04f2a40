package guest

import "time"

// VolumeDriver is the name under which an engine knows Berth's volumes, whichever
// way Berth runs.
const VolumeDriver = "berth-vol"

// StartBerthVolumes runs the volume service beside the engine, with data as its
// root, and waits for its socket. It has to be there when the engine first asks
// for the driver.
func (n *Node) StartBerthVolumes(berthd, data string) *Daemon {
	n.t.Helper()
	const socket = "/run/docker/plugins/" + VolumeDriver + ".sock"
	n.Must("mkdir", "-p", "/run/docker/plugins")
	d := n.Start("berthd", berthd, "volume", "--socket", socket, "--state", "/var/lib/berth", "--data", data)
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
