package vmlab

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// TestKernel shows that the guest has what the VM lab is for, by using it.
func TestKernel(t *testing.T) {
	modules := []string{"8021q", "bridge", "dm_thin_pool", "dummy", "ipvlan", "loop", "nfsd", "nfsv4", "veth", "wireguard", "xfs"}
	InGuest(t, Options{Modules: modules}, func(t *testing.T) {
		t.Run("VLAN on a link and in a bridge", vlan)
		t.Run("ipvlan", ipvlan)
		t.Run("wireguard", wireguard)
		t.Run("device-mapper thin pool", thinPool)
		t.Run("project quota on xfs", projectQuotaXFS)
		t.Run("project quota on ext4", projectQuotaExt4)
		t.Run("NFS 4.2 between two hosts", nfs)
	})
}

// sh runs one command line of the guest, split at blanks, and returns its output.
func sh(t *testing.T, line string) string {
	t.Helper()
	argv := strings.Fields(line)
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
	assert.NilError(t, err, "%s: %s", line, out)
	return strings.TrimSpace(string(out))
}

func vlan(t *testing.T) {
	sh(t, "ip link add vparent type dummy")
	sh(t, "ip link add link vparent name vparent.7 type vlan id 7")
	sh(t, "ip link add vbridge type bridge vlan_filtering 1")
	sh(t, "ip link set vparent master vbridge")
	sh(t, "bridge vlan add dev vparent vid 9")
	assert.Assert(t, strings.Contains(sh(t, "ip -d link show vparent.7"), "vlan protocol 802.1Q id 7"))
	assert.Assert(t, strings.Contains(sh(t, "bridge vlan show dev vparent"), "9"))
}

func ipvlan(t *testing.T) {
	sh(t, "ip link add iparent type dummy")
	for _, mode := range []string{"l2", "l3", "l3s"} {
		sh(t, "ip link add ip-"+mode+" link iparent type ipvlan mode "+mode)
		assert.Assert(t, strings.Contains(sh(t, "ip -d link show ip-"+mode), "ipvlan  mode "+mode))
		sh(t, "ip link del ip-"+mode)
	}
}

func wireguard(t *testing.T) {
	sh(t, "ip link add wg0 type wireguard")
	assert.Assert(t, strings.Contains(sh(t, "ip -d link show wg0"), "wireguard"))
}

// disk makes a sparse file and returns the loop device that shows it.
func disk(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	assert.NilError(t, os.WriteFile(file, nil, 0o600))
	assert.NilError(t, os.Truncate(file, size))
	device := sh(t, "losetup --find --show "+file)
	t.Cleanup(func() { must(t, "losetup", "--detach", device) })
	return device
}

// must runs a command while the test cleans up, when its context is over.
func must(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%q: %v: %s", argv, err, out)
	}
}

// mountDisk mounts a device until the test ends and returns where.
func mountDisk(t *testing.T, device, options string) string {
	t.Helper()
	dir := t.TempDir()
	sh(t, "mount -o "+options+" "+device+" "+dir)
	// Whoever is not root has to get there too.
	assert.NilError(t, errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)))
	t.Cleanup(func() { must(t, "umount", dir) })
	return dir
}

func thinPool(t *testing.T) {
	meta, data := disk(t, 16<<20), disk(t, 128<<20)
	table := func(name, table string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "dmsetup", "create", name, "--table", table).CombinedOutput()
		assert.NilError(t, err, "%s", out)
		t.Cleanup(func() { must(t, "dmsetup", "remove", "--retry", name) })
	}
	message := func(text string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "dmsetup", "message", "pool", "0", text).CombinedOutput()
		assert.NilError(t, err, "%s", out)
	}
	// Lengths in sectors of 512 bytes; the pool's blocks are 64 KiB.
	table("pool", "0 262144 thin-pool "+meta+" "+data+" 128 0")
	message("create_thin 0")
	// Ten times larger than the pool: that is what thin means.
	table("thin", "0 2621440 thin /dev/mapper/pool 0")
	sh(t, "mkfs.ext4 -q /dev/mapper/thin")
	dir := mountDisk(t, "/dev/mapper/thin", "noatime")
	file := filepath.Join(dir, "file")
	assert.NilError(t, os.WriteFile(file, []byte("before"), 0o600))

	sh(t, "sync")
	sh(t, "dmsetup suspend thin")
	message("create_snap 1 0")
	sh(t, "dmsetup resume thin")
	assert.NilError(t, os.WriteFile(file, []byte("after"), 0o600))
	table("snap", "0 2621440 thin /dev/mapper/pool 1")
	snap := mountDisk(t, "/dev/mapper/snap", "noatime")
	old, err := os.ReadFile(filepath.Join(snap, "file"))
	assert.NilError(t, err)
	assert.Equal(t, string(old), "before")
}

// fill writes 4 MiB below dir and has to be stopped by the quota of 2 MiB. It does
// not write as root: ext4 lets CAP_SYS_RESOURCE past every quota.
func fill(t *testing.T, dir string) {
	t.Helper()
	const nobody = 65534
	assert.NilError(t, os.Chown(dir, nobody, nobody))
	file := filepath.Join(dir, "large")
	dd := exec.CommandContext(t.Context(), "dd", "if=/dev/zero", "of="+file, "bs=64k", "count=64")
	dd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := dd.CombinedOutput()
	assert.ErrorType(t, err, &exec.ExitError{}, "writing 4 MiB into a project of 2 MiB: %s", out)
	stat, err := os.Stat(file)
	assert.NilError(t, err)
	if stat.Size() == 0 || stat.Size() > 2<<20 {
		t.Errorf("%d bytes were written, want some and at most 2 MiB\n%s", stat.Size(), out)
	}
}

func projectQuotaXFS(t *testing.T) {
	device := disk(t, 320<<20)
	sh(t, "mkfs.xfs -q "+device)
	dir := mountDisk(t, device, "prjquota")
	sub := filepath.Join(dir, "project")
	assert.NilError(t, os.Mkdir(sub, 0o755))
	for _, command := range []string{"project -s -p " + sub + " 42", "limit -p bhard=2m 42"} {
		out, err := exec.CommandContext(t.Context(), "xfs_quota", "-x", "-c", command, dir).CombinedOutput()
		assert.NilError(t, err, "%s: %s", command, out)
	}
	fill(t, sub)
}

func projectQuotaExt4(t *testing.T) {
	device := disk(t, 64<<20)
	sh(t, "mkfs.ext4 -q -O quota,project -E quotatype=prjquota "+device)
	dir := mountDisk(t, device, "prjquota")
	sub := filepath.Join(dir, "project")
	assert.NilError(t, os.Mkdir(sub, 0o755))
	sh(t, "chattr -p 42 +P "+sub)
	sh(t, "setquota -P 42 0 2048 0 0 "+dir)
	fill(t, sub)
}

func nfs(t *testing.T) {
	lan := guest.NewLAN(t)
	server := lan.NewNFSServer(t, "server")
	client := lan.NewNode(t, "client")
	client.MountExport(server, "/srv/nfs")
	client.WriteFile("/srv/nfs/file", "over the network")
	assert.Equal(t, server.ReadFile(server.Export+"/file"), "over the network")
	assert.Assert(t, strings.Contains(client.Must("cat", "/proc/mounts"), "vers=4.2"))
}
