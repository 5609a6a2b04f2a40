package control

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

// shelf is a VolumeAdmin without a daemon. It answers each request with the whole of
// what it has, and keeps the request.
type shelf struct {
	volume   Volume
	snapshot Snapshot
	usage    UsageReport
	trash    TrashEntry
	target   Target
	backup   Backup
	got      []any
	// archive is what an export writes, and what an import has read.
	archive []byte
	// work is what calls do that take long; nil is nothing.
	work func(context.Context, func(Progress)) error
	// fail is what the others answer.
	fail error
}

func (s *shelf) short(req any) error {
	s.got = append(s.got, req)
	return s.fail
}

func (s *shelf) long(ctx context.Context, req any, progress func(Progress)) error {
	s.got = append(s.got, req)
	if s.work == nil {
		return s.fail
	}
	return s.work(ctx, progress)
}

func (s *shelf) Volumes(context.Context) ([]Volume, error) {
	return []Volume{s.volume}, s.short("volumes")
}

func (s *shelf) Volume(_ context.Context, name string) (Volume, error) {
	return s.volume, s.short(name)
}

func (s *shelf) CloneVolume(ctx context.Context, req CloneRequest, progress func(Progress)) (Volume, error) {
	return s.volume, s.long(ctx, req, progress)
}

func (s *shelf) RollbackVolume(ctx context.Context, req RollbackRequest, progress func(Progress)) (Rollback, error) {
	return Rollback{Volume: s.volume, Kept: s.snapshot}, s.long(ctx, req, progress)
}

func (s *shelf) RenameVolume(_ context.Context, req RenameRequest) (Volume, error) {
	return s.volume, s.short(req)
}

func (s *shelf) ResizeVolume(ctx context.Context, req ResizeRequest, progress func(Progress)) (Volume, error) {
	return s.volume, s.long(ctx, req, progress)
}

func (s *shelf) VolumeUsage(ctx context.Context, req UsageRequest, progress func(Progress)) (UsageReport, error) {
	return s.usage, s.long(ctx, req, progress)
}

func (s *shelf) AdoptVolume(ctx context.Context, req AdoptRequest, progress func(Progress)) (Volume, error) {
	return s.volume, s.long(ctx, req, progress)
}

func (s *shelf) UpdateVolume(_ context.Context, req UpdateRequest) (Volume, error) {
	return s.volume, s.short(req)
}

func (s *shelf) CreateSnapshot(ctx context.Context, req SnapshotRequest, progress func(Progress)) (Snapshot, error) {
	return s.snapshot, s.long(ctx, req, progress)
}

func (s *shelf) Snapshots(_ context.Context, volume string) ([]Snapshot, error) {
	return []Snapshot{s.snapshot}, s.short(volume)
}

func (s *shelf) RemoveSnapshot(ctx context.Context, ref SnapshotRef, progress func(Progress)) error {
	return s.long(ctx, ref, progress)
}

func (s *shelf) PruneSnapshots(ctx context.Context, req PruneSnapshotsRequest, progress func(Progress)) (PruneSnapshotsReport, error) {
	return PruneSnapshotsReport{Removed: []Snapshot{s.snapshot}, Failed: map[string]string{"a@b": "c"}}, s.long(ctx, req, progress)
}

func (s *shelf) Trash(context.Context) ([]TrashEntry, error) {
	return []TrashEntry{s.trash}, s.short("trash")
}

func (s *shelf) RestoreTrash(_ context.Context, req RestoreTrashRequest) (Volume, error) {
	return s.volume, s.short(req)
}

func (s *shelf) PurgeTrash(ctx context.Context, req PurgeTrashRequest, progress func(Progress)) (PurgeTrashReport, error) {
	return PurgeTrashReport{Purged: []TrashEntry{s.trash}, Failed: map[string]string{"d": "e"}}, s.long(ctx, req, progress)
}

func (s *shelf) Findings(context.Context) []Finding {
	return []Finding{{ID: "volumes", Status: StatusOK, Summary: "all whole"}}
}

func fullShelf() *shelf {
	at := func(sec int64) time.Time { return time.Unix(sec, 0).UTC() }
	snapshot := Snapshot{
		Volume: "db", VolumeUUID: "u1", Name: "s1", Created: at(60), Origin: SnapshotSchedule, Consistency: ConsistencyFrozen,
		Files: 3, Bytes: 1 << 40, Unstable: 1, Used: 5, Mounted: true, Error: "damaged",
	}
	return &shelf{
		volume: Volume{
			Name: "db", UUID: "u1", State: VolumeRestoring, Error: "x", Progress: &Progress{Step: "copying", Files: 1, TotalFiles: 2, Bytes: 3, TotalBytes: 4},
			Engine: "btrfs", FileSystem: "btrfs", Root: "ssd", RootPath: "/data/ssd", Created: at(50), Mountpoint: "/mnt/db", Mounted: true,
			Size: 10 << 30, Used: 5, UsedAt: at(55), OnRemove: "trash", TrashKeep: time.Hour, Protect: true, ReadOnly: true, Exclusive: true, Adopted: true,
			Labels: map[string]string{"a": "b"}, Options: map[string]string{"size": "10G"}, Source: &VolumeSource{Volume: "v", Snapshot: "s", Path: "p", Backup: "b", Archive: true},
			Users: []VolumeUser{{Host: "h1", Here: true, Mounts: 2, Seen: at(70)}}, SnapshotCount: 1, Snapshots: []Snapshot{snapshot},
			Schedule: &Schedule{Spec: "@hourly", Keep: "24h", Last: at(80), Next: at(90), LastError: "y"},
			Backup: &VolumeBackup{
				Target: "nas", Schedule: "@daily", Keep: "7d", Next: at(95), Last: at(85), LastError: "o", Good: "nas/db@0123456789", GoodTime: at(84),
			},
			Consistency: ConsistencyCrash, Instant: true,
		},
		snapshot: snapshot,
		usage: UsageReport{
			Volumes: []VolumeUsage{{Name: "db", Engine: "btrfs", Root: "ssd", Error: "z", Used: 1, Files: 2, Exclusive: 3, Limit: 4, Free: 5, Snapshots: 6, SnapshotsUsed: 7}},
			Roots:   []RootUsage{{Name: "ssd", Path: "/data/ssd", FileSystem: "btrfs", Error: "q", Size: 1, Used: 2, Free: 3, Volumes: 4, Trash: 5, TrashUsed: 6}},
		},
		trash: TrashEntry{UUID: "u2", Name: "old", Engine: "dir", Root: "r", Removed: at(100), Expires: at(200), Used: 9, Snapshots: 2, Deleting: true, Error: "w"},
		target: Target{
			Name: "nas", Engine: "restic", Repository: "sftp:a@b:/c", Variables: []string{"A"}, Files: []string{"ssh-key"}, UploadLimit: 1, DownloadLimit: 2,
			Prune: &Schedule{Spec: "@weekly", Last: at(110)}, Check: &Schedule{Spec: "@monthly", Next: at(120)}, CheckShare: 0.5, Volumes: []string{"db"}, Error: "v",
		},
		backup: Backup{
			Reference: "nas/db@0123456789", Target: "nas", ID: "0123456789", Volume: "db", UUID: "u1", Host: "h1", Time: at(130), Tags: []string{"t"},
			Files: 1, Bytes: 1 << 50, Added: 3, Consistency: ConsistencyPaused, Incomplete: true, Missing: []string{"data/x: denied"}, Unchanged: true, Took: time.Minute,
			Manifest: map[string]any{"schema": 1.0, "volume": "db"},
		},
	}
}

func serveVolumes(t *testing.T) (*shelf, *Server, *Client) {
	t.Helper()
	server, client := serve(t, Config{Info: Info{Services: []Service{{Name: VolumeService}}}})
	server.pause, server.beat = time.Millisecond, 10*time.Millisecond
	service := fullShelf()
	server.SetVolumes(service)
	return service, server, client
}

// A call is one of the Client's with a request in which every field is set.
type call struct {
	path string
	long bool
	req  any
	call func(context.Context, *Client, func(Progress)) (any, error)
	want func(*shelf) any
}

// calls are all that have a request.
var calls = slices.Concat(volumeCalls, backupCalls)

var volumeCalls = []call{
	{
		pathClone, true, CloneRequest{Volume: "db", Snapshot: "s1", Name: "copy", Options: map[string]string{"size": "1G"}},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.CloneVolume(ctx, CloneRequest{Volume: "db", Snapshot: "s1", Name: "copy", Options: map[string]string{"size": "1G"}}, p)
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathRollback, true, RollbackRequest{Volume: "db", Snapshot: "s1", Force: true},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.RollbackVolume(ctx, RollbackRequest{Volume: "db", Snapshot: "s1", Force: true}, p)
		}, func(s *shelf) any { return Rollback{Volume: s.volume, Kept: s.snapshot} },
	},
	{
		pathRename, false, RenameRequest{Volume: "db", Name: "db2"},
		func(ctx context.Context, c *Client, _ func(Progress)) (any, error) {
			return c.RenameVolume(ctx, RenameRequest{Volume: "db", Name: "db2"})
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathResize, true, ResizeRequest{Volume: "db", Size: 1 << 63},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.ResizeVolume(ctx, ResizeRequest{Volume: "db", Size: 1 << 63}, p)
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathUsage, true, UsageRequest{Volumes: []string{"db", "web"}},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.VolumeUsage(ctx, UsageRequest{Volumes: []string{"db", "web"}}, p)
		}, func(s *shelf) any { return s.usage },
	},
	{
		pathAdopt, true, AdoptRequest{Name: "n", Source: "/data/x", Copy: true, Options: map[string]string{"protect": "true"}},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.AdoptVolume(ctx, AdoptRequest{Name: "n", Source: "/data/x", Copy: true, Options: map[string]string{"protect": "true"}}, p)
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathUpdate, false, UpdateRequest{Volume: "db", Set: map[string]string{"protect": ""}},
		func(ctx context.Context, c *Client, _ func(Progress)) (any, error) {
			return c.UpdateVolume(ctx, UpdateRequest{Volume: "db", Set: map[string]string{"protect": ""}})
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathSnapshot, true, SnapshotRequest{Volume: "db", Name: "s2", Paused: true},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.CreateSnapshot(ctx, SnapshotRequest{Volume: "db", Name: "s2", Paused: true}, p)
		}, func(s *shelf) any { return s.snapshot },
	},
	{
		pathUnsnapshot, true, SnapshotRef{Volume: "db", Name: "s1"},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return struct{}{}, c.RemoveSnapshot(ctx, SnapshotRef{Volume: "db", Name: "s1"}, p)
		}, func(*shelf) any { return struct{}{} },
	},
	{
		pathPrune, true, PruneSnapshotsRequest{Volume: "db", Keep: "7d", All: true, DryRun: true},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.PruneSnapshots(ctx, PruneSnapshotsRequest{Volume: "db", Keep: "7d", All: true, DryRun: true}, p)
		}, func(s *shelf) any {
			return PruneSnapshotsReport{Removed: []Snapshot{s.snapshot}, Failed: map[string]string{"a@b": "c"}}
		},
	},
	{
		pathRestore, false, RestoreTrashRequest{UUID: "u2", Name: "new"},
		func(ctx context.Context, c *Client, _ func(Progress)) (any, error) {
			return c.RestoreTrash(ctx, RestoreTrashRequest{UUID: "u2", Name: "new"})
		}, func(s *shelf) any { return s.volume },
	},
	{
		pathPurge, true, PurgeTrashRequest{UUIDs: []string{"u2"}},
		func(ctx context.Context, c *Client, p func(Progress)) (any, error) {
			return c.PurgeTrash(ctx, PurgeTrashRequest{UUIDs: []string{"u2"}}, p)
		}, func(s *shelf) any {
			return PurgeTrashReport{Purged: []TrashEntry{s.trash}, Failed: map[string]string{"d": "e"}}
		},
	},
}

// The wire loses nothing, neither of a request nor of an answer, whether the answer
// comes at once or in lines.
func TestVolumeCallsArriveWhole(t *testing.T) {
	service, _, client := serveVolumes(t)
	for _, c := range calls {
		for _, inLines := range []bool{false, true} {
			if inLines && !c.long {
				continue
			}
			service.got, service.work = nil, nil
			told := make(chan struct{})
			if inLines {
				service.work = func(_ context.Context, progress func(Progress)) error {
					progress(Progress{Step: "copying", Files: 1, TotalFiles: 2, Bytes: 3, TotalBytes: 1 << 60})
					<-told
					return nil
				}
			}
			var seen []Progress
			answer, err := c.call(t.Context(), client, func(p Progress) {
				if len(seen) == 0 {
					close(told)
				}
				seen = append(seen, p)
			})
			assert.NilError(t, err, c.path)
			assert.DeepEqual(t, answer, c.want(service))
			assert.DeepEqual(t, service.got, []any{c.req})
			if inLines {
				assert.Equal(t, seen[0], Progress{Step: "copying", Files: 1, TotalFiles: 2, Bytes: 3, TotalBytes: 1 << 60})
			}
		}
	}
}

func TestVolumeListsArriveWhole(t *testing.T) {
	ctx := t.Context()
	service, server, client := serveVolumes(t)
	volumes, err := client.Volumes(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, volumes, []Volume{service.volume})
	volume, err := client.Volume(ctx, "db@s1")
	assert.NilError(t, err)
	assert.DeepEqual(t, volume, service.volume)
	snapshots, err := client.Snapshots(ctx, "a b&c")
	assert.NilError(t, err)
	assert.DeepEqual(t, snapshots, []Snapshot{service.snapshot})
	_, err = client.Snapshots(ctx, "")
	assert.NilError(t, err)
	trash, err := client.Trash(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, trash, []TrashEntry{service.trash})
	assert.DeepEqual(t, service.got, []any{"volumes", "db@s1", "a b&c", "", "trash"})

	findings, err := client.Doctor(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, findings[1:], service.Findings(ctx))
	assert.Equal(t, server.State(VolumeService), ServiceReady)
	for _, name := range []string{"", ".", "..", "a/b", strings.Repeat("x", maxName+1)} {
		_, err = client.Volume(ctx, name)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
	}
}

// The kind and the text of an error are the same on both sides, before there was
// progress to tell and after.
func TestErrorsOfLongCallsKeepTheirKind(t *testing.T) {
	service, _, client := serveVolumes(t)
	for _, want := range []error{
		fault.Invalid("a %d", 1), fault.NotFound("b"), fault.Conflict("c"), fault.Exhausted("d"), fault.Unavailable("e"),
		errors.New("f"), context.DeadlineExceeded,
	} {
		for _, c := range calls {
			for _, inLines := range []bool{false, true} {
				told := make(chan struct{})
				service.fail, service.work = want, nil
				if inLines && c.long {
					service.work = func(_ context.Context, progress func(Progress)) error {
						progress(Progress{Bytes: 1})
						<-told
						return want
					}
				}
				first := true
				_, err := c.call(t.Context(), client, func(Progress) {
					if first {
						close(told)
					}
					first = false
				})
				assert.Equal(t, fault.Kind(err), fault.Kind(want), "%s: %v", c.path, err)
				assert.ErrorContains(t, err, want.Error(), c.path)
			}
		}
	}
}

// However often the service tells its progress, it never waits for the client, and the
// client hears from it also when there is none.
func TestProgressNeitherBlocksNorEnds(t *testing.T) {
	service, _, client := serveVolumes(t)
	beats := make(chan struct{}, 1)
	service.work = func(_ context.Context, progress func(Progress)) error {
		for i := range uint64(100_000) {
			progress(Progress{Files: i})
		}
		for range 3 {
			<-beats
		}
		return nil
	}
	var last Progress
	_, err := client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, func(p Progress) {
		assert.Assert(t, p.Files >= last.Files)
		if last = p; p.Files == 99_999 {
			select {
			case beats <- struct{}{}:
			default:
			}
		}
	})
	assert.NilError(t, err)
	assert.Equal(t, last.Files, uint64(99_999))

	service.work = func(_ context.Context, progress func(Progress)) error {
		progress(Progress{Files: 1})
		<-beats
		return nil
	}
	beats <- struct{}{}
	_, err = client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, nil)
	assert.NilError(t, err, "who does not ask for progress gets the result")
}

// waits is work that ends with its context and tells so.
func waits(began chan<- struct{}, ended chan<- error) func(context.Context, func(Progress)) error {
	return func(ctx context.Context, progress func(Progress)) error {
		progress(Progress{Bytes: 1})
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}
}

func TestHangingUpEndsALongCall(t *testing.T) {
	service, _, client := serveVolumes(t)
	for _, inLines := range []bool{false, true} {
		began, ended := make(chan struct{}), make(chan error, 1)
		service.work = waits(began, ended)
		ctx, cancel := context.WithCancel(t.Context())
		if !inLines {
			go func() { <-began; cancel() }()
		}
		_, err := client.CloneVolume(ctx, CloneRequest{Volume: "a", Name: "b"}, func(Progress) {
			if inLines {
				cancel()
			}
		})
		assert.ErrorIs(t, err, context.Canceled)
		assert.ErrorIs(t, <-ended, context.Canceled)
		cancel()
	}
}

func TestStopEndsLongCalls(t *testing.T) {
	service, server, client := serveVolumes(t)
	began, ended := make(chan struct{}), make(chan error, 1)
	service.work = waits(began, ended)
	go func() { <-began; server.Stop() }()
	_, err := client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, nil)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "berthd is stopping")
	assert.ErrorIs(t, <-ended, context.Canceled)
	// What comes later ends at once.
	service.work = waits(make(chan struct{}), ended)
	_, err = client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, nil)
	assert.ErrorContains(t, err, "berthd is stopping")
	assert.ErrorIs(t, <-ended, context.Canceled)
}

func TestPanicOfALongCallIsAnAnswer(t *testing.T) {
	service, _, client := serveVolumes(t)
	service.work = func(context.Context, func(Progress)) error { panic("broken") }
	_, err := client.CreateSnapshot(t.Context(), SnapshotRequest{Volume: "a"}, nil)
	assert.ErrorContains(t, err, "internal error")
	_, err = client.Volumes(t.Context())
	assert.NilError(t, err)
}

// A daemon that is killed in the middle has given no result.
func TestCutOffLines(t *testing.T) {
	for name, c := range map[string]struct{ lines, want string }{
		"killed":      {`{"Progress":{}}` + "\n", "EOF"},
		"in a line":   {`{"Progress":{}}` + "\n" + `{"Resu`, "not an answer of Berth"},
		"no lines":    {"", "EOF"},
		"other words": {"hello\n", "not an answer of Berth"},
	} {
		client := dial(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", streamType)
			_, _ = w.Write([]byte(c.lines))
		}))
		_, err := client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, nil)
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", name, err)
		assert.ErrorContains(t, err, c.want, name)
	}
}

func TestSilentDaemonIsGivenUp(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for _, begin := range []bool{false, true} {
		client := dial(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if begin {
				w.Header().Set("Content-Type", streamType)
				_, _ = w.Write([]byte(`{"Progress":{}}` + "\n"))
				_ = http.NewResponseController(w).Flush()
			}
			<-release
		}))
		client.silence = 50 * time.Millisecond
		_, err := client.CloneVolume(t.Context(), CloneRequest{Volume: "a", Name: "b"}, nil)
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.ErrorContains(t, err, "no sign of life")
	}
}

func TestDaemonWithoutVolumes(t *testing.T) {
	ctx := t.Context()
	server, client := serve(t, Config{})
	server.SetNetworks(full())
	_, err := client.Volumes(ctx)
	assert.ErrorContains(t, err, "serves no volumes")
	_, err = client.CreateSnapshot(ctx, SnapshotRequest{Volume: "a"}, nil)
	assert.ErrorContains(t, err, "serves no volumes")

	server, client = serve(t, Config{Info: Info{Services: []Service{{Name: VolumeService}}}})
	_, err = client.Volumes(ctx)
	assert.ErrorContains(t, err, "still starting")
	server.Refuse(VolumeService, errors.New("the root is damaged"))
	_, err = client.Trash(ctx)
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "the root is damaged")
}

// assertRefused sends a request that is invalid, with a text that says why.
func assertRefused(t *testing.T, server *Server, path, body, want string) {
	t.Helper()
	w := httptest.NewRecorder()
	server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Prefix+version+"/"+path, strings.NewReader(body)))
	assert.Equal(t, w.Code, http.StatusBadRequest, "%s %s", path, body)
	var refused errorBody
	assert.NilError(t, json.Unmarshal(w.Body.Bytes(), &refused))
	assert.Equal(t, refused.Kind, "invalid")
	assert.ErrorContains(t, errors.New(refused.Err), want, "%s %s", path, body)
}

// The service gets whole requests only.
func TestVolumeRequestsAreChecked(t *testing.T) {
	server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: VolumeService}}}})
	service := fullShelf()
	server.SetVolumes(service)
	long := strings.Repeat("x", maxName+1)
	for _, c := range []struct{ path, body, want string }{
		{pathClone, ``, "want a JSON object"},
		{pathClone, `[]`, "want a JSON object"},
		{pathClone, `{}`, "Volume is empty"},
		{pathClone, `{"Volume":"a"}`, "Name is empty"},
		{pathClone, `{"Volume":"a","Name":"b","Snapshot":"c/d"}`, "Snapshot"},
		{pathClone, `{"Volume":"a","Name":"b","Options":{"size":1}}`, "request body"},
		{pathClone, `{"Volume":"` + long + `","Name":"b"}`, "at most 255 bytes"},
		{pathClone, "{" + strings.Repeat(" ", maxRequest), "at most"},
		{pathRollback, `{"Volume":"a"}`, "Snapshot is empty"},
		{pathRename, `{"Volume":"a","Name":".."}`, "Name"},
		{pathResize, `{"Volume":"a","Size":-1}`, "request body"},
		{pathUsage, `{"Volumes":[""]}`, "Volumes is empty"},
		{pathAdopt, `{"Name":"a"}`, "Source"},
		{pathAdopt, `{"Name":"a","Source":"x\u0000"}`, "Source"},
		{pathUpdate, `{"Volume":"a"}`, "Set is empty"},
		{pathSnapshot, `{"Volume":"a","Name":"b\u0000"}`, "Name"},
		{pathUnsnapshot, `{"Volume":"a"}`, "Name is empty"},
		{pathPrune, `{"Volume":"/"}`, "Volume"},
		{pathRestore, `{}`, "UUID is empty"},
		{pathPurge, `{}`, "either UUIDs or All"},
		{pathPurge, `{"All":true,"UUIDs":["a"]}`, "either UUIDs or All"},
		{pathPurge, `{"UUIDs":["."]}`, "UUIDs"},
	} {
		assertRefused(t, server, c.path, c.body, c.want)
	}
	assert.Equal(t, len(service.got), 0, "a wrong request reached the service")
}

// No body makes the server panic, and what reaches the service has passed its check.
func FuzzVolumeRequests(f *testing.F) {
	for _, c := range calls {
		text, err := json.Marshal(c.req)
		assert.NilError(f, err)
		f.Add(c.path, text)
		f.Add(c.path, []byte(`{"volume":"a","Name":null}`))
	}
	f.Add("volumes", []byte(`{}`))
	f.Add(pathPurge, []byte(`{"All":true}`))
	f.Fuzz(func(t *testing.T, path string, body []byte) {
		server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: VolumeService}}}})
		service := fullShelf()
		server.SetVolumes(service)
		known := false
		for _, c := range calls {
			known = known || c.path == path
		}
		if !known {
			return
		}
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Prefix+version+"/"+path, strings.NewReader(string(body))))
		switch w.Code {
		case http.StatusOK:
			assert.Equal(t, len(service.got), 1)
			assert.NilError(t, service.got[0].(order).check())
		case http.StatusBadRequest:
			assert.Equal(t, len(service.got), 0)
		default:
			t.Fatalf("status %d for %q", w.Code, body)
		}
	})
}
