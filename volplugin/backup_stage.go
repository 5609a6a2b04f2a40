package volplugin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A stage is a directory with the two entries of a backup, of which data is a mount.
type stage struct {
	dir    string
	binder *mount.Binder
}

// openStage mounts a directory as the data of the stage called name. One that an
// earlier process has left is taken away first.
func (b *backups) openStage(name string, data *rooted.Dir, flags mount.Flags) (*stage, error) {
	st := &stage{dir: filepath.Join(b.stage, name)}
	var err error
	if st.binder, err = mount.NewBinder(st.dir); err != nil {
		return nil, err
	}
	if err := st.clear(); err != nil {
		return nil, err
	}
	if _, err := st.binder.Bind(data, backup.DataName, flags); err != nil {
		return nil, errors.Join(err, st.close())
	}
	return st, nil
}

// clear leaves an empty directory.
func (s *stage) clear() error {
	if err := s.binder.Unbind(backup.DataName); err != nil {
		return err
	}
	// Not RemoveAll: whatever else is there is nothing of this program's.
	if err := os.Remove(filepath.Join(s.dir, backup.ManifestName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *stage) close() error {
	if err := s.clear(); err != nil {
		return err
	}
	return os.Remove(s.dir)
}

// sweep takes away what an earlier process has left mounted.
func (b *backups) sweep() error {
	if b == nil {
		return nil
	}
	entries, err := os.ReadDir(b.stage)
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		st := &stage{dir: filepath.Join(b.stage, entry.Name())}
		if st.binder, err = mount.NewBinder(st.dir); err == nil {
			err = st.close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
