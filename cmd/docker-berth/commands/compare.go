package commands

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/docker/api/types/network"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
)

// checkAPI tells whether Docker answers.
func checkAPI(err error) control.Finding {
	if err != nil {
		return control.Finding{
			ID: "docker-api", Status: control.StatusFail, Summary: fmt.Sprintf("Docker does not answer: %v", err),
			Detail: "Names are not known, and Docker's networks cannot be compared with Berth's.",
			Cure:   "systemctl start docker",
		}
	}
	return control.Finding{ID: "docker-api", Status: control.StatusOK, Summary: "Docker answers"}
}

// checkPlugins tells whether there is a daemon, and only one for each service.
func checkPlugins(plugins []engine.Plugin) []control.Finding {
	on := enabled(plugins)
	var findings []control.Finding
	if len(plugins) == 0 {
		return []control.Finding{{
			ID: "plugin", Status: control.StatusFail, Summary: "no Berth plugin is installed and no Berth daemon runs",
			Detail: "A plugin that was built is installed like this; a daemon without Docker's plugins is started by systemd.",
			Cure:   "docker plugin create berth-net build/plugin/berth-net\ndocker plugin enable berth-net",
		}}
	}
	for _, p := range plugins {
		if p.Enabled {
			f := control.Finding{ID: "plugin", Status: control.StatusOK, Summary: fmt.Sprintf("plugin %s is enabled", p)}
			if !p.Managed() {
				f.Summary = fmt.Sprintf("the daemon %s runs", p)
			}
			findings = append(findings, f)
			continue
		}
		f := control.Finding{
			ID: "plugin", Status: control.StatusWarn, Summary: fmt.Sprintf("plugin %s is disabled", p),
			Cure: fmt.Sprintf("docker plugin enable %s", p),
		}
		// One that was left there beside the one in use does no harm.
		if len(on) == 0 {
			f.Status = control.StatusFail
			f.Detail = "Containers on its networks run on, but cannot be started."
		} else {
			f.Detail = "Another Berth plugin is enabled; if this one is not needed any more, remove it."
			f.Cure = fmt.Sprintf("docker plugin rm %s", p)
		}
		findings = append(findings, f)
	}
	for _, service := range []string{control.NetworkService, control.VolumeService} {
		var both []string
		for _, p := range on {
			if slices.Contains(p.Services, service) {
				both = append(both, p.String())
			}
		}
		if len(both) > 1 {
			findings = append(findings, control.Finding{
				ID: "several-plugins", Status: control.StatusWarn,
				Summary: fmt.Sprintf("several plugins have a %s service: %s", service, strings.Join(both, ", ")),
				Detail:  "Only one can serve a host's networks, and only one the volumes of a directory; the others refuse all calls.",
				Cure:    stop(on, both[len(both)-1]),
			})
		}
	}
	return findings
}

// stop is the command that ends a plugin or a daemon of its own.
func stop(plugins []engine.Plugin, name string) string {
	for _, p := range plugins {
		if p.String() == name && !p.Managed() {
			return "systemctl disable --now " + name
		}
	}
	return "docker plugin disable " + name
}

// checkDrivers finds networks whose driver looks like Berth's and is none that is
// enabled: made with another tag or name of the plugin.
func checkDrivers(plugins []engine.Plugin, view engine.View) []control.Finding {
	var findings []control.Finding
	for _, n := range byName(view.Networks) {
		base, _, tagged := strings.Cut(n.Driver, ":")
		base = base[strings.LastIndex(base, "/")+1:]
		if base != "berth" && base != "berth-net" {
			continue
		}
		if slices.ContainsFunc(plugins, func(p engine.Plugin) bool { return p.Name == n.Driver }) {
			continue
		}
		f := control.Finding{
			ID: "driver-name", Status: control.StatusFail,
			Summary: fmt.Sprintf("network %s has the driver %s, which no enabled plugin has", n.Name, n.Driver),
			Detail:  "Docker keeps a network's driver by its whole name. Containers cannot be started on this network.",
			Cure:    "docker plugin ls",
		}
		if i := slices.IndexFunc(plugins, func(p engine.Plugin) bool { return slices.Contains(p.Services, control.NetworkService) }); i >= 0 {
			if !tagged && plugins[i].Managed() {
				f.Detail += fmt.Sprintf(" A managed plugin's name has a tag: it is %s.", plugins[i])
			}
			f.Cure = recreate(n, plugins[i].Name)
		}
		findings = append(findings, f)
	}
	return findings
}

// compare finds what Docker and Berth do not agree on. before and after are what
// Docker knew around the time that Berth was asked: only what was so at both counts.
func compare(p engine.Plugin, networks []control.Network, endpoints []control.Endpoint, before, after engine.View) []control.Finding {
	ours := make(map[string]control.Network, len(networks))
	for _, n := range networks {
		ours[n.ID] = n
	}
	var findings []control.Finding
	for _, n := range byName(after.Networks) {
		if _, ok := before.Networks[n.ID]; !ok || n.Driver != p.Name || n.Scope != "local" {
			continue
		}
		if _, ok := ours[n.ID]; !ok {
			findings = append(findings, control.Finding{
				ID: "network-unknown-to-berth", Status: control.StatusFail,
				Summary: fmt.Sprintf("Docker has the network %s, and Berth does not know it", n.Name),
				Detail:  "Was Berth's state directory changed or emptied? Containers cannot be started on this network. Disconnect its containers and make it again.",
				Cure:    recreate(n, p.Name),
			})
		}
	}
	for _, n := range networks {
		_, was := before.Networks[n.ID]
		_, is := after.Networks[n.ID]
		if !was && !is && n.State == control.NetworkReady {
			findings = append(findings, control.Finding{
				ID: "network-unknown-to-docker", Status: control.StatusWarn,
				Summary: fmt.Sprintf("Berth has the network %s (%s), and Docker does not know it", formatter.TruncateID(n.ID), linkOf(n)),
				Detail:  "Docker does not tell a plugin of what is removed while it is disabled. The network keeps its bridge and its subnets.",
				Cure:    "docker berth network prune --force",
			})
		}
	}
	known := make(map[string]bool, len(endpoints))
	for _, ep := range endpoints {
		known[ep.ID] = true
		_, was := before.Containers[ep.ID]
		_, is := after.Containers[ep.ID]
		_, net := after.Networks[ep.NetworkID]
		if !was && !is && net && ep.State == control.EndpointGone {
			findings = append(findings, control.Finding{
				ID: "endpoint-unknown-to-docker", Status: control.StatusWarn,
				Summary: fmt.Sprintf("endpoint %s on network %s has no running container", formatter.TruncateID(ep.ID), after.Network(ep.NetworkID)),
				Cure:    "docker berth endpoint gc",
			})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(after.Containers)) {
		_, was := before.Containers[id]
		if _, ok := ours[after.On[id]]; ok && was && !known[id] {
			findings = append(findings, control.Finding{
				ID: "endpoint-unknown-to-berth", Status: control.StatusFail,
				Summary: fmt.Sprintf("container %s is on network %s, and Berth does not know it there", after.Container(id), after.Network(after.On[id])),
				Detail:  "Its published ports are not kept and its address may be given to another container.",
				Cure:    "docker restart " + after.Container(id),
			})
		}
	}
	if len(findings) == 0 {
		return []control.Finding{{ID: "agreement", Status: control.StatusOK, Summary: fmt.Sprintf("Docker and Berth agree on %d networks and %d endpoints", len(networks), len(endpoints))}}
	}
	return findings
}

func byName(networks map[string]network.Summary) []network.Summary {
	return slices.SortedFunc(maps.Values(networks), func(x, y network.Summary) int { return compareNames(x.Name, y.Name) })
}

// recreate is the command that makes a network again with another driver.
func recreate(n network.Summary, driver string) string {
	args := []string{"docker", "network", "create", "-d", driver}
	if n.IPAM.Driver != "" && n.IPAM.Driver != "default" {
		ipam := n.IPAM.Driver
		if ipam == n.Driver {
			ipam = driver
		}
		args = append(args, "--ipam-driver", ipam)
	}
	if n.EnableIPv6 {
		args = append(args, "--ipv6")
	}
	if n.Internal {
		args = append(args, "--internal")
	}
	for _, c := range n.IPAM.Config {
		args = append(args, "--subnet", c.Subnet)
		if c.IPRange != "" {
			args = append(args, "--ip-range", c.IPRange)
		}
		if c.Gateway != "" {
			args = append(args, "--gateway", c.Gateway)
		}
		for _, name := range slices.Sorted(maps.Keys(c.AuxAddress)) {
			args = append(args, "--aux-address", name+"="+c.AuxAddress[name])
		}
	}
	for _, set := range []struct {
		flag   string
		values map[string]string
	}{{"--ipam-opt", n.IPAM.Options}, {"-o", n.Options}, {"--label", n.Labels}} {
		for _, name := range slices.Sorted(maps.Keys(set.values)) {
			args = append(args, set.flag, name+"="+set.values[name])
		}
	}
	args = append(args, n.Name)
	for i := range args {
		args[i] = quoted(args[i])
	}
	return "docker network rm " + quoted(n.Name) + "\n" + strings.Join(args, " ")
}

// quoted is a word for a shell.
func quoted(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=+./:,@%"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
