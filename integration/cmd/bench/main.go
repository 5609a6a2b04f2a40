// Command bench compares Berth with Docker's own drivers in one and the same
// engine, in turns: first Berth, then Docker, then Berth again. It speaks to the
// engine's API, so that the docker command's own start is not part of the times.
//
//	go run ./integration/cmd/bench [-engine 20.10] [-rounds 20]
//
// The result is a Markdown table on standard output.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/berth-plugin/berth/integration/lab"
)

func main() {
	if lab.Reexec() {
		return
	}
	engine := flag.String("engine", "20.10", "engine `VERSION` of the lab")
	rounds := flag.Int("rounds", 20, "`NUMBER` of measurements of each kind and driver")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *engine, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, engine string, rounds int) (err error) {
	if rounds < 1 {
		return fmt.Errorf("-rounds %d: want at least 1", rounds)
	}
	host, err := lab.New(ctx, lab.Options{Name: fmt.Sprintf("bench-%d", os.Getpid()), Engine: engine})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	if err := host.ImportBusybox(ctx); err != nil {
		return err
	}
	for _, plugin := range []string{"berth-net", "berth-vol"} {
		if err := host.InstallPlugin(ctx, lab.Managed, plugin); err != nil {
			return err
		}
	}
	api, err := host.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	version, err := api.ServerVersion(ctx)
	if err != nil {
		return err
	}
	results, err := measure(ctx, bench{api: api, image: lab.BusyboxImage}, rounds)
	if err != nil {
		return err
	}
	fmt.Printf("### Engine %s\n\n%s", version.Version, table(results))
	return nil
}
