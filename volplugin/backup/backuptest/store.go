package backuptest

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
)

func testInit(b *bench) {
	_, err := b.engine.List(b.Context(), backup.Filter{})
	assert.ErrorIs(b, err, backup.ErrNoRepository)
	_, err = b.engine.Backup(b.Context(), b.source("vol"), nil)
	assert.ErrorIs(b, err, backup.ErrNoRepository)
	b.init()
	b.init()
	assert.NilError(b, b.repository.Open(b).Init(b.Context()))
	assert.DeepEqual(b, b.list(backup.Filter{}), []string{})
	assert.NilError(b, b.engine.Forget(b.Context(), nil))
	assert.NilError(b, b.engine.Prune(b.Context(), nil))
	report, err := b.engine.Check(b.Context(), 1, nil)
	assert.NilError(b, err)
	assert.Equal(b, len(report.Errors), 0, "%q", report.Errors)
	b.backup(b.source("vol"))
	b.init()
	assert.Equal(b, len(b.list(backup.Filter{})), 1)
}

func testListed(b *bench) {
	b.init()
	s := b.source("vol.1_x-y")
	s.Time = noon.Add(123456789)
	s.Tags = []string{"nightly", "before-upgrade"}
	describe(b, s)
	tree(b, data(s))
	result := b.backup(s)
	files, dirs, bytes := count(b, s)
	assert.Equal(b, result.Files, files)
	assert.Equal(b, result.Dirs, dirs)
	assert.Equal(b, result.Bytes, bytes)
	assert.Assert(b, result.Added > 0)

	other := b.repository.Open(b)
	all, err := other.List(b.Context(), backup.Filter{})
	assert.NilError(b, err)
	assert.Equal(b, len(all), 1)
	got := all[0]
	assert.Equal(b, got.ID, result.ID)
	assert.Equal(b, got.Volume, s.Volume)
	assert.Equal(b, got.UUID, s.UUID)
	assert.Equal(b, got.Host, s.Host)
	assert.Assert(b, got.Time.Sub(s.Time).Abs() < time.Second, "time %v, want %v", got.Time, s.Time)
	assert.DeepEqual(b, sorted(got.Tags), sorted(s.Tags))
	assert.Assert(b, !got.Incomplete)
	if got.Files != 0 {
		assert.Equal(b, got.Files, files)
		assert.Equal(b, got.Bytes, bytes)
	}
	m, err := other.Manifest(b.Context(), result.ID)
	assert.NilError(b, err)
	want := manifest(s)
	assert.Assert(b, m.Time.Equal(want.Time))
	m.Time = want.Time
	assert.DeepEqual(b, m, want)
}

func testFilters(b *bench) {
	b.init()
	// Two volumes that have had the same name, and one more. The oldest comes last.
	one, again, other := b.source("vol"), b.source("vol"), b.source("vol2")
	again.Time, other.Time = noon.Add(-time.Hour), noon.Add(-2*time.Hour)
	for _, s := range []backup.Source{one, again, other} {
		write(b, filepath.Join(data(s), "file"), s.UUID)
	}
	a, c, d := b.backup(one).ID, b.backup(again).ID, b.backup(other).ID
	for _, test := range []struct {
		filter backup.Filter
		want   []string
	}{
		{backup.Filter{}, []string{d, c, a}},
		{backup.Filter{Volume: "vol"}, []string{c, a}},
		{backup.Filter{Volume: "vol2"}, []string{d}},
		{backup.Filter{Volume: "vo"}, []string{}},
		{backup.Filter{Volume: "VOL"}, []string{}},
		{backup.Filter{UUID: one.UUID}, []string{a}},
		{backup.Filter{UUID: uuid.NewString()}, []string{}},
		{backup.Filter{ID: c}, []string{c}},
		{backup.Filter{ID: c[:8]}, []string{c}},
		{backup.Filter{ID: "0123456789abcdef"}, []string{}},
		{backup.Filter{Volume: "vol", UUID: again.UUID}, []string{c}},
		{backup.Filter{Volume: "vol2", UUID: again.UUID}, []string{}},
		{backup.Filter{Volume: "vol", UUID: again.UUID, ID: c[:10]}, []string{c}},
		{backup.Filter{Volume: "vol", ID: d}, []string{}},
	} {
		assert.DeepEqual(b, b.list(test.filter), test.want)
	}
}

func testParentGone(b *bench) {
	b.init()
	s := b.source("vol")
	write(b, filepath.Join(data(s), "file"), "content")
	s.Parent = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	first := b.backup(s)
	s.Parent = first.ID
	second := b.backup(s)
	assert.Assert(b, first.ID != second.ID)
	assert.NilError(b, b.engine.Forget(b.Context(), []string{first.ID}))
	third := b.backup(s)
	b.same(s, b.restore(third.ID))
}

// A parent says what is likely to be the same, and is not to be believed more than
// the source allows.
func testChanged(b *bench) {
	b.init()
	s := b.source("vol")
	path := filepath.Join(data(s), "file")
	old := time.Unix(987654321, 0)
	put := func(content string) {
		b.Helper()
		write(b, path, content)
		assert.NilError(b, os.Chtimes(path, old, old))
	}
	put("one")
	write(b, filepath.Join(data(s), "goes"), "x")
	s.Parent = b.backup(s).ID

	// The change time alone tells.
	put("two")
	assert.NilError(b, os.Remove(filepath.Join(data(s), "goes")))
	s.Parent = b.backup(s).ID
	b.same(s, b.restore(s.Parent))

	// Nothing of what a copy has of the file tells, but its time.
	s.Copied = true
	write(b, path, "six")
	s.Parent = b.backup(s).ID
	b.same(s, b.restore(s.Parent))

	// Nothing at all tells.
	put("ten")
	s.Parent = b.backup(s).ID
	s.Reread = true
	put("old")
	b.same(s, b.restore(b.backup(s).ID))
}

func testForget(b *bench) {
	b.init()
	s := b.source("vol")
	var ids []string
	for i := range 3 {
		write(b, filepath.Join(data(s), fmt.Sprint(i)), fmt.Sprint("content ", i))
		s.Time = noon.Add(time.Duration(i) * time.Hour)
		ids = append(ids, b.backup(s).ID)
	}
	unknown := "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	assert.NilError(b, b.engine.Forget(b.Context(), []string{unknown}))
	assert.DeepEqual(b, b.list(backup.Filter{}), ids)
	assert.NilError(b, b.engine.Forget(b.Context(), []string{ids[0], unknown, ids[1]}))
	assert.NilError(b, b.engine.Forget(b.Context(), []string{ids[0]}))
	assert.DeepEqual(b, b.list(backup.Filter{}), ids[2:])
	for range 2 {
		assert.NilError(b, b.engine.Prune(b.Context(), nil))
		assert.DeepEqual(b, listed(b, b.repository.Open(b), backup.Filter{}), ids[2:])
	}
	_, err := b.engine.Manifest(b.Context(), ids[0])
	assert.ErrorIs(b, err, backup.ErrNoBackup)
	b.same(s, b.restore(ids[2]))
	report, err := b.engine.Check(b.Context(), 1, nil)
	assert.NilError(b, err)
	assert.Equal(b, len(report.Errors), 0, "%q", report.Errors)
}

func testUnknown(b *bench) {
	b.init()
	b.backup(b.source("vol"))
	for _, id := range []string{
		"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "01234567", "latest", "-h", "", "../../etc/passwd", "*",
	} {
		_, err := b.engine.Manifest(b.Context(), id)
		assert.ErrorIs(b, err, backup.ErrNoBackup, "%q", id)
		dir := b.TempDir()
		_, err = b.engine.Restore(b.Context(), backup.Backup{ID: id}, dir, nil, nil)
		assert.ErrorIs(b, err, backup.ErrNoBackup, "%q", id)
		assert.DeepEqual(b, names(b, dir), []string{})
		assert.NilError(b, b.engine.Forget(b.Context(), []string{id}), "%q", id)
	}
	assert.Equal(b, len(b.list(backup.Filter{})), 1)
}

func testCheck(b *bench) {
	b.init()
	s := b.source("vol")
	random(b, filepath.Join(data(s), "file"), 4<<20)
	b.backup(s)
	for _, depth := range []float64{0, 0.5, 1} {
		report, err := b.engine.Check(b.Context(), depth, nil)
		assert.NilError(b, err)
		assert.Equal(b, len(report.Errors), 0, "depth %g: %q", depth, report.Errors)
	}
	if b.repository.Damage == nil {
		return
	}
	b.repository.Damage(b)
	report, err := b.repository.Open(b).Check(b.Context(), 1, nil)
	assert.NilError(b, err)
	assert.Assert(b, len(report.Errors) > 0, "the damage is not seen")
	_, err = b.repository.Open(b).Restore(b.Context(), backup.Backup{ID: b.list(backup.Filter{})[0]}, b.TempDir(), nil, nil)
	assert.Assert(b, err != nil, "what is damaged was restored")
}

func testStray(b *bench) {
	b.init()
	s := b.source("vol")
	write(b, filepath.Join(data(s), "file"), "content")
	if b.repository.Stray == nil {
		return
	}
	b.repository.Stray(b)
	assert.DeepEqual(b, b.list(backup.Filter{}), []string{})
	id := b.backup(s).ID
	assert.DeepEqual(b, b.list(backup.Filter{}), []string{id})
	assert.NilError(b, b.engine.Prune(b.Context(), nil))
	b.same(s, b.restore(id))
}

// random makes a file that nothing can make smaller.
func random(t testing.TB, path string, size int) {
	t.Helper()
	content := make([]byte, size)
	for at := 0; at < size; {
		n, err := unix.Getrandom(content[at:], 0)
		assert.NilError(t, err)
		at += n
	}
	write(t, path, string(content))
}

func testTogether(b *bench) {
	b.init()
	var all sync.WaitGroup
	sources := make([]backup.Source, 3)
	results := make([]backup.Result, len(sources))
	errs := make([]error, len(sources))
	for i := range sources {
		s := b.source(fmt.Sprint("vol", i))
		s.Host = fmt.Sprint("host-", i)
		for j := range 50 {
			write(b, filepath.Join(data(s), fmt.Sprint(j)), fmt.Sprint(i*j))
		}
		random(b, filepath.Join(data(s), "large"), 4<<20)
		sources[i] = s
	}
	looking := b.repository.Open(b)
	for i, s := range sources {
		host := b.repository.Open(b)
		all.Go(func() { results[i], errs[i] = host.Backup(b.Context(), s, nil) })
	}
	var lookErr error
	all.Go(func() { _, lookErr = looking.List(b.Context(), backup.Filter{}) })
	all.Wait()
	assert.NilError(b, lookErr)
	for i, s := range sources {
		assert.NilError(b, errs[i])
		assert.Assert(b, results[i].Complete())
		assert.DeepEqual(b, b.list(backup.Filter{Volume: s.Volume}), []string{results[i].ID})
		b.same(s, b.restore(results[i].ID))
	}
}
