// Package doctor looks at the host with the eyes of the network plugin and says
// what keeps Berth's networks from working, with the command that cures it.
//
// It runs where berthd runs, in the host's network namespace, and changes nothing
// there: what the kernel can do is tried out in a namespace of its own.
package doctor

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
)

// An Input is what Run looks at. Links is needed.
type Input struct {
	// Links works in the namespace that is looked at. A check that is stuck in a
	// system call may use it for a while after Run has returned.
	Links *link.Handle
	// Firewall keeps the rules there; nil leaves the checks of rules out.
	Firewall *firewall.Manager
	// StateDir is where the records are; "" leaves the check out.
	StateDir string
	// Bridges are the names of the networks' bridges.
	Bridges []string
	// Parents are the links that networks on a LAN are on.
	Parents []Parent
	// IPv6 says that some network has IPv6.
	IPv6 bool
	// PublishedPorts is how many host ports are held, each by sockets.
	PublishedPorts int
	// Leftovers are the names of links that carry Berth's mark and belong to no
	// record.
	Leftovers []string
}

// timeout bounds each check.
const timeout = 5 * time.Second

// A check is one question. Its findings all have its ID.
type check struct {
	id  string
	run func(context.Context, Input) ([]control.Finding, error)
}

// checks in the order of the findings.
func checks() []check {
	return []check{
		{"capabilities", capabilities},
		{"kernel", kernelFeatures},
		{"ipv6", ipv6},
		{"sctp", sctp},
		{"bridge-netfilter", bridgeNetfilter},
		{"firewall-rules", rules},
		{"iptables", variants},
		{"xtables-lock", xtablesLock},
		{"other-firewalls", obstacles},
		{"forwarding", forwarding},
		{"sysctls", writable},
		{"reverse-path", reversePath},
		{"conntrack", conntrack},
		{"backlog", backlog},
		{"open-files", openFiles},
		{"state-space", stateSpace},
		{"parents", parents},
		{"leftovers", leftovers},
	}
}

// Run answers all questions, each within seconds. A check that cannot be made is a
// finding too and does not hide the others. Every check has at least one finding,
// unless the Input leaves it out.
func Run(ctx context.Context, in Input) []control.Finding {
	all := checks()
	results := make([]chan []control.Finding, len(all))
	for i, c := range all {
		// Buffered: a check that is stuck in a system call ends alone.
		results[i] = make(chan []control.Finding, 1)
		go func() { results[i] <- c.do(ctx, in) }()
	}
	deadline := time.After(timeout + time.Second)
	var out []control.Finding
	for i, c := range all {
		select {
		case found := <-results[i]:
			out = append(out, found...)
		case <-deadline:
			out = append(out, c.failed(fmt.Errorf("no answer within %s", timeout)))
			deadline = time.After(0)
		}
	}
	return out
}

func (c check) do(ctx context.Context, in Input) (found []control.Finding) {
	defer func() {
		if p := recover(); p != nil {
			found = append(found, c.failed(fmt.Errorf("panic: %v", p)))
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	found, err := c.run(ctx, in)
	if err != nil {
		found = append(found, c.failed(err))
	}
	for i := range found {
		found[i].ID = c.id
	}
	return found
}

// failed is the finding of a check that could not be made.
func (c check) failed(err error) control.Finding {
	return control.Finding{
		ID: c.id, Status: control.StatusWarn,
		Summary: "this check could not be made: " + err.Error(),
	}
}

// ok, warn and fail make findings.
func ok(format string, args ...any) control.Finding {
	return control.Finding{Status: control.StatusOK, Summary: fmt.Sprintf(format, args...)}
}

func warn(detail, cure, format string, args ...any) control.Finding {
	return control.Finding{Status: control.StatusWarn, Summary: fmt.Sprintf(format, args...), Detail: detail, Cure: cure}
}

func fail(detail, cure, format string, args ...any) control.Finding {
	f := warn(detail, cure, format, args...)
	f.Status = control.StatusFail
	return f
}

// one is for checks that have one finding.
func one(f control.Finding) ([]control.Finding, error) { return []control.Finding{f}, nil }

// sortedBridges are names for commands.
func sortedBridges(in Input) []string { return slices.Sorted(slices.Values(in.Bridges)) }
