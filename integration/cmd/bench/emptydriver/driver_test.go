package emptydriver

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

// ask makes one call and returns the answer.
func ask(t *testing.T, d *Driver, method, body string) map[string]any {
	t.Helper()
	w := httptest.NewRecorder()
	d.ServeHTTP(w, httptest.NewRequest(http.MethodPost, method, strings.NewReader(body)))
	assert.Equal(t, w.Code, http.StatusOK)
	var answer map[string]any
	assert.NilError(t, json.Unmarshal(w.Body.Bytes(), &answer))
	return answer
}

func TestAnEndpointIsAPairThatGoesWithIt(t *testing.T) {
	host := testkit.NewNetns(t)
	d := New()
	host.Do(func() {
		ask(t, d, "/NetworkDriver.CreateNetwork", `{"NetworkID":"n1","IPv4Data":[{"Gateway":"192.0.2.1/24"}]}`)
		answer := ask(t, d, "/NetworkDriver.CreateEndpoint", `{"NetworkID":"n1","EndpointID":"0123456789abcdef"}`)
		assert.DeepEqual(t, answer, map[string]any{"Interface": map[string]any{}})
		answer = ask(t, d, "/NetworkDriver.Join", `{"NetworkID":"n1","EndpointID":"0123456789abcdef"}`)
		assert.DeepEqual(t, answer, map[string]any{
			"InterfaceName": map[string]any{"SrcName": "vi0123456789a", "DstPrefix": "eth"},
			"Gateway":       "192.0.2.1",
		})
	})
	out := host.Run("ip", "-o", "link")
	assert.Assert(t, strings.Contains(out, " vo0123456789a@vi0123456789a:"), out)
	assert.Assert(t, strings.Contains(out, " vi0123456789a@vo0123456789a:"), out)
	host.Do(func() {
		for range 2 {
			answer := ask(t, d, "/NetworkDriver.DeleteEndpoint", `{"NetworkID":"n1","EndpointID":"0123456789abcdef"}`)
			assert.Equal(t, len(answer), 0, "%v", answer)
		}
	})
	out = host.Run("ip", "-o", "link")
	assert.Assert(t, !strings.Contains(out, "0123456789a"), out)
}

func TestAddressesAreCountedUpwards(t *testing.T) {
	d := New()
	want := func(body, address string) {
		t.Helper()
		answer := ask(t, d, "/IpamDriver.RequestAddress", body)
		assert.Equal(t, answer["Address"], address)
	}
	want(`{"Address":"10.213.0.1"}`, "10.213.0.1/16")
	want(`{}`, "10.213.0.2/16")
	want(`{}`, "10.213.0.3/16")
	d.last = pool.Addr().Prev()
	for range 65533 {
		d.last = d.last.Next()
	}
	want(`{}`, "10.213.255.253/16")
	want(`{}`, "10.213.255.254/16")
	want(`{}`, "10.213.0.2/16")
}

func TestEverythingElseSucceeds(t *testing.T) {
	d := New()
	for _, method := range []string{
		"/NetworkDriver.Leave", "/NetworkDriver.DeleteNetwork", "/NetworkDriver.ProgramExternalConnectivity",
		"/NetworkDriver.RevokeExternalConnectivity", "/IpamDriver.ReleaseAddress", "/IpamDriver.ReleasePool", "/IpamDriver.GetCapabilities",
	} {
		assert.Equal(t, len(ask(t, d, method, "")), 0, method)
	}
}

func TestErrorsGoBackAsText(t *testing.T) {
	answer := ask(t, New(), "/NetworkDriver.CreateNetwork", `{"NetworkID":"n1","IPv4Data":[{"Gateway":"nonsense"}]}`)
	text, _ := answer["Err"].(string)
	assert.Assert(t, strings.HasPrefix(text, "gateway: "), text)
}
