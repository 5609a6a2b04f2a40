package commands

import (
	"context"
	"errors"
	"fmt"

	"github.com/docker/cli/cli"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/settings"
)

func (a *app) leaseReserveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "reserve NETWORK ADDRESS KEY", Short: "Keep an address for a container", Args: cli.ExactArgs(3),
		Long: "Keep an address for a container, which gets it at its next start, and print the\n" +
			"address. Nobody else gets it, unless asked for with --ip, until it is released.\n\n" +
			"KEY is the name of a container, or its MAC address where the daemon has\n" +
			settings.EnvIPAMKey + "=mac. Docker tells names from Engine 29 on; with older engines a name\n" +
			"has no effect but to keep the address from others. A MAC address is that of\n" +
			"`docker run --mac-address`.",
		ValidArgsFunction: a.completeReserve,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.reserveLease(cmd.Context(), args[0], args[1], args[2])
		},
	}
}

func (a *app) reserveLease(ctx context.Context, network, address, key string) error {
	addr, err := parseAddress(address)
	if err != nil {
		return err
	}
	if key, err = control.LeaseKey(key); err != nil {
		return err
	}
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	n, err := a.oneNetwork(ctx, client, network)
	if err != nil {
		return err
	}
	lease, err := client.ReserveLease(ctx, control.ReserveRequest{Network: n.ID, Addr: addr, Key: key})
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Docker.Out(), lease.Addr)
	if why := a.noEffect(ctx, client, key); why != "" {
		fmt.Fprintf(a.Docker.Err(), "WARNING: %s is kept from others, but no container gets it yet: %s\n", lease.Addr, why)
	}
	return nil
}

// oneNetwork returns the network that a user names.
func (a *app) oneNetwork(ctx context.Context, client *control.Client, ref string) (control.Network, error) {
	networks, err := client.Networks(ctx)
	if err != nil {
		return control.Network{}, err
	}
	return pickNetwork(networks, a.look(ctx), ref)
}

// noEffect says why a reservation for a key gives its address to nobody; "" when it
// does, or when that cannot be told.
func (a *app) noEffect(ctx context.Context, client *control.Client, key string) string {
	info, err := client.Info(ctx)
	if err != nil {
		return ""
	}
	mode := settings.IPAMKeyName
	for _, s := range info.Settings {
		if s.Name == settings.EnvIPAMKey {
			mode = s.Value
		}
	}
	switch isMAC := control.IsMAC(key); {
	case mode == settings.IPAMKeyMAC && !isMAC:
		return fmt.Sprintf("the daemon has %s=mac; reserve it for the MAC address that %s is given with --mac-address", settings.EnvIPAMKey, key)
	case mode == settings.IPAMKeyMAC:
		return ""
	case isMAC:
		return fmt.Sprintf("the daemon has %s=%s; set it to mac, or reserve the address for a name", settings.EnvIPAMKey, mode)
	}
	if engine.CheckLocal(a.Docker.Host(), a.Docker.Context()) != nil {
		return ""
	}
	tells, version, err := engine.TellsNames(ctx, a.Docker.API())
	if err != nil || tells {
		return ""
	}
	return fmt.Sprintf("Docker %s does not tell Berth names, Engine 29 does; set %s=mac and reserve it for a MAC address", version, settings.EnvIPAMKey)
}

func (a *app) leaseReleaseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "release NETWORK ADDRESS [ADDRESS...]", Short: "Make addresses free for all", Args: cli.RequiresMinArgs(2),
		Long: "Make addresses free for all and print them: forget that they are reserved, kept for\n" +
			"the container that had them, in quarantine, in use by somebody else on the LAN, or\n" +
			"requested by Docker for a container that did not come.\n\n" +
			"An address that a container has, and those of the network itself, stay as they are.",
		ValidArgsFunction: a.completeLeases(releasable),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.releaseLeases(cmd.Context(), args[0], args[1:])
		},
	}
}

func (a *app) releaseLeases(ctx context.Context, network string, addresses []string) error {
	client, err := a.connect(ctx, control.NetworkService)
	if err != nil {
		return err
	}
	defer client.Close()
	n, err := a.oneNetwork(ctx, client, network)
	if err != nil {
		return err
	}
	var errs []error
	for _, address := range addresses {
		addr, err := parseAddress(address)
		if err == nil {
			_, err = client.ReleaseLease(ctx, control.ReleaseRequest{Network: n.ID, Addr: addr})
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.Docker.Out(), addr)
	}
	return errors.Join(errs...)
}

// releasable reports whether a lease may be released by hand.
func releasable(l control.Lease) bool {
	switch l.State {
	case control.LeaseGateway, control.LeaseAux, control.LeaseActive:
		return false
	default:
		return true
	}
}
