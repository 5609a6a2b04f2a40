package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// An Engine is one version of Docker that Debian packages.
type Engine struct {
	// Version is how the lab calls it: major and minor number.
	Version string
	// Suite is the Debian release whose docker.io is this version.
	Suite string

	script   string // debootstrap script, where the suite may be too new to have one
	packages []string
}

// Engines lists the versions the lab knows, oldest first.
func Engines() []Engine {
	base := []string{"docker.io", "iptables", "nftables", "ca-certificates", "iproute2", "busybox-static", "dnsmasq-base"}
	with := func(more ...string) []string { return append(base[:len(base):len(base)], more...) }
	return []Engine{
		{Version: "20.10", Suite: "bookworm", packages: with("docker-registry", "conntrack", "procps", "firewalld", "libpam-systemd", "systemd-sysv", "ufw", "dbus", "python3-nftables",
			"btrfs-progs", "xfsprogs", "e2fsprogs", "openssh-client", "openssh-server", "rsync")},
		{Version: "26.1", Suite: "trixie", packages: with("docker-cli", "docker-compose")},
		{Version: "28.5", Suite: "forky", script: "sid", packages: with("docker-cli", "docker-compose")},
	}
}

// EngineByVersion finds an engine by the lab's name for it.
func EngineByVersion(version string) (Engine, error) {
	var known []string
	for _, e := range Engines() {
		if e.Version == version {
			return e, nil
		}
		known = append(known, e.Version)
	}
	return Engine{}, fmt.Errorf("engine %q is unknown: have %s", version, strings.Join(known, ", "))
}

// Root is the directory of the engine's Debian root in the cache.
func (e Engine) Root() string { return filepath.Join(CacheDir(), "engine-"+e.Version) }

// Cached returns an error that names the command to run when the root is missing or
// lacks a package.
func (e Engine) Cached() error {
	if missing := e.missing(); len(missing) > 0 {
		return fmt.Errorf("engine %s is not in the cache (%s has no %s): run `go run ./integration/cmd/berth-lab fetch %s`",
			e.Version, e.Root(), missing[0], e.Version)
	}
	return nil
}

// missing lists the packages that the root lacks: all of them, or those by which the
// list has grown since the root was made.
func (e Engine) missing() []string {
	return slices.DeleteFunc(slices.Clone(e.packages), e.hasPackage)
}

// hasPackage looks for what dpkg keeps of an installed package, by its name or, where
// several architectures may be installed, by name:architecture.
func (e Engine) hasPackage(name string) bool {
	for _, pattern := range []string{name + ".list", name + ":*.list"} {
		// The only error is that of a wrong pattern.
		if found, err := filepath.Glob(filepath.Join(e.Root(), "var/lib/dpkg/info", pattern)); err == nil && len(found) > 0 {
			return true
		}
	}
	return false
}

// Fetch makes the engine's root with debootstrap unless it is there, adds packages that
// an older one lacks, and returns what dockerd in it says of its version. Callers at the
// same time wait for one another.
func (e Engine) Fetch(ctx context.Context, log io.Writer) (string, error) {
	unlock, err := lockCache("engine-" + e.Version)
	if err != nil {
		return "", err
	}
	defer unlock()
	switch missing := e.missing(); len(missing) {
	case 0:
	case len(e.packages):
		err = debootstrap(ctx, log, e.Suite, e.script, e.packages, e.Root())
	default:
		err = e.complete(ctx, log, missing)
	}
	if err != nil {
		return "", fmt.Errorf("fetch engine %s: %w", e.Version, err)
	}
	out, err := exec.CommandContext(ctx, "chroot", e.Root(), "dockerd", "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("engine %s: dockerd --version: %w: %s", e.Version, err, out)
	}
	version := strings.TrimSpace(string(out))
	if !strings.Contains(version, " "+e.Version+".") {
		return "", fmt.Errorf("%s holds %q, not engine %s: Debian %s has moved on", e.Root(), version, e.Version, e.Suite)
	}
	return version, nil
}

// debootstrap builds a minimal Debian root beside dst and renames it into place.
func debootstrap(ctx context.Context, log io.Writer, suite, script string, packages []string, dst string) error {
	tool, err := exec.LookPath("debootstrap")
	if err != nil {
		return fmt.Errorf("debootstrap is not installed: run `apt-get install debootstrap`")
	}
	tmp := dst + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	args := []string{"--variant=minbase", "--include=" + strings.Join(packages, ","), suite, tmp, debianMirror()}
	if script != "" {
		if _, err := os.Stat(filepath.Join("/usr/share/debootstrap/scripts", suite)); err != nil {
			args = append(args, script)
		}
	}
	fmt.Fprintf(log, "debootstrap %s\n", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("debootstrap %s: %w (see %s/debootstrap/debootstrap.log)", suite, err, tmp)
	}
	// Downloaded packages are half of the size and never read again.
	debs, err := filepath.Glob(filepath.Join(tmp, "var/cache/apt/archives/*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range debs {
		if err := os.Remove(deb); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dst); err != nil {
		return err
	}
	return os.Rename(tmp, dst)
}

// complete installs packages into a copy of the root and puts it in the root's place.
// The copy is made of hard links, which does no harm since dpkg replaces files and does
// not write into them. The old root stays until the next completion: hosts may be
// running over it.
func (e Engine) complete(ctx context.Context, log io.Writer, packages []string) error {
	tmp := e.Root() + ".old"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	apt := append([]string{"chroot", tmp, "apt-get", "-y", "--no-install-recommends", "install"}, packages...)
	for _, argv := range [][]string{
		{"cp", "-al", e.Root(), tmp},
		// As debootstrap, this does not mind a mirror that stands still.
		{"chroot", tmp, "apt-get", "-o", "Acquire::Check-Valid-Until=false", "update"},
		apt,
		{"chroot", tmp, "apt-get", "clean"},
	} {
		fmt.Fprintln(log, strings.Join(argv, " "))
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, e.Root(), unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange %s and %s: %w", tmp, e.Root(), err)
	}
	return nil
}

// debianMirror is the mirror this machine's apt uses for Debian itself.
func debianMirror() string {
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, file := range append([]string{"/etc/apt/sources.list"}, files...) {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if uri := mirrorIn(string(text)); uri != "" {
			return uri
		}
	}
	return "http://deb.debian.org/debian"
}

var mirrorURI = regexp.MustCompile(`(?m)^(?:deb\s+(?:\[[^\]]*\]\s+)?|URIs:\s*)(https?://\S+/debian)/?(?:\s|$)`)

// mirrorIn finds the first Debian mirror in an apt sources file of either format.
func mirrorIn(sources string) string {
	if m := mirrorURI.FindStringSubmatch(sources); m != nil {
		return m[1]
	}
	return ""
}

// lockCache takes the named lock in the cache, waiting for other processes.
func lockCache(name string) (unlock func(), err error) {
	if err := os.MkdirAll(CacheDir(), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(CacheDir(), "."+name+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}
