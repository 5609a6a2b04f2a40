package hostport

import (
	"fmt"
	"runtime"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// heap is the memory in use by Go, in bytes.
func heap() float64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return float64(stats.HeapInuse + stats.StackInuse)
}

// One operation publishes all ports of a container and takes them back. Both
// families double the open files.
func BenchmarkPublish(b *testing.B) {
	both := Target{Endpoint: "one", Addr4: addr4, Addr6: addr6}
	four := Target{Endpoint: "one", Addr4: addr4, NoProxy6to4: true}
	for _, c := range []struct {
		name   string
		target Target
		proto  options.Proto
		ports  int
	}{
		{"tcp/1", both, options.TCP, 1},
		{"tcp/1000", both, options.TCP, 1000},
		{"udp/1000", both, options.UDP, 1000},
		{"tcp4/20000", four, options.TCP, 20000},
		{"tcp/20000", both, options.TCP, 20000},
	} {
		b.Run(c.name, func(b *testing.B) {
			ns := testkit.NewNetns(b)
			var want []options.PortRequest
			for i := range c.ports {
				port := uint16(20000 + i)
				want = append(want, options.PortRequest{Proto: c.proto, HostPort: port, HostPortEnd: port, ContainerPort: port})
			}
			files, memory := openFiles(b), heap()
			for b.Loop() {
				m, err := New(Options{NetNS: ns.File()})
				assert.NilError(b, err)
				ports, err := m.Reserve(b.Context(), c.target, want)
				assert.NilError(b, err)
				assert.NilError(b, m.Serve(b.Context(), c.target, ports))
				b.StopTimer()
				b.ReportMetric(float64(openFiles(b)-files), "files")
				b.ReportMetric(heap()-memory, "heap-bytes")
				b.StartTimer()
				assert.NilError(b, m.Close())
			}
		})
	}
}

// A batch of requests that all choose from one range, as of replicas.
func BenchmarkChoose(b *testing.B) {
	for _, n := range []int{100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ns := testkit.NewNetns(b)
			var want []options.PortRequest
			for i := range n {
				want = append(want, tcp("", 20000, 40000, uint16(1+i)))
			}
			for b.Loop() {
				m, err := New(Options{NetNS: ns.File()})
				assert.NilError(b, err)
				_, err = m.Reserve(b.Context(), endpoint("one"), want)
				assert.NilError(b, err)
				assert.NilError(b, m.Close())
			}
		})
	}
}
