// Package notify tells people what a daemon has found, by mail, webhooks and chat
// services. Which, an administrator writes into a file: the addresses hold secrets, and
// a plugin's settings can be read by everybody who may ask Docker.
//
// The file has one address in each line, in the form of shoutrrr
// (https://shoutrrr.nickfedor.com): "generic+https://example.org/hook",
// "smtp://USER:PASSWORD@HOST:587/?from=A&to=B", "ntfy://ntfy.sh/TOPIC". An address gets
// failures and what ends them; with "all " before it, it gets everything. Empty lines
// and lines that begin with # mean nothing. The file is read each time, so that a change
// needs no restart.
package notify

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/nicholas-fedor/shoutrrr"
	"github.com/nicholas-fedor/shoutrrr/pkg/types"
	"github.com/sirupsen/logrus"
)

const (
	// sendTime bounds the sending to one address.
	sendTime = 30 * time.Second
	// waiting is how many events may wait; more are dropped, and the log says so.
	waiting = 100
	// repeatEvery is how often a failure that goes on is told again.
	repeatEvery = 24 * time.Hour
)

// An Event is something that was tried and came to an end.
type Event struct {
	// Key is the same for the same attempt at other times: "backup web".
	Key string
	// Title is one line, Text may have more.
	Title, Text string
	// Failed says that it did not succeed.
	Failed bool
	// Minor says that nobody wants to hear of a success that ends no failure.
	Minor bool
}

// A Notifier sends events to the addresses in a file. Run sends them; Tell may be called
// at any time, by any goroutine.
type Notifier struct {
	path   string
	host   string
	log    *logrus.Entry
	now    func() time.Time
	events chan Event

	mu sync.Mutex
	// failing has, by key, when a failure that goes on was told last.
	failing map[string]time.Time
}

// New makes a Notifier for the file at path, which need not be there. Titles begin with the name of
// the host. now is the clock.
func New(path, host string, log *logrus.Entry, now func() time.Time) *Notifier {
	return &Notifier{path: path, host: host, log: log, now: now, events: make(chan Event, waiting), failing: map[string]time.Time{}}
}

// Tell notes an event; it never blocks. A failure that goes on is told again after a day,
// and a success that ends failures is told to all.
func (n *Notifier) Tell(e Event) {
	important := n.important(e)
	if !important && (e.Failed || e.Minor) {
		return
	}
	if !important {
		e.Key = ""
	}
	select {
	case n.events <- e:
	default:
		n.log.Warnf("notification dropped, %d are waiting: %s", waiting, e.Title)
	}
}

// important tells whether an event is for everybody.
func (n *Notifier) important(e Event) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	last, failing := n.failing[e.Key]
	if !e.Failed {
		delete(n.failing, e.Key)
		return failing
	}
	if failing && n.now().Sub(last) < repeatEvery {
		return false
	}
	n.failing[e.Key] = n.now()
	return true
}

// Run sends until ctx ends.
func (n *Notifier) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-n.events:
			if err := n.send(ctx, e); err != nil {
				n.log.WithError(err).Warnf("notification of: %s", e.Title)
			}
		}
	}
}

// send tells an event to those who want it. Errors name no address, which may hold
// secrets, but its line.
func (n *Notifier) send(ctx context.Context, e Event) error {
	addresses, err := read(n.path)
	e.Title = n.host + ": " + e.Title
	var errs []error
	for _, a := range addresses {
		if e.Key == "" && !a.all {
			continue
		}
		if err := a.send(ctx, e); err != nil {
			errs = append(errs, fmt.Errorf("%s: line %d, %s: %w", n.path, a.line, a.service, a.redacted(err)))
		}
	}
	return errors.Join(append(errs, err)...)
}

// An address is a line of the file.
type address struct {
	line    int
	service string
	url     string
	all     bool
}

// read returns the addresses; a file that is not there has none.
func read(path string) ([]address, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o and holds secrets: want 0600", path, info.Mode().Perm())
	}
	var list []address
	scanner := bufio.NewScanner(file)
	for line := 1; scanner.Scan(); line++ {
		text := strings.TrimSpace(scanner.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		a := address{line: line, url: text}
		if rest, ok := strings.CutPrefix(text, "all "); ok {
			a.url, a.all = strings.TrimSpace(rest), true
		}
		a.service, _, _ = strings.Cut(a.url, ":")
		list = append(list, a)
	}
	return list, scanner.Err()
}

// send gives up after a while, and leaves what hangs to end by itself.
func (a address) send(ctx context.Context, e Event) error {
	sender, err := shoutrrr.CreateSender(a.url)
	if err != nil {
		return err
	}
	if strings.HasPrefix(a.service, "generic") {
		e.Text = e.Title + "\n" + e.Text // a webhook gets no title otherwise
	}
	sent := make(chan error, 1)
	go func() {
		sent <- errors.Join(sender.Send(e.Text, &types.Params{"title": e.Title})...)
	}()
	select {
	case err := <-sent:
		return err
	case <-time.After(sendTime):
		return fmt.Errorf("no answer within %s", sendTime)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// location is what looks like a URL.
var location = regexp.MustCompile(`[^\s"']*://[^\s"']*`)

// redacted drops the address, and URLs made of it, from an error: libraries put them
// there.
func (a address) redacted(err error) error {
	text := location.ReplaceAllString(err.Error(), "…")
	if u, errURL := url.Parse(a.url); errURL == nil {
		for _, secret := range []string{u.User.String(), u.Path, u.RawQuery} {
			if password, ok := u.User.Password(); ok {
				text = strings.ReplaceAll(text, password, "…")
			}
			if len(secret) > 3 {
				text = strings.ReplaceAll(text, secret, "…")
			}
		}
	}
	return errors.New(text)
}
