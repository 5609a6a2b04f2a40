package btrfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	mebi = 1 << 20

	quotaEnableSimple = 4
)

// qgroups lists the quota groups of subvolumes.
func qgroups(t testing.TB, dir *rooted.Dir) (ids []uint64) {
	t.Helper()
	items, err := search(dir.FD(), quotaTree, 0, infoKind, firstID, ^uint64(0))
	assert.NilError(t, err)
	for _, item := range items {
		ids = append(ids, item.offset)
	}
	return ids
}

// write writes a file and tells whether the volume was full.
func writeFile(t testing.TB, path string, size int) (full bool) {
	t.Helper()
	file, err := os.Create(path)
	if err == nil {
		_, err = file.Write(bytes.Repeat([]byte{1, 2, 3, 4}, size/4))
		err = errors.Join(err, file.Sync(), file.Close())
	}
	if errors.Is(err, unix.EDQUOT) {
		return true
	}
	assert.NilError(t, err)
	return false
}

func usage(t testing.TB, dir *rooted.Dir, name string) (used, exclusive, limit uint64) {
	t.Helper()
	assert.NilError(t, unix.Syncfs(dir.FD()))
	u, err := Trees{}.Usage(t.Context(), dir, name)
	assert.NilError(t, err)
	return u.Used, u.Exclusive, u.Limit
}

func TestQuotasStayOffUntilALimitIsAskedFor(t *testing.T) {
	dir := disk(t)
	makeTree(t, dir, "web")
	duplicate(t, dir, "web", "snap", true)
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 0))
	_, err := Trees{}.Usage(t.Context(), dir, "web")
	assert.NilError(t, err)
	on, _, err := quotaStatus(dir)
	assert.NilError(t, err)
	assert.Assert(t, !on)
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 1<<30))
	on, flags, err := quotaStatus(dir)
	assert.NilError(t, err)
	assert.Assert(t, on)
	assert.Equal(t, flags&(statusSimple|statusInconsistent|statusRescan), uint64(0))
}

// What was written before quotas were on counts.
func TestTheFirstLimitCountsWhatIsThere(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	assert.Assert(t, !writeFile(t, filepath.Join(path, "f"), 20*mebi))
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 30*mebi))
	used, _, limit := usage(t, dir, "web")
	assert.Assert(t, used >= 20*mebi && used < 22*mebi, "%d", used)
	assert.Equal(t, limit, uint64(30*mebi))
	assert.Assert(t, writeFile(t, filepath.Join(path, "g"), 20*mebi))
}

func TestFirstLimitsAtTheSameTime(t *testing.T) {
	dir := disk(t)
	var group errgroup.Group
	for i := range 8 {
		name := strconv.Itoa(i)
		group.Go(func() error {
			if err := (Trees{}).Make(dir, name, false); err != nil {
				return err
			}
			return Trees{}.Limit(t.Context(), dir, name, uint64(i+1)<<30)
		})
	}
	assert.NilError(t, group.Wait())
	for i := range 8 {
		_, _, limit := usage(t, dir, strconv.Itoa(i))
		assert.Equal(t, limit, uint64(i+1)<<30)
	}
}

// A limit is on what the volume refers to, whoever else has a share in it.
func TestCopiesHaveLimitsOfTheirOwn(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 30*mebi))
	assert.Assert(t, !writeFile(t, filepath.Join(path, "f"), 20*mebi))
	duplicate(t, dir, "web", "snap", true)
	duplicate(t, dir, "web", "clone", false)
	for _, name := range []string{"snap", "clone"} {
		used, exclusive, limit := usage(t, dir, name)
		assert.Equal(t, limit, uint64(0), name)
		assert.Assert(t, used >= 20*mebi && exclusive < mebi, "%s: %d, %d", name, used, exclusive)
	}
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "clone", 25*mebi))
	clone := filepath.Join(dir.Path(), "clone")
	assert.Assert(t, writeFile(t, filepath.Join(clone, "g"), 10*mebi))
	// What snapshots keep is not the volume's trouble: it may write all anew.
	for range 3 {
		assert.Assert(t, !writeFile(t, filepath.Join(path, "f"), 10*mebi))
		assert.NilError(t, os.Remove(filepath.Join(path, "f")))
		assert.NilError(t, unix.Syncfs(dir.FD()))
	}
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "clone", 0))
	assert.Assert(t, !writeFile(t, filepath.Join(clone, "g"), 30*mebi))
}

func TestNoQuotaGroupIsLeft(t *testing.T) {
	dir := disk(t)
	commitOften(t, dir)
	makeTree(t, dir, "stays")
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "stays", 30*mebi))
	stays := idOf(t, dir, "stays")
	var last uint64
	for i := range 200 {
		name := strconv.Itoa(i)
		makeTree(t, dir, name)
		switch i % 4 {
		case 0:
			assert.NilError(t, Trees{}.Limit(t.Context(), dir, name, 30*mebi))
			last = idOf(t, dir, name)
			assert.NilError(t, Trees{}.Prune(dir, name))
		case 1:
			duplicate(t, dir, name, "snap", true)
			last = idOf(t, dir, "snap")
			assert.NilError(t, Trees{}.Delete(t.Context(), dir, name))
			assert.NilError(t, Trees{}.Delete(t.Context(), dir, "snap"))
		default:
			last = idOf(t, dir, name)
			assert.NilError(t, Trees{}.Delete(t.Context(), dir, name))
		}
	}
	gone(t, dir, last)
	for _, id := range qgroups(t, dir) {
		if id != stays {
			gone(t, dir, id)
		}
	}
	makeTree(t, dir, "last")
	last = idOf(t, dir, "last")
	assert.NilError(t, Trees{}.Delete(t.Context(), dir, "last"))
	left := slices.DeleteFunc(qgroups(t, dir), func(id uint64) bool { return id == last })
	assert.DeepEqual(t, left, []uint64{stays})
	_, _, limit := usage(t, dir, "stays")
	assert.Equal(t, limit, uint64(30*mebi))
}

func TestAQuotaGroupOfNoSubvolumeIsRemoved(t *testing.T) {
	dir := disk(t)
	assert.NilError(t, enableQuotas(t.Context(), dir))
	// Newer kernels make none for a subvolume that is not there: one of level 1 instead.
	const group = 1<<48 | 9999
	request(t, dir, qgroupCreate, &[2]uint64{1, group})
	assert.DeepEqual(t, qgroups(t, dir), []uint64{group})
	assert.NilError(t, dropQgroup(dir, group))
	assert.Equal(t, len(qgroups(t, dir)), 0)
	assert.NilError(t, dropQgroup(dir, group))
	// A limit makes the group where it is missing.
	assert.NilError(t, setLimit(dir, group, mebi))
	q, known, err := readQuota(dir, group)
	assert.NilError(t, err)
	assert.Assert(t, known)
	assert.Equal(t, q.limit, uint64(mebi))
}

// When the kernel has given up counting, the next limit has all counted anew.
func TestCountsThatWereGivenUpAreMadeAnew(t *testing.T) {
	dir := disk(t)
	commitOften(t, dir)
	path := makeTree(t, dir, "web")
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 30*mebi))
	big := makeTree(t, dir, "big")
	for i := range 3000 {
		assert.NilError(t, os.WriteFile(filepath.Join(big, fmt.Sprintf("%0100d", i)), nil, 0o600))
	}
	duplicate(t, dir, "big", "snap", true)
	for i := range 10 {
		assert.NilError(t, os.Remove(filepath.Join(big, fmt.Sprintf("%0100d", i))))
	}
	assert.NilError(t, unix.Syncfs(dir.FD()))
	thresholds, err := filepath.Glob("/sys/fs/btrfs/*/qgroups/drop_subtree_threshold")
	assert.NilError(t, err)
	assert.Assert(t, len(thresholds) > 0)
	mine := ""
	for _, threshold := range thresholds {
		if _, err := os.Stat(filepath.Join(filepath.Dir(threshold), fmt.Sprintf("0_%d", idOf(t, dir, "snap")))); err == nil {
			mine = threshold
		}
	}
	assert.NilError(t, os.WriteFile(mine, []byte("0"), 0o600))
	id := idOf(t, dir, "snap")
	assert.NilError(t, Trees{}.Delete(t.Context(), dir, "snap"))
	gone(t, dir, id)
	_, flags, err := quotaStatus(dir)
	assert.NilError(t, err)
	assert.Assert(t, flags&statusInconsistent != 0, "the kernel counts on: %b", flags)

	assert.Assert(t, !writeFile(t, filepath.Join(path, "f"), 20*mebi))
	used, _, _ := usage(t, dir, "web") // walks, and has all counted
	assert.Assert(t, used >= 20*mebi, "%d", used)
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 30*mebi))
	_, flags, err = quotaStatus(dir)
	assert.NilError(t, err)
	assert.Equal(t, flags&(statusInconsistent|statusRescan), uint64(0))
	assert.Assert(t, writeFile(t, filepath.Join(path, "g"), 20*mebi))
}

func TestWaitingForCountsEndsWithTheContext(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	for i := range 2000 {
		assert.NilError(t, os.WriteFile(filepath.Join(path, strconv.Itoa(i)), []byte("x"), 0o600))
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	// It may be counted before anybody looks; what must not be is a hang or another error.
	if err := (Trees{}).Limit(ended, dir, "web", 1<<30); err != nil {
		assert.ErrorIs(t, err, context.Canceled)
	}
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 1<<30))
}

// Where an operator has switched simple quotas on, they limit.
func TestSimpleQuotasAreUsedWhereTheyAreOn(t *testing.T) {
	dir := disk(t)
	request(t, dir, quotaControl, &[2]uint64{quotaEnableSimple, 0})
	path := makeTree(t, dir, "web")
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 30*mebi))
	assert.Assert(t, !writeFile(t, filepath.Join(path, "f"), 20*mebi))
	used, _, limit := usage(t, dir, "web")
	assert.Assert(t, used >= 20*mebi, "%d", used)
	assert.Equal(t, limit, uint64(30*mebi))
	assert.Assert(t, writeFile(t, filepath.Join(path, "g"), 20*mebi))
	duplicate(t, dir, "web", "snap", true)
	for _, name := range []string{"web", "snap"} {
		assert.NilError(t, Trees{}.Delete(t.Context(), dir, name))
	}
}
