package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestFullDisk(t *testing.T) { ownMounts(t, "no-room") }

func TestFailedSync(t *testing.T) { ownMounts(t, "no-sync") }

// fill takes all room of a file system and returns how to give it back.
func fill(dir string) (free func() error, err error) {
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for n := 1 << 20; n > 0; {
		_, err := f.Write(make([]byte, n))
		if errors.Is(err, unix.ENOSPC) {
			n /= 2
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	return func() error { return os.Remove(name) }, nil
}

// mountTmpfs makes the mounts of the process private and mounts a tmpfs.
func mountTmpfs(dir, size string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size)
}

// addUntilFull appends until one fails; the owner takes the failed one back.
func (c *counters) addUntilFull(key string) error {
	for {
		if err := c.add(key).Wait(context.Background()); err != nil {
			c.mu.Lock()
			c.values[key]--
			c.mu.Unlock()
			return err
		}
	}
}

func noRoom(dir string) error {
	if err := mountTmpfs(dir, "8m"); err != nil {
		return err
	}
	path := filepath.Join(dir, "log")
	c, err := openChild(path)
	if err != nil {
		return err
	}
	free, err := fill(dir)
	if err != nil {
		return err
	}
	for range 3 {
		if err := c.addUntilFull("a"); !errdefs.IsResourceExhausted(err) {
			return fmt.Errorf("full disk: %w", err)
		}
	}
	full := c.values["a"]
	if full < 100 || !c.log.ShouldCompact() || c.log.Stats().Rewrites != 0 {
		return fmt.Errorf("%d appends went in: %+v", full, c.log.Stats())
	}
	if err := c.compact(); !errdefs.IsResourceExhausted(err) {
		return fmt.Errorf("snapshot on a full disk: %w", err)
	}
	// What another process would see now.
	if err := seen(path, map[string]int{"a": full}); err != nil {
		return err
	}
	if err := free(); err != nil {
		return err
	}
	if err := c.add("a").Wait(context.Background()); err != nil {
		return fmt.Errorf("room again: %w", err)
	}
	if err := c.compact(); err != nil || c.log.ShouldCompact() {
		return fmt.Errorf("room again: should compact %v: %w", c.log.ShouldCompact(), err)
	}
	return reopened(c, path)
}

// noSync has an ext2 on a file of a tmpfs. When the tmpfs is full, the ext2 still has
// blocks, whose data cannot be written: fdatasync fails (ENOSPC of a loop device, EIO of
// others), and the kernel forgets what it could not write.
func noSync(dir string) error {
	if err := mountTmpfs(dir, "24m"); err != nil {
		return err
	}
	disk, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return err
	}
	for _, argv := range [][]string{
		{"truncate", "-s", "16M", disk},
		{"mkfs.ext2", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,nodiscard", disk},
		{"mount", "-o", "loop,errors=continue", disk, mnt},
	} {
		if out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
		}
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	path := filepath.Join(mnt, "log")
	c, err := openChild(path)
	if err != nil {
		return err
	}
	if err := c.add("a").Wait(context.Background()); err != nil {
		return err
	}
	unix.Sync()
	free, err := fill(dir)
	if err != nil {
		return err
	}
	for range 3 {
		if err := c.addUntilFull("a"); !strings.Contains(fmt.Sprint(err), "fdatasync") {
			return fmt.Errorf("failing disk: %w", err)
		}
	}
	told := c.values["a"]
	if err := free(); err != nil {
		return err
	}
	if err := c.add("a").Wait(context.Background()); err != nil {
		return fmt.Errorf("room again: %w", err)
	}
	if c.values["a"] != told+1 || c.log.Stats().Rewrites == 0 || !c.log.ShouldCompact() {
		return fmt.Errorf("after %d appends: %+v", told, c.log.Stats())
	}
	if err := seen(path, c.values); err != nil {
		return err
	}
	return reopened(c, path)
}

// seen reads the file while it is open, as after a crash.
func seen(path string, want map[string]int) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	c := &counters{values: map[string]int{}}
	s := scanFile(data)
	if err := s.replay(c.replay); err != nil {
		return err
	}
	if s.damage != Intact || fmt.Sprint(c.values) != fmt.Sprint(want) {
		return fmt.Errorf("damage %q, values %v, want %v", s.damage, c.values, want)
	}
	return nil
}

func reopened(c *counters, path string) error {
	if err := c.log.Close(); err != nil {
		return err
	}
	again, err := openChild(path)
	if err != nil {
		return err
	}
	if fmt.Sprint(again.values) != fmt.Sprint(c.values) {
		return fmt.Errorf("values %v, want %v", again.values, c.values)
	}
	return again.log.Close()
}
