package control

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

func TestLeaseKey(t *testing.T) {
	for key, want := range map[string]string{
		"web": "web", "/web": "web", "Web_1.a-b": "Web_1.a-b", "0200000000": "0200000000",
		"02:00:00:00:00:0A": "02:00:00:00:00:0a", "02-00-00-00-00-0a": "02:00:00:00:00:0a", "0200.0000.000a": "02:00:00:00:00:0a",
		// An EUI-64 is the MAC address of no container.
		"02-00-00-00-00-00-00-0a": "02-00-00-00-00-00-00-0a",
	} {
		got, err := LeaseKey(key)
		assert.NilError(t, err, key)
		assert.Equal(t, got, want)
	}
	for _, key := range []string{
		"", "/", "w", "-web", "web/db", "//web", "wéb", "a b", "web\n", "01:00:5e:00:00:01", "00:00:00:00:00:00", "02:00:00:00:00:00:00:0a",
		"02:00:00:00:00", strings.Repeat("a", maxKey+1),
	} {
		_, err := LeaseKey(key)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", key, err)
	}
}

// A key that was taken once is taken again and stays as it is.
func FuzzLeaseKey(f *testing.F) {
	for _, seed := range []string{"web", "/web", "02-00-00-00-00-0A", "0200.0000.000a", "01:00:5e:00:00:01", "", "a\x00b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, key string) {
		got, err := LeaseKey(key)
		if err != nil {
			assert.Equal(t, fault.Kind(err), "invalid")
			return
		}
		again, err := LeaseKey(got)
		assert.NilError(t, err)
		assert.Equal(t, again, got)
		assert.Equal(t, IsMAC(got), strings.Contains(got, ":"))
	})
}

// The service gets whole requests only, in one form.
func TestLeaseRequestsAreChecked(t *testing.T) {
	server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: NetworkService}}}})
	service := full()
	server.SetNetworks(service)
	post := func(path, body string) (int, errorBody) {
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/Berth/v1/leases/"+path, strings.NewReader(body)))
		var refused errorBody
		assert.NilError(t, json.Unmarshal(w.Body.Bytes(), &refused))
		return w.Code, refused
	}
	for _, c := range []struct{ path, body, want string }{
		{"reserve", `[]`, "want a JSON object"},
		{"reserve", `{}`, "Network is empty"},
		{"reserve", `{"Network":"n1","Key":"web"}`, "want an IP address"},
		{"reserve", `{"Network":"n1","Addr":"fe80::1%eth0","Key":"web"}`, "without a zone"},
		{"reserve", `{"Network":"n1","Addr":"10.1.0","Key":"web"}`, "request body"},
		{"reserve", `{"Network":"n1","Addr":"10.1.0.2"}`, "want a container's name or a MAC address"},
		{"reserve", `{"Network":"n1","Addr":"10.1.0.2","Key":"01:00:5e:00:00:01"}`, "of one container"},
		{"release", `null`, "want a JSON object"},
		{"release", `{"Addr":"10.1.0.2"}`, "Network is empty"},
		{"release", `{"Network":"n1"}`, "want an IP address"},
	} {
		status, refused := post(c.path, c.body)
		assert.Equal(t, status, http.StatusBadRequest, c.body)
		assert.Equal(t, refused.Kind, "invalid")
		assert.ErrorContains(t, errors.New(refused.Err), c.want)
	}
	assert.Equal(t, len(service.reserved)+len(service.released), 0, "a wrong request reached the service")

	status, _ := post("reserve", `{"Network":"n1","Addr":"::ffff:10.1.0.2","Key":"02-00-00-00-00-0A"}`)
	assert.Equal(t, status, http.StatusOK)
	status, _ = post("release", `{"Network":"n1","Addr":"::ffff:10.1.0.2"}`)
	assert.Equal(t, status, http.StatusOK)
	addr := netip.MustParseAddr("10.1.0.2")
	assert.DeepEqual(t, service.reserved, []ReserveRequest{{Network: "n1", Addr: addr, Key: "02:00:00:00:00:0a"}}, cmpAddrs)
	assert.DeepEqual(t, service.released, []ReleaseRequest{{Network: "n1", Addr: addr}}, cmpAddrs)

	service.fail = fault.Conflict("in use")
	for _, path := range []string{"reserve", "release"} {
		status, refused := post(path, `{"Network":"n1","Addr":"10.1.0.2","Key":"web"}`)
		assert.Equal(t, status, http.StatusConflict)
		assert.Equal(t, refused.Err, "in use")
	}
}

// No body makes the server panic, and what reaches the service is in its one form.
func FuzzReserve(f *testing.F) {
	for _, seed := range []string{
		`{"Network":"n1","Addr":"10.1.0.2","Key":"web"}`, `{"Network":"n1","Addr":"::ffff:10.1.0.2","Key":"/web"}`,
		`{"network":"n1","addr":"fd00::2","key":"02-00-00-00-00-0a"}`, `{"Addr":"fe80::1%a"}`, `{}`, `null`, ``, `{"Addr":1}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: NetworkService}}}})
		service := full()
		server.SetNetworks(service)
		for path, took := range map[string]func() int{
			"reserve": func() int { return len(service.reserved) }, "release": func() int { return len(service.released) },
		} {
			w := httptest.NewRecorder()
			server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/Berth/v1/leases/"+path, strings.NewReader(string(body))))
			switch w.Code {
			case http.StatusOK:
				assert.Equal(t, took(), 1)
			case http.StatusBadRequest:
				assert.Equal(t, took(), 0)
			default:
				t.Fatalf("status %d for %q", w.Code, body)
			}
		}
		for _, req := range service.reserved {
			key, err := LeaseKey(req.Key)
			assert.NilError(t, err)
			assert.Equal(t, key, req.Key)
			assert.Assert(t, req.Network != "" && req.Addr.IsValid() && req.Addr == req.Addr.Unmap() && req.Addr.Zone() == "")
		}
	})
}
