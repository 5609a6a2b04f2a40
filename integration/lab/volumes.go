package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// volumesSize of an image in bytes; it is sparse.
const volumesSize = 16 << 30

func (h *Host) volumesImage() string { return filepath.Join(h.Dir, "disk", "volumes.img") }

// makeVolumesImage makes the file system, with the machine's own programs.
func makeVolumesImage(ctx context.Context, path, kind string) error {
	mkfs := map[string][]string{
		"btrfs": {"mkfs.btrfs", "-q", path},
		"xfs":   {"mkfs.xfs", "-q", path},
	}[kind]
	if mkfs == nil {
		return fmt.Errorf("volumes on %q: want btrfs or xfs", kind)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(volumesSize); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, mkfs[0], mkfs[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", mkfs[0], err, out)
	}
	return nil
}

// mountVolumes mounts the image in the host. The loop device goes with the last
// namespace that has it mounted.
func mountVolumes(image string) error {
	if image == "" {
		return nil
	}
	if err := os.MkdirAll(dataDir, 0o755); err != nil {
		return err
	}
	if out, err := exec.CommandContext(context.Background(), "mount", "-o", "loop", image, dataDir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount %s: %w: %s", image, err, out)
	}
	return nil
}
