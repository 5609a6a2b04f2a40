package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// toolDir has the lab's own tools on every host: ask and peer, which containers
// have too, and rpc.
const toolDir = "/usr/local/bin"

// cliPluginDir is where the Docker CLI looks for commands of others.
const cliPluginDir = "/usr/local/lib/docker/cli-plugins"

// toolSource is the program behind ask and peer. It is compiled on its own, so
// that it runs in containers, which have no C library.
//
//go:embed tool/main.go
var toolSource []byte

// toolVersion tells files in the cache that hold the program from older ones.
func toolVersion() string { return fmt.Sprintf("%x", sha256.Sum256(toolSource))[:12] }

// toolBinary makes the program in the cache unless it is there. That needs Go.
func toolBinary(ctx context.Context) (string, error) {
	file := filepath.Join(CacheDir(), "tool-"+toolVersion())
	err := makeCached(file, func(w io.Writer) error {
		dir, err := os.MkdirTemp("", "berth-lab-tool-*")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.WriteFile(filepath.Join(dir, "main.go"), toolSource, 0o600); err != nil {
			return err
		}
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", "tool", "main.go")
		build.Dir = dir
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("go build: %w: %s", err, lastLines(string(out), 5))
		}
		program, err := os.ReadFile(filepath.Join(dir, "tool"))
		if err != nil {
			return err
		}
		_, err = w.Write(program)
		return err
	})
	if err == nil {
		err = os.Chmod(file, 0o755)
	}
	return file, err
}

// linkTools puts the tools below a host's root, and what the build directory has for
// the Docker CLI and for backups. Cache and build directory are mounted inside at the same paths,
// and /proc/1/exe is the lab's own binary, which acts under the name that it was
// started by.
func linkTools(ctx context.Context, root, build string) error {
	binary, err := toolBinary(ctx)
	if err != nil {
		return err
	}
	links := map[string]string{
		filepath.Join(toolDir, "ask"):   binary,
		filepath.Join(toolDir, "peer"):  binary,
		filepath.Join(toolDir, rpcName): "/proc/1/exe",
	}
	if cli := filepath.Join(build, "bin", "docker-berth"); fileExists(cli) {
		links[filepath.Join(cliPluginDir, "docker-berth")] = cli
	}
	// What a user has who restores without Berth, and a place for repositories.
	for _, name := range []string{"restic", "rest-server"} {
		if program := filepath.Join(build, "bin", name); fileExists(program) {
			links[filepath.Join(toolDir, name)] = program
		}
	}
	for name, target := range links {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, path); err != nil {
			return err
		}
	}
	return nil
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// rpcMain ends with rpc's exit code.
func rpcMain() {
	if err := rpc(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "rpc:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// rpc is `rpc TYPE.METHOD [JSON]`: a call to the plugin of this host that implements
// the type, as dockerd would make it. It prints the answer, and fails when that has
// another status than 200.
func rpc(ctx context.Context, args []string) error {
	if len(args) == 0 || len(args) > 2 {
		return errors.New("want TYPE.METHOD and at most one body")
	}
	body := "{}"
	if len(args) == 2 {
		body = args[1]
	}
	kind, _, _ := strings.Cut(args[0], ".")
	var sockets []string
	for _, pattern := range []string{"*.sock", "*/*.sock"} {
		found, err := filepath.Glob(filepath.Join("/run/docker/plugins", pattern))
		if err != nil {
			return err
		}
		sockets = append(sockets, found...)
	}
	for _, socket := range sockets {
		answer, err := post(ctx, socket, "Plugin.Activate", "")
		var manifest struct{ Implements []string }
		if err != nil || json.Unmarshal(answer, &manifest) != nil || !slices.Contains(manifest.Implements, kind) {
			continue
		}
		answer, err = post(ctx, socket, args[0], body)
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", bytes.TrimSpace(answer))
		return nil
	}
	return fmt.Errorf("no plugin implements %s: asked %s", kind, strings.Join(sockets, ", "))
}

func post(ctx context.Context, socket, method, body string) ([]byte, error) {
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/"+method, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, bytes.TrimSpace(answer))
	}
	return answer, err
}
