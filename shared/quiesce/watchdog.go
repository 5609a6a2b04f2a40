package quiesce

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/docker/docker/client"
	"github.com/moby/sys/reexec"
	"golang.org/x/sys/unix"
)

const (
	// watchdogName is what the watchdog is called: its first argument.
	watchdogName = "berth-watchdog"
	// recordFD is the descriptor that it has of the file.
	recordFD = 3
	// settle is how long a call of the one that was killed may take to have its effect.
	settle = time.Second
	// insist is how long it tries to let containers go, for a Docker that is being
	// restarted; insistPause lies between two tries.
	insist      = 2 * time.Minute
	insistPause = time.Second
)

// What is said to the watchdog, a word a line, and its answers.
const (
	// sayWatch begins the longest time, anew if it has begun; sayEnd ends it. Others are
	// a question. The answer is sayStill or, when the time was over before, sayExpired.
	sayWatch   = "watch"
	sayEnd     = "end"
	sayAsk     = "ask"
	sayStill   = "still"
	sayExpired = "expired"
	// sayBye ends the watchdog, which does not answer; sayReady is its own first word.
	sayBye   = "bye"
	sayReady = "ready"
)

// Init makes this process the watchdog if it was started as one, and is true when it
// has ended as such. A program that uses Begin calls it before anything else.
func Init() bool {
	reexec.Register(watchdogName, watchdog)
	return reexec.Init()
}

func watchdog() {
	if err := guard(os.Args[1:]); err != nil {
		// Nobody reads it but the one that waits for the first word.
		fmt.Println(strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func guard(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("%d arguments", len(args))
	}
	host, path := args[0], args[1]
	most, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	r := &record{file: os.NewFile(recordFD, path), path: path}
	if err := r.load(); err != nil {
		return err
	}
	api, err := client.NewClientWithOpts(client.WithHost(host), client.WithAPIVersionNegotiation())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	if _, err := api.Ping(ctx); err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	signal.Ignore(unix.SIGPIPE)
	late := time.NewTimer(most)
	late.Stop()
	words := make(chan string)
	go func() {
		defer close(words)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			words <- in.Text()
		}
	}()
	fmt.Println(sayReady)
	expired := false
	for {
		select {
		case word, ok := <-words:
			switch {
			case word == sayBye:
				return nil
			case ok && expired:
				fmt.Println(sayExpired)
			case ok:
				switch word {
				case sayWatch:
					late.Reset(most)
				case sayEnd:
					late.Stop()
				}
				fmt.Println(sayStill)
			case expired:
				return r.remove()
			default:
				// The call that was under way when the other one was killed has its effect yet.
				if err := letGo(api, r); err != nil {
					return err
				}
				time.Sleep(settle)
				return letGoAndForget(api, r)
			}
		case <-late.C:
			expired = true
			if err := letGo(api, r); err != nil {
				return err
			}
			_ = r.runDue(context.Background(), api) // nobody reads it
		case <-signals:
			return letGoAndForget(api, r)
		}
	}
}

func letGoAndForget(api *client.Client, r *record) error {
	if err := letGo(api, r); err != nil {
		return err // the file stays for MakeGood
	}
	// Nobody reads the error of a hook; it is not run again.
	_ = r.runDue(context.Background(), api)
	return r.remove()
}

// letGo lets all that the file holds go.
func letGo(api *client.Client, r *record) error {
	ctx, cancel := context.WithTimeout(context.Background(), insist)
	defer cancel()
	for {
		// The one that paused may have noted something since.
		err := r.load()
		if err == nil {
			_, err = r.release(ctx, api)
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(insistPause):
		}
	}
}
