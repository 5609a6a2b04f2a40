package volplugin

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/volume"
)

const (
	// requestTime bounds a request. pluginapi gives up after 25 s and dockerd
	// after 30 s or more, so that the words reach the user.
	requestTime = 20 * time.Second
	// lookTime bounds Get's and List's look at the root.
	lookTime = 2 * time.Second
	// recoverTime bounds the part of recovery that needs the storage; what is not
	// done by then is done in the background.
	recoverTime = 5 * time.Second
	// scanTime bounds a whole reading of the root. It is less than tendEvery, so
	// that a reading never spans two rounds.
	scanTime = 50 * time.Second
	// stuckMost is how many operations may be inside the file system at once.
	// Each that hangs holds a thread, and a Go program has 10,000.
	stuckMost = 64
)

// A Config says where volumes are kept and how they are handed out.
type Config struct {
	// Root is the absolute path of the volume root, an existing directory.
	Root string
	// Roots are further roots, which option root=NAME picks; see ParseRoots.
	Roots []NamedRoot
	// ShareBase is the directory below which Berth mounts file servers' shares, of this
	// host and used for nothing else. "" mounts none.
	ShareBase string
	// MountBase is the directory below which volumes are mounted for dockerd, the
	// plugin's propagatedMount. "" hands out the data directories themselves.
	MountBase string
	// SpecialBase is used where MountBase is "": the directory below which snapshots,
	// images and volumes with options of mounts are mounted all the same. "" refuses
	// these.
	SpecialBase string
	// Local is a directory of this host in which engines mount images and devices.
	// It is not below MountBase.
	Local string
	// Backups says how backups are kept; nil keeps none. They need Local too.
	Backups *BackupConfig
	// Tell, unless nil, is told how backups, scheduled snapshots and the care for targets
	// went. It does not block.
	Tell func(notify.Event)
	// ThinPool is what pools of engine thin are made of; see thin.ParseSettings.
	ThinPool thin.Settings
	// Quiesce, unless nil, brings to rest what uses a volume, by its name, while the
	// snapshot of a backup is made. It returns nil when there is nothing to be done. It
	// is called without a lock that a request needs: Docker, which it asks, may be waiting
	// for one.
	Quiesce func(ctx context.Context, volume string) (Rest, error)
	// CheckMounts, when set, is asked by each Mount and refuses it with its error.
	CheckMounts func() error
	// DB keeps this host's cache, Counts how many containers have which volume. The
	// caller closes them after Run.
	DB, Counts *state.DB
	// HostID names this host in records, unlike all others on the root. "" makes
	// one and keeps it in DB.
	HostID string
	// BootID changes with each boot of the host; nil reads the kernel's.
	BootID func() (string, error)
	Log    *logrus.Entry
	// Now is the clock for what is recorded; nil is time.Now.
	Now func() time.Time

	// The rest is for tests of this package.

	// step is volume.Location's.
	step func(step, volume string) error
	// shared replaces volume.Root.Shared.
	shared func(*volume.Root) (bool, error)
	// mount is netfs.NewMounter's.
	mount netfs.MountFunc
	// request, look and attach replace requestTime, lookTime and attachTime unless 0.
	request, look, attach time.Duration
}

func (c *Config) complete() error {
	if !filepath.IsAbs(c.Root) {
		return fault.Invalid("volume root %q: want an absolute path", c.Root)
	}
	c.Root = filepath.Clean(c.Root)
	if err := c.checkRoots(); err != nil {
		return err
	}
	if c.DB == nil || c.Counts == nil {
		return fault.Invalid("volumes need a state file, and one for the counts of mounts")
	}
	if c.Log == nil {
		c.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.BootID == nil {
		c.BootID = kernelBootID
	}
	if c.Tell == nil {
		c.Tell = func(notify.Event) {}
	}
	if c.shared == nil {
		c.shared = (*volume.Root).Shared
	}
	if c.request == 0 {
		c.request = requestTime
	}
	if c.look == 0 {
		c.look = lookTime
	}
	if c.attach == 0 {
		c.attach = attachTime
	}
	return nil
}

func kernelBootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
