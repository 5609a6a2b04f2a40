package restic

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/backup"
)

const leasesDir = "leases"

// bootID is of one boot of one kernel; a copy of the machine has another one.
const bootID = "/proc/sys/kernel/random/boot_id"

// A lease says who of this host works on a repository. It is held by this process and the
// children that have inherited its file, until the last of them is gone.
type lease struct{ file *os.File }

// lease waits until it is granted, alone or with others, for e.LockWait at most.
func (e *Engine) lease(ctx context.Context, alone bool) (*lease, error) {
	name := filepath.Join(e.Dir, leasesDir, e.repositoryKey())
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	l := &lease{file}
	if err := l.take(ctx, alone, e.LockWait); err != nil {
		l.release()
		return nil, err
	}
	return l, nil
}

// take changes the lease. A change from shared to alone may let another one in between.
func (l *lease) take(ctx context.Context, alone bool, wait time.Duration) error {
	how := unix.LOCK_SH
	if alone {
		how = unix.LOCK_EX
	}
	end := time.Now().Add(wait)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := unix.Flock(int(l.file.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("lease: %w", err)
		case time.Now().After(end):
			return fmt.Errorf("%w by another backup, check or prune of this host", backup.ErrLocked)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

func (l *lease) release() { _ = l.file.Close() }

// lockName is the host name that children of this daemon, and nobody else, put into locks.
func (e *Engine) lockName() (string, error) {
	boot, err := os.ReadFile(bootID)
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(e.Dir, leasesDir), &st); err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(boot, "%d:%d", st.Dev, st.Ino))
	host := strings.Map(func(r rune) rune {
		if r == '-' || r == '.' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return -1
	}, e.Host)
	return fmt.Sprintf("berth-%.40s-%s", host, hex.EncodeToString(sum[:6])), nil
}
