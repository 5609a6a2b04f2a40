package volplugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A Rest is what uses a volume while it is at rest.
type Rest interface {
	// Level of a snapshot that is made now; "" is the engine's own.
	Level() control.Consistency
	// Did says what was done, a container a line.
	Did() []string
	// Until is when the rest is over at the latest.
	Until() time.Time
	// Still errs, with a conflict, when the rest was disturbed.
	Still(context.Context) error
	// End ends it, also when the context has ended. It is called once.
	End(context.Context) error
}

// lookElsewhere bounds the look for other hosts that use a volume.
const lookElsewhere = 5 * time.Second

// backupSnapshot makes the snapshot of a backup while what uses the volume is at rest.
func (d *Driver) backupSnapshot(ctx context.Context, s *store, rec volume.Record, o volume.SnapshotOptions, tell func(control.Progress)) (err error) {
	if d.cfg.Quiesce != nil {
		// What goes wrong goes wrong again with the snapshot, which tells of it; and a volume
		// that is not attached has nothing in memory.
		if err := s.prepare(ctx, rec); err != nil {
			d.cfg.Log.WithField("volume", rec.Name).WithError(err).Debug("flush before the snapshot of a backup")
		}
	}
	rest, err := d.quiesce(ctx, rec.Name)
	if err != nil {
		return err
	}
	if rest == nil {
		_, err := d.createSnapshot(ctx, rec.Name, o, tell)
		return err
	}
	defer d.endRest(ctx, rec.Name, rest)
	if o.Consistency = engine.Consistency(rest.Level()); o.Consistency != "" && d.usedElsewhere(ctx, s, rec) {
		o.Consistency = "" // nobody has told the containers of another host
	}
	within, cancel := context.WithDeadline(ctx, rest.Until())
	defer cancel()
	if _, err = d.createSnapshot(within, rec.Name, o, tell); err != nil {
		if ctx.Err() == nil && within.Err() != nil {
			return fault.Exhausted("the snapshot was not done in the time for which containers are at rest (label berth.backup.timeout); %s", strings.Join(rest.Did(), "; "))
		}
		return err
	}
	if err := rest.Still(ctx); err != nil {
		return errors.Join(err, d.dropBackupSnapshot(context.WithoutCancel(ctx), rec.UUID, o.Name))
	}
	return nil
}

// prepare does what the snapshot of a volume would do otherwise while containers stand
// still: it writes to the disk what is in memory, which may take seconds, and makes room.
func (s *store) prepare(ctx context.Context, rec volume.Record) error {
	return s.inRoot(ctx, func() {}, func(ctx context.Context, root *volume.Root) error {
		if err := root.MakeRoom(ctx); err != nil {
			return err
		}
		data, err := root.Data(rec)
		if err != nil {
			return err
		}
		defer data.Close()
		fd, err := unix.Openat(data.FD(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Syncfs(fd), unix.Close(fd))
	})
}

// quiesce brings to rest what uses a volume; nil when nothing is to be.
func (d *Driver) quiesce(ctx context.Context, name string) (Rest, error) {
	if d.cfg.Quiesce == nil {
		return nil, nil
	}
	rest, err := d.cfg.Quiesce(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("bring to rest what uses volume %s: %w", name, err)
	}
	if rest != nil {
		d.cfg.Log.WithField("volume", name).Infof("at rest for the snapshot of a backup: %s", strings.Join(rest.Did(), "; "))
	}
	return rest, nil
}

// endRest ends the rest. The backup is good when that fails, but somebody has to look
// after the containers.
func (d *Driver) endRest(ctx context.Context, name string, rest Rest) {
	err := rest.End(ctx)
	e := notify.Event{Key: "rest " + name, Title: fmt.Sprintf("What uses volume %s goes on after the snapshot of its backup", name)}
	e.Minor = true
	if err != nil {
		d.cfg.Log.WithField("volume", name).WithError(err).Error("after the snapshot of a backup")
		e.Failed, e.Title, e.Text = true, fmt.Sprintf("After the snapshot of volume %s for its backup", name), err.Error()
	}
	d.cfg.Tell(e)
}

// usedElsewhere tells whether another host may have the volume in use.
func (d *Driver) usedElsewhere(ctx context.Context, s *store, rec volume.Record) (elsewhere bool) {
	ctx, cancel := context.WithTimeout(ctx, lookElsewhere)
	defer cancel()
	err := s.lookIn(ctx, func(ctx context.Context, root *volume.Root) error {
		users, err := s.usersElsewhere(ctx, root, rec.UUID)
		elsewhere = len(users) > 0
		return err
	})
	return elsewhere || err != nil
}
