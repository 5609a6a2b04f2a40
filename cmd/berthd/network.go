package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/berth-plugin/berth/netplugin"
	"github.com/berth-plugin/berth/netplugin/bridge"
	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/settings"
)

// resolvers is read for name servers that automatic subnets keep clear of.
const resolvers = "/etc/resolv.conf"

// firewallCheck is how often the rules are compared with what they should be.
const firewallCheck = 2 * time.Second

// startNetwork opens what the network driver works with and recovers. What was
// opened is closed again when a later step fails.
func (d *daemon) startNetwork(ctx context.Context) (s started, err error) {
	if d.settingsErr != nil {
		return started{}, d.settingsErr
	}
	supernets, err := ipam.ParseSupernets(d.settings.Pools)
	if err != nil {
		return started{}, err
	}
	var open closers
	defer func() {
		if err != nil {
			err = errors.Join(err, open.close())
		}
	}()
	claim, err := claimNetworkNamespace()
	if err != nil {
		return started{}, err
	}
	open.add(claim.Close)
	db, err := netplugin.OpenState(filepath.Join(d.stateDir, "net", "state.db"))
	if err != nil {
		return started{}, err
	}
	open.add(db.Close)
	links, err := link.Open(link.Options{SysctlRoot: d.settings.SysctlDir})
	if err != nil {
		return started{}, err
	}
	open.add(func() error { links.Close(); return nil })
	rules, err := firewall.New(firewall.Options{Links: links, Log: d.log, Repaired: func(string) { d.repairs.Inc() }})
	if err != nil {
		return started{}, err
	}
	open.add(rules.Close)
	ports, err := hostport.New(hostport.Options{Log: d.log})
	if err != nil {
		return started{}, err
	}
	open.add(ports.Close)
	bridges := bridge.New(links, rules, ports)
	bridges.SetLog(d.log)
	lans := lan.New(links)
	lans.SetLog(d.log)
	// Both tell the driver of what they hear, once it is there.
	var driver *netplugin.Driver
	prober := probe.New(probe.Options{
		Link:  links,
		Ours:  func(parent string, mac net.HardwareAddr) bool { return driver.OwnMAC(parent, mac) },
		Child: lans.AccessLink,
	})
	open.add(prober.Close)
	leases := dhcp.New(dhcp.Options{Log: d.log, Notify: func(e dhcp.Event) { driver.HearDHCP(e) }})
	open.add(func() error { leases.Close(); return nil })
	driver, err = netplugin.New(netplugin.Config{
		State: db, LeaseLog: filepath.Join(d.stateDir, "net", "leases.log"), Log: d.log, Links: links, Bridge: bridges, LAN: lans,
		Prober: prober, DHCP: leases, KeyByMAC: d.settings.IPAMKey == settings.IPAMKeyMAC, Supernets: supernets, Resolvers: resolvers,
	})
	if err != nil {
		return started{}, err
	}
	open.add(driver.Close)
	if err := driver.Recover(ctx); err != nil {
		return started{}, err
	}
	if err := d.registry.Register(driver.Metrics()); err != nil {
		return started{}, fmt.Errorf("register metrics: %w", err)
	}
	d.patient.Store(&patient{links, rules, driver})
	return started{
		networks:  driver.Network(),
		addresses: driver.IPAM(),
		admin:     driver.Admin(),
		run: func(ctx context.Context) {
			var tasks sync.WaitGroup
			tasks.Go(func() { driver.Run(ctx) })
			tasks.Go(func() { rules.Watch(ctx, firewallCheck) })
			tasks.Go(func() { bridges.Run(ctx) })
			tasks.Wait()
		},
		close: open.close,
	}, nil
}

// closers close what was opened, the newest first.
type closers []func() error

func (c *closers) add(fn func() error) { *c = append(*c, fn) }

func (c *closers) close() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	*c = nil
	return errors.Join(errs...)
}
