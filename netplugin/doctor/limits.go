package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
)

// number reads a sysctl that is a number; ok is false when the kernel has none.
func number(links *link.Handle, path string) (n int, has bool, err error) {
	value, err := links.Sysctl(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	n, err = strconv.Atoi(value)
	return n, err == nil, err
}

// conntrack asks how full the table of connections is. When it is full, new
// connections are dropped.
func conntrack(_ context.Context, in Input) ([]control.Finding, error) {
	most, has, err := number(in.Links, "netfilter/nf_conntrack_max")
	if err != nil {
		return nil, err
	}
	count, hasCount, err := number(in.Links, "netfilter/nf_conntrack_count")
	if err != nil {
		return nil, err
	}
	if !has || !hasCount || most == 0 {
		return one(ok("connection tracking has no limit here"))
	}
	percent := count * 100 / most
	cure := sysctlCommand("netfilter/nf_conntrack_max", strconv.Itoa(2*most))
	const detail = "When it is full, new connections are dropped; the kernel's log then says so."
	switch {
	case percent >= 95:
		return one(fail(detail, cure, "the table of connections is full: %d of %d", count, most))
	case percent >= 75:
		return one(warn(detail, cure, "the table of connections is %d %% full: %d of %d", percent, count, most))
	}
	return one(ok("the table of connections holds %d of %d", count, most))
}

const (
	// manyPorts on a bridge make a broadcast a burst of as many packets.
	manyPorts = 500
	// maxPorts is the kernel's limit of ports on one bridge.
	maxPorts = 1023
)

// backlog looks at bridges with very many ports.
func backlog(_ context.Context, in Input) ([]control.Finding, error) {
	length, has, err := number(in.Links, "core/netdev_max_backlog")
	if err != nil {
		return nil, err
	}
	return backlogOf(in, length, has)
}

// backlogOf is backlog given the length of the queue, if it is known: only the
// machine's own namespace tells.
func backlogOf(in Input, length int, has bool) ([]control.Finding, error) {
	bridges, err := in.Links.Bridges()
	if err != nil {
		return nil, err
	}
	ours := map[string]bool{}
	for _, name := range in.Bridges {
		ours[name] = true
	}
	links, err := in.Links.List()
	if err != nil {
		return nil, err
	}
	ports := map[int]int{}
	for _, l := range links {
		ports[l.Master]++
	}
	var out []control.Finding
	for _, b := range bridges {
		n := ports[b.Index]
		if !ours[b.Name] || n <= manyPorts {
			continue
		}
		if n >= maxPorts {
			out = append(out, warn("No further container can be connected to this network. Use another network beside it.", "",
				"bridge %q has %d ports, the kernel's limit", b.Name, n))
		}
		if has && length < 4*n {
			out = append(out, warn("Each broadcast, such as an ARP request, is a burst of one packet for each port; what does not fit is dropped.",
				sysctlCommand("core/netdev_max_backlog", strconv.Itoa(8*n)), "bridge %q has %d ports, and sysctl net/core/netdev_max_backlog is %d", b.Name, n, length))
		}
	}
	if len(out) == 0 {
		out = append(out, ok("no bridge has more ports than packets can be queued"))
	}
	return out, nil
}

// openFiles asks whether there are files enough for the sockets that hold
// published ports.
func openFiles(_ context.Context, in Input) ([]control.Finding, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	return one(filesFinding(len(open), limit.Cur, in.PublishedPorts))
}

func filesFinding(open int, limit uint64, ports int) control.Finding {
	if uint64(open)*10 < limit*8 {
		return ok("%d of %d files are open, with %d published ports", open, limit, ports)
	}
	return warn("Each published port is held by a socket or two. When there are no files left, containers with further ports do not start.",
		fmt.Sprintf("prlimit --pid %d --nofile=%d", os.Getpid(), limit*4), "%d of %d files are open, with %d published ports", open, limit, ports)
}

// stateSpace asks whether records can be written.
func stateSpace(_ context.Context, in Input) ([]control.Finding, error) {
	if in.StateDir == "" {
		return nil, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(in.StateDir, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", in.StateDir, err)
	}
	return one(spaceFinding(in.StateDir, st.Bavail*uint64(st.Bsize)>>20, st.Files, st.Ffree))
}

// spaceFinding takes the free space in MiB; files is 0 where the file system has
// no fixed number of them.
func spaceFinding(dir string, free, files, filesFree uint64) control.Finding {
	const detail = "Without space Berth cannot record networks and endpoints, so that no container can be connected."
	cure := "df -h " + dir + "; df -i " + dir
	switch {
	case free < 4:
		return fail(detail, cure, "%s has %d MiB left for records", dir, free)
	case free < 64:
		return warn(detail, cure, "%s has %d MiB left for records", dir, free)
	case files > 0 && filesFree < 16:
		return fail(detail, cure, "%s has room for %d files", dir, filesFree)
	}
	return ok("%s has %d MiB left", dir, free)
}

// leftovers names links that nobody knows.
func leftovers(_ context.Context, in Input) ([]control.Finding, error) {
	if len(in.Leftovers) == 0 {
		return one(ok("no link of Berth is left over"))
	}
	var cure []string
	for _, name := range in.Leftovers {
		cure = append(cure, "ip link delete "+name)
	}
	return one(warn("They are of networks that are gone, or of another state directory: look for containers that use them before removing them.",
		strings.Join(cure, "\n"), "links of Berth belong to no network: %s", strings.Join(in.Leftovers, ", ")))
}

// The bits of capabilities in /proc/PID/status.
var needed = []struct {
	bit          int
	name, detail string
	fatal        bool
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "Berth can make neither links nor rules.", true},
	{unix.CAP_NET_RAW, "CAP_NET_RAW", "Berth cannot announce containers to their neighbours by ARP.", false},
}

// capabilities asks what this process may do.
func capabilities(context.Context, Input) ([]control.Finding, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	return capabilityFindings(status)
}

func capabilityFindings(status []byte) ([]control.Finding, error) {
	_, rest, found := bytes.Cut(status, []byte("CapEff:"))
	if !found {
		return nil, errors.New("/proc/self/status has no line CapEff")
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	have, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 16, 64)
	if err != nil {
		return nil, err
	}
	var out []control.Finding
	const cure = "docker plugin inspect -f '{{.Config.Linux.Capabilities}}' berth-net"
	for _, c := range needed {
		switch {
		case have&(1<<c.bit) != 0:
		case c.fatal:
			out = append(out, fail(c.detail, cure, "this process lacks %s", c.name))
		default:
			out = append(out, warn(c.detail, cure, "this process lacks %s", c.name))
		}
	}
	if len(out) == 0 {
		out = append(out, ok("this process has the capabilities it needs"))
	}
	return out, nil
}
