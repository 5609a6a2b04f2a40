// Command record-calls writes down what dockerd sends to plugins. On a lab host of
// each engine it puts a recorder between dockerd and berthd, uses a network and a
// volume in every way that makes a call of its own, and keeps one body of each
// shape, as the golden files of shared/pluginapi.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/integration/lab"
)

const (
	goldenDir = "shared/pluginapi/testdata/calls"
	socketDir = "/run/docker/plugins/"
)

func main() {
	if lab.Reexec() {
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "record-calls:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := os.MkdirAll(goldenDir, 0o755); err != nil {
		return err
	}
	for _, engine := range []string{"20.10", "26.1", "28.5"} {
		lines, err := record(ctx, engine)
		if err != nil {
			return fmt.Errorf("engine %s: %w", engine, err)
		}
		file := filepath.Join(goldenDir, engine+".txt")
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
			return err
		}
		fmt.Printf("%s: %d calls\n", file, len(lines))
	}
	return nil
}

// session is what is done with the recorded driver, "rec". A leading "!" says that
// the command is expected to fail.
func session() []string {
	return []string{
		"network create -d rec --ipam-driver rec --ipv6 --subnet 203.0.113.0/24 --gateway 203.0.113.1 --ip-range 203.0.113.128/25 --aux-address printer=203.0.113.9 --subnet 2001:db8:88::/64 -o mtu=1400 -o com.docker.network.bridge.name=rec0 --label a=b given",
		"!network create -d rec --ipam-driver rec --ipam-opt first=1 wrong",
		"network create -d rec --ipam-driver rec taken",
		"network create -d rec --ipam-driver rec --internal inside",
		"network create -d rec native",
		"network create -d rec --ipam-driver null bare",
		"volume create -d rec --label a=b data",
		"run -d --name one --network given --ip 203.0.113.20 --ip6 2001:db8:88::20 --mac-address 02:42:cb:00:71:14 --dns 203.0.113.1 --expose 99 -v data:/x busybox sleep 3600",
		"run -d --name two --network taken -v data:/www --volume-driver rec -v fresh:/data-seed busybox sleep 3600",
		"!run -d --name ports --network taken -p 127.0.0.1:8080:80 -p 8000-8002:81/udp -p 90 busybox sleep 3600",
		"network connect --alias other taken one",
		"network connect inside two",
		"network connect --driver-opt com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1 native two",
		"network connect bare two",
		"network disconnect taken one",
		"network inspect given",
		"restart -t 0 one",
		"cp two:/www /tmp/copied",
		"volume ls",
		"volume inspect data",
		"!volume create -d rec -o nonsense=1 wrong",
		"rm -f one two ports",
		"volume rm data fresh",
		"network rm given taken inside native bare",
	}
}

func record(ctx context.Context, engine string) (lines []string, err error) {
	h, err := lab.New(ctx, lab.Options{Name: "record-" + strings.ReplaceAll(engine, ".", ""), Engine: engine})
	if err != nil {
		return nil, err
	}
	defer func() {
		if closeErr := h.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := h.ImportBusybox(ctx); err != nil {
		return nil, err
	}
	if err := h.InstallPlugin(ctx, lab.Unmanaged, "berth"); err != nil {
		return nil, err
	}
	file, err := h.Record(ctx, socketDir+"rec.sock", socketDir+"berth.sock")
	if err != nil {
		return nil, err
	}
	for _, command := range session() {
		args, fails := strings.CutPrefix(command, "!")
		res, err := h.Docker(ctx, strings.Fields(args)...)
		if (err != nil) != fails {
			return nil, fmt.Errorf("want failure %t: %w: %s", fails, err, res.Stderr)
		}
	}
	return golden(file)
}

// golden keeps the first body of each shape, sorted by method, in the order of the
// calls.
func golden(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	seen := map[string]bool{}
	scan := bufio.NewScanner(f)
	scan.Buffer(nil, 16<<20)
	for scan.Scan() {
		var call lab.RecordedCall
		if err := json.Unmarshal(scan.Bytes(), &call); err != nil {
			return nil, err
		}
		body := strings.TrimSpace(call.Body)
		key := call.Method + " " + shape(body)
		if seen[key] {
			continue
		}
		seen[key] = true
		lines = append(lines, strings.TrimPrefix(call.Method, "/")+" "+body)
	}
	slices.SortStableFunc(lines, func(a, b string) int {
		methodA, _, _ := strings.Cut(a, " ")
		methodB, _, _ := strings.Cut(b, " ")
		return strings.Compare(methodA, methodB)
	})
	return lines, scan.Err()
}

// shape is a body with its scalars reduced to whether they are empty.
func shape(body string) string {
	var v any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		return body
	}
	text, err := json.Marshal(reduce(v))
	if err != nil {
		return body
	}
	return string(text)
}

func reduce(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for name, value := range v {
			out[name] = reduce(value)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = reduce(v[i])
		}
		return out
	case string:
		return v != ""
	default:
		return v
	}
}
