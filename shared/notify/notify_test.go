package notify

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
)

// hook is a webhook that tells what it got.
func hook(t *testing.T) (url string, got chan string) {
	got = make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- r.URL.Path + " " + string(body)
	}))
	t.Cleanup(server.Close)
	return "generic+" + server.URL, got
}

func run(t *testing.T, file string) (n *Notifier, clock *time.Time, log *bytes.Buffer) {
	path := filepath.Join(t.TempDir(), "notifications")
	assert.NilError(t, os.WriteFile(path, []byte(file), 0o600))
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	log = &bytes.Buffer{}
	logger := logrus.New()
	logger.SetOutput(log)
	n = New(path, "alpha", logrus.NewEntry(logger), func() time.Time { return now })
	return n, &now, log
}

// drain sends what waits.
func drain(t *testing.T, n *Notifier) (errs []error) {
	for {
		select {
		case e := <-n.events:
			if err := n.send(t.Context(), e); err != nil {
				errs = append(errs, err)
			}
		default:
			return errs
		}
	}
}

func next(got chan string) string {
	select {
	case text := <-got:
		return text
	default:
		return ""
	}
}

func TestFailuresAreToldOnceADayAndTheirEndToo(t *testing.T) {
	url, got := hook(t)
	n, clock, _ := run(t, "# people on call\n\n"+url+"/failures\nall "+url+"/all\n")
	n.Tell(Event{Key: "backup web", Title: "good", Text: "backup of web"})
	assert.Equal(t, len(drain(t, n)), 0)
	assert.Equal(t, next(got), "/all alpha: good\nbackup of web")
	assert.Equal(t, next(got), "")
	n.Tell(Event{Key: "snapshot web", Text: "every hour", Minor: true})
	assert.Equal(t, len(drain(t, n)), 0)
	assert.Equal(t, next(got), "")

	for range 3 {
		n.Tell(Event{Key: "backup web", Title: "bad", Text: "it failed", Failed: true})
	}
	n.Tell(Event{Key: "backup db", Title: "bad", Text: "db failed", Failed: true})
	assert.Equal(t, len(drain(t, n)), 0)
	assert.Equal(t, next(got), "/failures alpha: bad\nit failed")
	assert.Equal(t, next(got), "/all alpha: bad\nit failed")
	assert.Equal(t, next(got), "/failures alpha: bad\ndb failed")
	assert.Equal(t, next(got), "/all alpha: bad\ndb failed")
	assert.Equal(t, next(got), "")

	*clock = clock.Add(25 * time.Hour)
	n.Tell(Event{Key: "backup web", Title: "bad", Text: "it failed again", Failed: true})
	n.Tell(Event{Key: "backup web", Title: "good", Text: "it is well"})
	n.Tell(Event{Key: "backup web", Title: "good", Text: "still well"})
	assert.Equal(t, len(drain(t, n)), 0)
	for _, want := range []string{"/failures alpha: bad\nit failed again", "/all alpha: bad\nit failed again", "/failures alpha: good\nit is well", "/all alpha: good\nit is well", "/all alpha: good\nstill well", ""} {
		assert.Equal(t, next(got), want)
	}
}

func TestErrorsHoldNoAddress(t *testing.T) {
	n, _, _ := run(t, "generic://token:hunter2@127.0.0.1:1/secretpath?disabletls=yes\n")
	n.Tell(Event{Key: "k", Text: "x", Failed: true})
	errs := drain(t, n)
	assert.Equal(t, len(errs), 1)
	assert.ErrorContains(t, errs[0], "line 1, generic")
	for _, secret := range []string{"hunter2", "secretpath"} {
		assert.Assert(t, !strings.Contains(errs[0].Error(), secret), "%s", errs[0])
	}
}

func TestAFileThatOthersCanReadIsRefused(t *testing.T) {
	url, got := hook(t)
	n, _, _ := run(t, url+"/x\n")
	assert.NilError(t, os.Chmod(n.path, 0o644))
	n.Tell(Event{Key: "k", Text: "x", Failed: true})
	errs := drain(t, n)
	assert.Equal(t, len(errs), 1)
	assert.ErrorContains(t, errs[0], "want 0600")
	assert.Equal(t, next(got), "")
}

func TestWithoutAFileNobodyIsTold(t *testing.T) {
	n, _, log := run(t, "")
	assert.NilError(t, os.Remove(n.path))
	n.Tell(Event{Key: "k", Text: "x", Failed: true})
	assert.Equal(t, len(drain(t, n)), 0)
	for range waiting + 1 {
		n.Tell(Event{Text: "x"})
	}
	assert.Assert(t, strings.Contains(log.String(), "dropped"))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { n.Run(ctx); close(ended) }()
	cancel()
	<-ended
}
