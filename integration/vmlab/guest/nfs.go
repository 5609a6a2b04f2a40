package guest

import (
	"strings"
	"testing"
)

// NFSServer is a node that exports one directory by NFS version 4.
type NFSServer struct {
	*Node
	// Export is the directory's path on the server and in what clients mount.
	Export string
}

// NewNFSServer makes a server on the LAN. The VM has to have loaded module nfsd.
func (l *LAN) NewNFSServer(t testing.TB, name string) *NFSServer {
	t.Helper()
	s := &NFSServer{Node: l.NewNode(t, name), Export: "/srv/export"}
	// Each network namespace has its own nfsd, reached through file systems that
	// are mounted from within it.
	s.Must("mkdir", "-p", s.Export, "/run/rpc_pipefs", "/run/nfs", "/run/nfs/nfsdcld", "/run/nfs/v4recovery")
	s.Must("mount", "--bind", "/run/nfs", "/var/lib/nfs")
	s.Must("touch", "/var/lib/nfs/etab", "/var/lib/nfs/rmtab")
	s.Must("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
	s.Must("mount", "-t", "rpc_pipefs", "rpc_pipefs", "/run/rpc_pipefs")
	// With a record of its clients the server need not hold back new ones for the
	// grace period after each start.
	s.Start("nfsdcld", "nfsdcld", "--foreground", "--pipefsdir", "/run/rpc_pipefs", "--storagedir", "/var/lib/nfs/nfsdcld")
	s.Must("exportfs", "-o", "rw,no_root_squash,no_subtree_check,fsid=77", "10.77.0.0/24:"+s.Export)
	s.Start("mountd", "rpc.mountd", "--foreground", "--no-nfs-version", "2", "--no-nfs-version", "3")
	s.Up()
	return s
}

// Up starts the server's threads.
func (s *NFSServer) Up() {
	s.t.Helper()
	s.Must("rpc.nfsd", "--no-nfs-version", "3", "--grace-time", "10", "--lease-time", "10", "4")
}

// Down stops the server's threads: its port refuses, as after a crash of the
// service.
func (s *NFSServer) Down() {
	s.t.Helper()
	s.Must("rpc.nfsd", "0")
}

// Cut makes the server's host swallow every packet, as with a pulled cable.
func (s *NFSServer) Cut() {
	s.t.Helper()
	s.Must("nft", "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }")
}

// Join undoes Cut.
func (s *NFSServer) Join() {
	s.t.Helper()
	s.Must("nft", "delete table inet cut")
}

// MountExport mounts the export on the client as users do: hard, so that calls
// wait for a server that is away, and asks every 3 s whether it is back.
func (n *Node) MountExport(s *NFSServer, target string) {
	n.t.Helper()
	n.Must("mkdir", "-p", target)
	n.Must("mount", "-t", "nfs4", "-o", strings.Join([]string{"vers=4.2", "hard", "timeo=30"}, ","), s.Addr+":"+s.Export, target)
}
