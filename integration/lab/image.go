package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// BusyboxImage is the image every engine of the lab gets.
const BusyboxImage = "busybox:latest"

// ImportBusybox gives the engine the image busybox:latest unless it has it. The
// image is Debian's static busybox with its applet links, /www/index.html to
// serve, /data-seed with some content for copy-up tests, /bin/hold, which runs
// until it is told to stop, and ask and peer (see tool/main.go). Its stop signal is SIGKILL: what runs as PID 1
// ignores SIGTERM, and every stop would take Docker's ten seconds of patience.
func (h *Host) ImportBusybox(ctx context.Context) error {
	file, err := busyboxArchive(ctx, h.engine)
	if err != nil {
		return err
	}
	if _, err := h.Docker(ctx, "image", "inspect", BusyboxImage); err == nil {
		return nil
	}
	if _, err := h.Docker(ctx, "load", "-i", file); err != nil {
		return fmt.Errorf("load %s: %w", BusyboxImage, err)
	}
	return nil
}

// importImage loads a root file system as an image unless its name is taken.
func (h *Host) importImage(ctx context.Context, file, name string, changes ...string) error {
	if _, err := h.Docker(ctx, "image", "inspect", name); err == nil {
		return nil
	}
	args := []string{"import", "--platform", "linux/amd64"}
	for _, c := range changes {
		args = append(args, "-c", c)
	}
	// The cache is mounted inside at the same path.
	if _, err := h.Docker(ctx, append(args, file, name)...); err != nil {
		return fmt.Errorf("import %s: %w", name, err)
	}
	return nil
}

const imagePath = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// busyboxArchive makes what `docker load` takes in the cache unless it is there.
func busyboxArchive(ctx context.Context, engine Engine) (string, error) {
	file := filepath.Join(CacheDir(), "busybox-image-"+engine.Version+"-"+toolVersion()+".tar")
	program, err := toolBinary(ctx)
	if err != nil {
		return "", err
	}
	return file, makeCached(file, func(w io.Writer) error {
		binary, err := os.ReadFile(filepath.Join(engine.Root(), "bin/busybox"))
		if err != nil {
			return err
		}
		applets, err := exec.CommandContext(ctx, filepath.Join(engine.Root(), "bin/busybox"), "--list").Output()
		if err != nil {
			return fmt.Errorf("busybox --list: %w", err)
		}
		tool, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		var layer bytes.Buffer
		if err := writeTar(&layer, busyboxEntries(binary, tool, strings.Fields(string(applets)))); err != nil {
			return err
		}
		return writeImage(w, layer.Bytes())
	})
}

// writeImage writes a one-layer image. `docker import` would be simpler, but that
// of 20.10 cannot set a stop signal.
func writeImage(w io.Writer, layer []byte) error {
	digest := fmt.Sprintf("%x", sha256.Sum256(layer))
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64",
		"os":           "linux",
		"created":      time.Unix(0, 0).UTC(),
		"config":       map[string]any{"Cmd": []string{"sh"}, "Env": []string{"PATH=/bin"}, "StopSignal": "SIGKILL"},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest}},
		"history":      []map[string]any{{"created": time.Unix(0, 0).UTC(), "comment": "static busybox of Debian"}},
	})
	if err != nil {
		return err
	}
	configName := fmt.Sprintf("%x.json", sha256.Sum256(config))
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{BusyboxImage}, "Layers": []string{digest + "/layer.tar"},
	}})
	if err != nil {
		return err
	}
	return writeTar(w, []tarEntry{
		{tar.Header{Name: configName, Typeflag: tar.TypeReg, Mode: 0o644}, config},
		{tar.Header{Name: digest + "/", Typeflag: tar.TypeDir, Mode: 0o755}, nil},
		{tar.Header{Name: digest + "/layer.tar", Typeflag: tar.TypeReg, Mode: 0o644}, layer},
		{tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg, Mode: 0o644}, manifest},
	})
}

type tarEntry struct {
	header tar.Header
	body   []byte
}

// writeTar writes the entries, all of them dated to the epoch.
func writeTar(w io.Writer, entries []tarEntry) error {
	tw := tar.NewWriter(w)
	for _, e := range entries {
		e.header.Size, e.header.ModTime = int64(len(e.body)), time.Unix(0, 0)
		if err := tw.WriteHeader(&e.header); err != nil {
			return err
		}
		if _, err := tw.Write(e.body); err != nil {
			return err
		}
	}
	return tw.Close()
}

// busyboxEntries are the files of busybox:latest.
func busyboxEntries(binary, tool []byte, applets []string) []tarEntry {
	const hold = "#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 3600 & wait $!; done\n"
	dir := func(name string, mode int64) tarEntry {
		return tarEntry{tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: mode}, nil}
	}
	file := func(name string, mode int64, owner int, body []byte) tarEntry {
		return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, Uid: owner, Gid: owner}, body}
	}
	entries := []tarEntry{
		dir("bin", 0o755), dir("etc", 0o755), dir("proc", 0o755), dir("sys", 0o755), dir("dev", 0o755), dir("root", 0o700),
		dir("var", 0o755), dir("tmp", 0o1777), dir("www", 0o755), dir("data-seed", 0o755), dir("data-seed/sub", 0o755),
		file("bin/busybox", 0o755, 0, binary),
		file("bin/hold", 0o755, 0, []byte(hold)),
		file("bin/peer", 0o755, 0, tool),
		file("etc/passwd", 0o644, 0, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")),
		file("etc/group", 0o644, 0, []byte("root:x:0:\nnogroup:x:65534:\n")),
		file("www/index.html", 0o644, 0, []byte("hello from the image\n")),
		file("data-seed/seed.txt", 0o644, 0, []byte("seeded by the image\n")),
		file("data-seed/sub/owned.txt", 0o600, 1000, []byte("owned by 1000\n")),
	}
	link := func(name, target string) tarEntry {
		return tarEntry{tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, nil}
	}
	entries = append(entries, link("ask", "peer"))
	for _, applet := range applets {
		if applet != "busybox" {
			entries = append(entries, link(applet, "busybox"))
		}
	}
	return entries
}

// makeCached makes a file in the cache with write unless it is there. Callers at
// the same time wait for one another.
func makeCached(file string, write func(io.Writer) error) error {
	unlock, err := lockCache(filepath.Base(file))
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(file); err == nil {
		return nil
	}
	tmp, err := os.Create(file + ".tmp")
	if err != nil {
		return err
	}
	// Gone already when all went well.
	defer func() { _ = os.Remove(tmp.Name()) }()
	err = write(tmp)
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", file, err)
	}
	return os.Rename(tmp.Name(), file)
}

// lastLines are the last n lines of a text, for error messages.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
