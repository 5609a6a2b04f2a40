package vmlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	suite = "bookworm"
	// imageFormat changes when an image made from the same packages differs.
	imageFormat = "1"
	// diskSize leaves the guest about 5 GiB; the file is sparse.
	diskSize = "6G"
	// cacheEnv names the directory that keeps images between runs.
	cacheEnv     = "BERTH_LAB_CACHE"
	defaultCache = "/var/cache/berth-lab"
)

// packages is what the guest has besides a minimal Debian.
func packages() []string {
	return []string{
		"acl", "attr", "btrfs-progs", "busybox-static", "ca-certificates", "dmsetup", "docker.io", "e2fsprogs", "iproute2",
		"iptables", "kmod", "linux-image-cloud-amd64", "nfs-common", "nfs-kernel-server", "nftables",
		"procps", "quota", "rsync", "thin-provisioning-tools", "util-linux", "xfsprogs",
	}
}

// bootModules are what the initial RAM disk loads to see the guest's drives; all
// else that booting needs is built into Debian's kernel.
func bootModules() []string { return []string{"virtio_pci", "virtio_blk"} }

// Assets are the parts of a bootable guest, all in one directory of the cache.
type Assets struct {
	// Root is a raw ext4 image. It must not be written to.
	Root string
	// Kernel is a bzImage.
	Kernel string
	// Modules are kernel modules in the order in which to load them.
	Modules []string
}

// Image returns the guest's parts, which are made when the cache lacks them: about
// two minutes and a download of 200 MB. Callers of several processes may ask at
// the same time; one of them works.
func Image(ctx context.Context) (Assets, error) {
	cache := os.Getenv(cacheEnv)
	if cache == "" {
		cache = defaultCache
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Assets{}, err
	}
	sum := sha256.Sum256([]byte(imageFormat + suite + diskSize + strings.Join(packages(), ",")))
	dir := filepath.Join(cache, "vm-"+suite+"-"+hex.EncodeToString(sum[:6]))
	unlock, err := lockFile(filepath.Join(cache, "vm.lock"))
	if err != nil {
		return Assets{}, err
	}
	defer unlock()
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := makeImage(ctx, cache, dir); err != nil {
			return Assets{}, err
		}
	}
	return assets(dir)
}

func assets(dir string) (Assets, error) {
	modules, err := filepath.Glob(filepath.Join(dir, "modules", "*.ko"))
	if err != nil {
		return Assets{}, err
	}
	a := Assets{Root: filepath.Join(dir, "root.img"), Kernel: filepath.Join(dir, "vmlinuz"), Modules: modules}
	for _, path := range append([]string{a.Root, a.Kernel}, modules...) {
		if _, err := os.Stat(path); err != nil {
			return Assets{}, fmt.Errorf("VM image in %s is incomplete, remove it: %w", dir, err)
		}
	}
	return a, nil
}

// lockFile waits for an exclusive lock. The file stays, since removing a lock
// file lets two holders lock different files of one name.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// makeImage builds beside the final place and renames at the end, so that what
// has the final name is whole.
func makeImage(ctx context.Context, cache, dir string) (err error) {
	work, err := os.MkdirTemp(cache, ".vm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	root := filepath.Join(work, "root")
	out := filepath.Join(work, "out")
	if err := os.MkdirAll(filepath.Join(out, "modules"), 0o755); err != nil {
		return err
	}
	if err := debootstrap(ctx, root); err != nil {
		return err
	}
	if err := trimRoot(root); err != nil {
		return err
	}
	kernel, err := onlyMatch(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return err
	}
	if err := copyFile(filepath.Join(out, "vmlinuz"), kernel); err != nil {
		return err
	}
	version := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	modules, err := moduleOrder(filepath.Join(root, "lib/modules", version), bootModules())
	if err != nil {
		return err
	}
	for i, module := range modules {
		name := fmt.Sprintf("%02d-%s", i, filepath.Base(module))
		if err := copyFile(filepath.Join(out, "modules", name), module); err != nil {
			return err
		}
	}
	if err := makeFilesystem(ctx, filepath.Join(out, "root.img"), root, diskSize); err != nil {
		return err
	}
	return os.Rename(out, dir)
}

// debootstrap runs in PID and mount namespaces of its own: what it mounts and
// starts cannot outlive it, even when it is killed half-way.
func debootstrap(ctx context.Context, root string) error {
	cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+strings.Join(packages(), ","), suite, root)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWPID,
		Unshareflags: unix.CLONE_NEWNS,
		Pdeathsig:    unix.SIGKILL,
	}
	return runQuiet(cmd)
}

// trimRoot removes what only costs time when the image is made.
func trimRoot(root string) error {
	for _, dir := range []string{"var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	initrds, err := filepath.Glob(filepath.Join(root, "boot", "initrd*"))
	if err != nil {
		return err
	}
	for _, initrd := range initrds {
		if err := os.Remove(initrd); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(root, Dir), 0o755)
}

// makeFilesystem packs a tree into an ext4 image; size is in mke2fs's form.
func makeFilesystem(ctx context.Context, img, tree, size string) error {
	return runQuiet(exec.CommandContext(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
		"-m", "0", "-d", tree, img, size))
}

// runQuiet runs a command and shows its output only when it fails.
func runQuiet(cmd *exec.Cmd) error {
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, lastLines(out, 15))
	}
	return nil
}

func lastLines(out []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte("\n"))
}

func onlyMatch(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s matches %d files, want 1", pattern, len(found))
	}
	return found[0], nil
}

func copyFile(dst, src string) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	return os.WriteFile(dst, data, 0o644)
}
