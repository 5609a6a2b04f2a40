package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"
)

// Image is the name of the image that StartEngine imports: busybox and links for
// its programs.
const Image = "busybox:latest"

// engineLimit is how long each part of an engine may take to its first answer.
// Under software emulation it takes about 5 s on a machine that does nothing else.
const engineLimit = 2 * time.Minute

// StartEngine runs a Docker Engine of the node's own, gives it Image, and returns
// when it answers. It has no networks but the host's, which would take as long as
// the rest of its start.
func (n *Node) StartEngine() {
	n.t.Helper()
	n.RestartEngine()
	n.importImage()
}

// RestartEngine runs the engine that StartEngine has run before, with the images
// and containers that it has, and returns when it answers.
func (n *Node) RestartEngine() {
	n.t.Helper()
	// dockerd gives a containerd that it starts itself 15 s, too little here.
	const containerd = "/run/containerd/containerd.sock"
	n.Start("containerd", "containerd", "--log-level=error").waitUp(n.t, engineLimit, n.listens(containerd))
	n.Start("dockerd", "dockerd", "--log-level=warn", "--containerd="+containerd,
		"--bridge=none", "--iptables=false", "--ip6tables=false").waitUp(n.t, engineLimit, n.engineAnswers)
}

func (n *Node) importImage() {
	n.t.Helper()
	archive, err := busyboxArchive()
	if err != nil {
		n.t.Fatal(err)
	}
	c := n.engine()
	defer c.Close()
	source := image.ImportSource{Source: archive, SourceName: "-"}
	answer, err := c.ImageImport(n.t.Context(), source, Image, image.ImportOptions{})
	if err == nil {
		_, err = io.Copy(io.Discard, answer)
		err = errors.Join(err, answer.Close())
	}
	if err != nil {
		n.t.Fatalf("%s: import %s: %v", n.Name, Image, err)
	}
}

// EngineLog is what the engine has said until now, over all its starts.
func (n *Node) EngineLog() string {
	n.t.Helper()
	text, err := os.ReadFile(n.logFile("dockerd"))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(text)
}

// Docker runs a docker command on the node that has to succeed; args are one
// line, split at blanks.
func (n *Node) Docker(line string) string {
	n.t.Helper()
	return n.Must(append([]string{"docker"}, strings.Fields(line)...)...)
}

// DockerFails runs a docker command on the node that has to fail within limit
// with a message that holds the words.
func (n *Node) DockerFails(line string, limit time.Duration, words ...string) string {
	n.t.Helper()
	return n.MustFail(limit, words, append([]string{"docker"}, strings.Fields(line)...)...)
}

// engine is a client of the node's engine, for what no user waits for: a docker
// command alone takes more than a second of the processor under emulation.
func (n *Node) engine() *client.Client {
	n.t.Helper()
	c, err := client.NewClientWithOpts(client.WithHost("unix://"+n.Path("/run/docker.sock")), client.WithAPIVersionNegotiation())
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

func (n *Node) engineAnswers() bool {
	c := n.engine()
	defer c.Close()
	ctx, cancel := context.WithTimeout(n.t.Context(), 5*time.Second)
	defer cancel()
	_, err := c.Ping(ctx)
	return err == nil
}

// Volumes asks the engine for all volumes, as `docker volume ls` does, and returns
// their drivers by name. It fails when the answer takes longer than limit.
func (n *Node) Volumes(limit time.Duration) map[string]string {
	n.t.Helper()
	c := n.engine()
	defer c.Close()
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	list, err := c.VolumeList(ctx, volume.ListOptions{})
	if err != nil {
		n.t.Fatalf("%s: list volumes: %v", n.Name, err)
	}
	drivers := map[string]string{}
	for _, v := range list.Volumes {
		drivers[v.Name] = strings.TrimSuffix(v.Driver, ":latest")
	}
	return drivers
}

// busyboxArchive is the file tree of Image as a tar archive.
func busyboxArchive() (io.Reader, error) {
	binary, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, dir := range []string{"bin/", "etc/", "tmp/", "www/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	head := &tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755, Size: int64(len(binary))}
	if err := w.WriteHeader(head); err != nil {
		return nil, err
	}
	if _, err := w.Write(binary); err != nil {
		return nil, err
	}
	for _, name := range []string{"sh", "cat", "cp", "echo", "httpd", "ls", "mkdir", "rm", "sleep", "sync", "true", "wget"} {
		link := &tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777}
		if err := w.WriteHeader(link); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return &out, nil
}
