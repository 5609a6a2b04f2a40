package volplugin

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

const (
	// sharePrefix goes before a share's ID in the key of its store.
	sharePrefix = "share:"
	// attachTime bounds mounting a share, but for what mount(2) takes itself. It is
	// less than requestTime, so that its words reach the user.
	attachTime = 15 * time.Second
)

// isShare tells the store of a share that a volume asked for from a configured root,
// which may be on a file server as well.
func (s *store) isShare() bool { return strings.HasPrefix(s.key, sharePrefix) }

// reachable tells whether the store can be looked at without mounting its share.
func (s *store) reachable() bool { return s.share.Load() == nil || s.attached.Load() }

// trouble is why the share could not be mounted, nil when it was or nobody tried.
func (s *store) trouble() error {
	if err := s.lastAttach.Load(); err != nil {
		return *err
	}
	return nil
}

// attach mounts the store's share unless it is mounted. One attempt runs at a time; one
// that hangs goes on without the caller.
func (s *store) attach() error {
	if s.reachable() {
		return nil
	}
	return s.flight(func(ctx context.Context, share netfs.Share) error {
		return s.mounter.Mount(ctx, share)
	})
}

// step is volume.Location's.
func (s *store) step(name string) error {
	if s.cfg.step == nil {
		return nil
	}
	return s.cfg.step(name, "")
}

// flight runs what mounts or unmounts the share, alone, and notes how it went.
func (s *store) flight(fn func(context.Context, netfs.Share) error) error {
	share := s.share.Load()
	result := s.attaching.DoChan("", func() (any, error) {
		// Not any caller's context: others may join.
		ctx, cancel := context.WithTimeout(context.Background(), s.cfg.attach)
		defer cancel()
		share := s.share.Load() // as it is now
		err := s.step("share.mount")
		if err == nil {
			err = fn(ctx, *share)
		}
		switch before := s.trouble(); {
		case err == nil:
			s.lastAttach.Store(nil)
			s.cfg.Log.Infof("share %s is mounted", share)
		case before == nil || before.Error() != err.Error():
			s.cfg.Log.WithError(err).Warnf("share %s is not mounted", share)
			fallthrough
		default:
			s.lastAttach.Store(&err)
		}
		s.attached.Store(err == nil)
		return nil, err
	})
	select {
	case r := <-result:
		return r.Err
	case <-time.After(s.cfg.attach + s.cfg.attach/15):
		return fault.Unavailable("share %s is being mounted, and its server %w", share, errHangs)
	}
}

// reopen is for a share whose root could not be opened: it mounts it when something
// has unmounted it, and mounts it anew when its handle is stale and nobody uses it.
// again tells whether to try once more.
func (s *store) reopen(failed error) (again bool, err error) {
	share := s.share.Load()
	if share == nil {
		return false, failed
	}
	mounted, err := s.mounter.Mounted(*share)
	switch {
	case err != nil:
		return false, err
	case !mounted:
		s.attached.Store(false)
		return true, s.attach()
	case !errors.Is(failed, unix.ESTALE):
		return false, failed
	case s.ledger.inUse(s.key):
		return false, fault.Unavailable("share %s: the server has forgotten it (%w), and containers of this host still use volumes of it; it is mounted anew when they are stopped", share, unix.ESTALE)
	}
	s.cfg.Log.Warnf("share %s: the server has forgotten it, mounting it anew", share)
	return true, s.flight(func(ctx context.Context, share netfs.Share) error {
		s.attached.Store(false)
		if err := s.mounter.Unmount(share, true); err != nil {
			return err
		}
		return s.mounter.Mount(ctx, share)
	})
}

// define keeps how the share is mounted, before it is for the first time. The options
// of a share that is mounted and used stay as they are: another mount of the same
// directory would get the first one's all the same.
func (s *store) define(next netfs.Share) error {
	before := s.share.Load()
	state := s.ledger.state(s.key)
	if state.Share != nil && *state.Share == next.Source() && !state.Idle {
		return nil
	}
	if state.Share != nil && !before.Same(next) {
		if s.ledger.inUse(s.key) {
			return fault.Conflict("share %s is mounted with o=%s, and containers of this host use it: o=%s can be had when they are stopped", next, netfs.Redact(before.Source().Options), netfs.Redact(next.Source().Options))
		}
		s.attached.Store(false)
		if err := s.mounter.Unmount(*before, true); err != nil {
			return err
		}
	}
	if err := s.step("share.define"); err != nil {
		return err
	}
	src := next.Source()
	if err := s.ledger.setState(s.key, func(now *storeState) { now.Share, now.Idle = &src, false }); err != nil {
		return err
	}
	s.share.Store(&next)
	return nil
}

// vendorNames are what file servers put into exported directories themselves.
var vendorNames = []string{"lost+found", ".snapshot", ".snapshots", "~snapshot", ".zfs", "@eaDir", "#recycle", "@Recycle", "System Volume Information", "$RECYCLE.BIN"}

// checkTop refuses to make a root of a directory that seems to be somebody's data: to
// the local driver the same options mean that the directory is the volume, and a new,
// empty one in it would be what a container starts on.
func (s *store) checkTop(name string) error {
	share := s.share.Load()
	if share == nil || !s.isShare() {
		return nil
	}
	top, err := rooted.Open(s.location.Path)
	if err != nil {
		return fault.Unavailable("share %s: %w", share, err)
	}
	defer top.Close()
	names, err := top.Names()
	if err != nil {
		return fault.Unavailable("share %s: %w", share, err)
	}
	foreign := slices.DeleteFunc(slices.Clone(names), func(entry string) bool {
		return slices.Contains(vendorNames, entry) || entry == ".berth" // what a Create was killed in
	})
	if len(foreign) == 0 || slices.Contains(names, name) || slices.Contains(names, volume.AcceptName) {
		return nil
	}
	device := share.Source().Device
	advice := ""
	if parent := path.Dir(device); path.Base(device) != "/" && !strings.HasSuffix(device, ":/") && !strings.HasSuffix(parent, "/") {
		if strings.HasSuffix(parent, ":") {
			parent += "/"
		}
		advice = fmt.Sprintf("; to use what is in it as a volume, give device=%s and call the volume %s, which takes that directory over", parent, path.Base(device))
	}
	return fault.Conflict("share %s is not empty, is no volume root yet, and has no directory %s: with Berth the device is the root in which each volume is a directory, not the volume itself%s; to have volumes beside what is in it, make a file %s in it", share, name, advice, volume.AcceptName)
}

// checkRoot refuses to take a directory over that is a root with volumes itself, as
// one that is a share of its own.
func (s *store) checkRoot(name string) error {
	if s.ledger.view(s.key, name).ok {
		return nil
	}
	dir, err := rooted.Open(s.location.Path)
	for _, entry := range []string{name, ".berth"} {
		if err == nil {
			parent := dir
			dir, err = parent.Dir(entry)
			err = errors.Join(err, parent.Close())
		}
	}
	if err != nil {
		return nil //nolint:nilerr // there is none; what else it is, the making of the volume finds out
	}
	_, err = dir.Stat("root.json")
	if errClose := dir.Close(); err == nil {
		err = fault.Conflict("volume %s: the directory of this name in %s is a volume root itself", name, s)
	} else {
		err = errClose
	}
	return err
}

// tendShare mounts what was mounted before this process, and lets go of a share that
// has no volumes any more. worth is false when there is nothing to look after.
func (s *store) tendShare(ctx context.Context) (worth bool, err error) {
	share := s.share.Load()
	if share == nil {
		return true, nil
	}
	mounted, err := s.mounter.Mounted(*share)
	if err != nil {
		return false, err
	}
	s.attached.Store(mounted)
	state := s.ledger.state(s.key)
	if !mounted && s.isShare() && (state.Idle || state.ID == "") && len(s.ledger.seen(s.key)) == 0 {
		return false, nil
	}
	if !mounted {
		if err := s.looks.run(ctx, func() {}, func(context.Context, func() bool) error { return s.attach() }); err != nil {
			return false, err
		}
		s.wakePurge() // what was due while it was not mounted
	}
	return true, nil
}

// retire unmounts a share that has neither volumes nor removed ones.
func (s *store) retire(ctx context.Context) error {
	share := s.share.Load()
	if share == nil || !s.isShare() || !s.attached.Load() || len(s.ledger.seen(s.key)) > 0 || s.ledger.inUse(s.key) {
		return nil
	}
	return s.looks.run(ctx, func() {}, func(context.Context, func() bool) error {
		root, err := s.open()
		if err != nil {
			return err
		}
		err = root.Close()
		empty, errTrash := emptyTrash(s.location.Path)
		if err := errors.Join(err, errTrash); err != nil || !empty {
			return err
		}
		if err := s.step("share.retire"); err != nil {
			return err
		}
		// A Create that comes now says that it is not idle, and mounts it.
		if err := s.ledger.setState(s.key, func(now *storeState) { now.Idle = true }); err != nil {
			return err
		}
		s.attached.Store(false)
		return s.mounter.Unmount(*share, false)
	})
}

// emptyTrash tells whether a root has nothing of removed volumes.
func emptyTrash(root string) (bool, error) {
	dir, err := rooted.Open(root)
	for _, name := range []string{".berth", "trash"} {
		if err != nil {
			return false, err
		}
		parent := dir
		dir, err = parent.Dir(name)
		err = errors.Join(err, parent.Close())
	}
	if err != nil {
		return false, err
	}
	empty, err := dir.Empty()
	return empty, errors.Join(err, dir.Close())
}

// shareStore is the store of the share that a Create asks for, made where it is new.
func (d *Driver) shareStore(src netfs.Source) (*store, netfs.Share, error) {
	share, err := netfs.Parse(src)
	if err != nil {
		return nil, share, err
	}
	if d.mounter == nil {
		return nil, share, fault.Invalid("option type=%s: this Berth mounts no shares; it was started without a directory for them", src.Type)
	}
	// A configured root may be the same directory.
	for _, s := range d.all() {
		if known := s.share.Load(); known != nil && known.ID() == share.ID() {
			return s, share, nil
		}
	}
	return d.addShare(share), share, nil
}

// addShare makes the store of a share.
func (d *Driver) addShare(share netfs.Share) *store {
	s := d.newStore(sharePrefix+share.ID(), share.String(), d.mounter.Path(share))
	s.mounter = d.mounter
	s.share.Store(&share)
	return d.add(s)
}

// reveal gives a Create's options as others may see them, and what a share's options
// forbid to the volume itself.
func reveal(spec options.Spec, share *netfs.Share) options.Spec {
	if share == nil {
		return spec
	}
	given := make(map[string]string, len(spec.Given))
	for name, value := range spec.Given {
		given[name] = value
	}
	if o, ok := given["o"]; ok {
		given["o"] = netfs.Redact(o)
	}
	spec.Given = given
	access := share.Access()
	spec.ReadOnly = spec.ReadOnly || access.ReadOnly
	spec.NoSUID = spec.NoSUID || access.NoSUID
	spec.NoDev = spec.NoDev || access.NoDev
	spec.NoExec = spec.NoExec || access.NoExec
	return spec
}
