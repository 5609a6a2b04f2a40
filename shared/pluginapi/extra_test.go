package pluginapi

import (
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// What is served beside Docker's calls shares their socket and their end.
func TestExtraHandlerIsServedAndWaitedFor(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	p := start(t, Config{Extra: map[string]http.Handler{"/Other/": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/Other/slow" {
			close(entered)
			<-release
		}
		answer := r.Method + " " + r.URL.Path
		w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
		_, _ = io.WriteString(w, answer)
	})}})
	status, answer := p.post("Other/quick", "")
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, "POST /Other/quick")
	status, _ = p.post("NetworkDriver.Join", "{}")
	assert.Equal(t, status, 404)

	answered := make(chan string, 1)
	go func() {
		_, answer, err := p.try("Other/slow", "")
		if err != nil {
			answer = err.Error()
		}
		answered <- answer
	}()
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- p.server.Shutdown(t.Context()) }()
	select {
	case err := <-stopped:
		t.Fatalf("Shutdown did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	assert.Equal(t, <-answered, "POST /Other/slow")
	assert.NilError(t, <-stopped)
}
