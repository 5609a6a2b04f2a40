package hostport

import (
	"fmt"
	"testing"

	"gotest.tools/v3/assert"
)

// Both forms of the filters do the same.
func TestFilters(t *testing.T) {
	for _, shared := range []bool{true, false} {
		t.Run(fmt.Sprintf("shared %t", shared), func(t *testing.T) {
			w := newWorld(t)
			for _, fd := range w.m.programs {
				assert.Assert(t, fd >= 0, "the kernel refuses the program")
			}
			if !shared {
				w.m.programs.close()
			}
			w.publish(endpoint("one"), tcp("", 8080, 8080, 80), udp("", 8080, 8080, 80))
			go echo(w.listen(w.box, "[fd00:1::2]:80"))
			go echoUDP(w.listenUDP(w.box, "[fd00:1::2]:80"))
			assert.Assert(t, w.answers("[::1]:8080"))
			assert.Assert(t, !w.answers("[2001:db8::1]:8080") && !w.answers("[fd00:1::1]:8080") && !w.answers("127.0.0.1:8080"))
			_, err := ask(w.mustDial(w.host, "udp", "[::1]:8080"), "hello")
			assert.NilError(t, err)
			// Nothing of this has come to a socket.
			for _, addr := range []string{"[2001:db8::1]:8080", "127.0.0.1:8080"} {
				_, err := w.mustDial(w.host, "udp", addr).Write([]byte("hello"))
				assert.NilError(t, err)
			}
			assert.Equal(t, w.sessions(), 1)
		})
	}
}
