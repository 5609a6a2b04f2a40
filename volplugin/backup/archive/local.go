package archive

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// A local store is a directory, perhaps one on a file server. No symbolic link leads out of it.
type local struct{ dir string }

// part ends the names of files that are being written.
const part = ".part"

func (l local) String() string { return l.dir }

// make wants the directory above to be there: it may be a disk that is not mounted.
func (l local) make(context.Context) error {
	parent := filepath.Dir(l.dir)
	if info, err := os.Stat(parent); err != nil || !info.IsDir() {
		return fault.Unavailable("there is no directory %s to make it in: is its disk mounted?", parent)
	}
	if err := os.Mkdir(l.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (l local) list(ctx context.Context, volume string) ([]object, error) {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	names := []string{volume}
	if volume == "" {
		names = nil
		entries, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			if entry.IsDir() && volumes.MatchString(entry.Name()) {
				names = append(names, entry.Name())
			}
		}
	}
	var all []object
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		entries, err := fs.ReadDir(root.FS(), name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, entry := range entries {
			info, err := entry.Info()
			if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
				continue
			}
			if err != nil {
				return nil, err
			}
			all = append(all, object{volume: name, file: entry.Name(), size: info.Size(), modified: info.ModTime()})
		}
	}
	return all, nil
}

func (l local) open(_ context.Context, name string) (io.ReadCloser, error) {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// A pipe of that name would wait for somebody to write to it.
	file, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s/%s is not a file", l.dir, name)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

func (l local) put(ctx context.Context, name string, _ int64, r io.Reader) (err error) {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	dir := path.Dir(name)
	if err := root.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp := path.Join(dir, "."+path.Base(name)+"."+rand.Text()+part)
	file, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		_ = file.Close()
		if err != nil {
			err = errors.Join(err, root.Remove(temp))
		}
	}()
	if _, err = io.Copy(file, r); err != nil {
		return err
	}
	if err = file.Sync(); err != nil {
		return err
	}
	// Network file systems tell of failed writes here.
	if err = file.Close(); err != nil {
		return err
	}
	if err = ctx.Err(); err != nil {
		return err
	}
	if err = root.Rename(temp, name); err != nil {
		return err
	}
	temp = name // is what goes after an error
	return syncDirs(root, dir)
}

// syncDirs puts the names in a volume's directory on disk, and its own.
func syncDirs(root *os.Root, dir string) error {
	for _, name := range []string{dir, "."} {
		file, err := root.Open(name)
		if err != nil {
			return err
		}
		err = file.Sync()
		_ = file.Close()
		// Some network file systems cannot sync a directory.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return nil
}

func (l local) remove(_ context.Context, name string) error {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (l local) sweep(ctx context.Context, before time.Time) error {
	all, err := l.list(ctx, "")
	if err != nil {
		return err
	}
	for _, o := range all {
		if strings.HasPrefix(o.file, ".") && strings.HasSuffix(o.file, part) && o.modified.Before(before) {
			if err := l.remove(ctx, o.name()); err != nil {
				return err
			}
		}
	}
	return nil
}
