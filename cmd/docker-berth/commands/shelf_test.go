package commands

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/volume"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// A shelf is the volume half of a world: volumes, snapshots and a trash with the rules
// that the daemon has, and no data.
type shelf struct {
	server    *control.Server
	volumes   map[string]control.Volume
	snapshots []control.Snapshot
	trash     []control.TrashEntry
	usage     control.UsageReport
	vault     vault
	// got are the requests that changed something.
	got []any
	// during runs while a snapshot is made.
	during func(context.Context) error
	// docker are the volumes that Docker knows, Berth's included.
	docker map[string]volume.Volume
	// gone are those that Docker was told to remove, forgot those that it asked for in
	// vain.
	gone, forgot []string
	fail         error
}

const volID = "e"

// newShelf returns a world with a volume plugin beside the network plugin.
func newShelf(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	// No test may leave a file in the machine's own directory.
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	now := time.Now()
	s := &shelf{docker: map[string]volume.Volume{}}
	s.volumes = map[string]control.Volume{
		"db": {
			Name: "db", UUID: "7d8f0c3a-0000-4000-8000-000000000001", State: control.VolumeReady, Engine: "btrfs", FileSystem: "btrfs", Created: now.Add(-50 * time.Hour),
			Mountpoint: "/mnt/volumes/db", Mounted: true, Size: 10 << 30, Used: 3 << 29, UsedAt: now, OnRemove: "trash", Protect: true, SnapshotCount: 2,
			Labels: map[string]string{"tier": "1", "app": "shop"}, Users: []control.VolumeUser{{Host: "alpha", Here: true, Mounts: 1}},
			Schedule: &control.Schedule{Spec: "@hourly", Keep: "24h:7d", Next: now.Add(20*time.Minute + 30*time.Second)}, Consistency: control.ConsistencyCrash, Instant: true,
			Backup: &control.VolumeBackup{
				Target: "nas", Schedule: "@daily", Keep: "7d:4w", Next: now.Add(5*time.Hour + time.Minute), Last: now.Add(-19 * time.Hour),
				Good: "nas/db@33333333", GoodTime: now.Add(-19 * time.Hour),
			},
		},
		"files10": {Name: "files10", UUID: "7d8f0c3a-0000-4000-8000-000000000002", State: control.VolumeReady, Engine: "dir", Root: "nas", Created: now.Add(-3 * time.Hour), OnRemove: "keep", Adopted: true},
		"files9": {
			Name: "files9", UUID: "7d8f0c3a-0000-4000-8000-000000000003", State: control.VolumeRestoring, Engine: "dir", Root: "nas", Created: now.Add(-time.Minute), OnRemove: "trash",
			Progress: &control.Progress{Bytes: 40, TotalBytes: 100}, Source: &control.VolumeSource{Volume: "files10"},
		},
		long("0"): {Name: long("0"), UUID: "7d8f0c3a-0000-4000-8000-000000000004", State: control.VolumeReady, Engine: "dir", Created: now.Add(-5 * time.Minute), OnRemove: "purge"},
	}
	s.snapshots = []control.Snapshot{
		{Volume: "db", Name: "before", Created: now.Add(-26 * time.Hour), Origin: control.SnapshotManual, Consistency: control.ConsistencyPaused, Used: 5 << 20},
		{Volume: "db", Name: "20261128T170000Z", Created: now.Add(-2 * time.Hour), Origin: control.SnapshotSchedule, Consistency: control.ConsistencyCrash},
	}
	s.trash = []control.TrashEntry{
		{UUID: "1a2b3c4d-0000-4000-8000-000000000005", Name: "old", Engine: "dir", Removed: now.Add(-72 * time.Hour), Expires: now.Add(96*time.Hour + time.Minute), Used: 7 << 20, Snapshots: 1},
		{UUID: "1a2b3c4e-0000-4000-8000-000000000006", Name: "old", Engine: "dir", Removed: now.Add(-2 * time.Hour), Expires: now.Add(166*time.Hour + time.Minute)},
		{UUID: "5e6f7a8b-0000-4000-8000-000000000007", Name: "web", Engine: "btrfs", Removed: now.Add(-26 * time.Hour), Deleting: true},
	}
	s.usage = control.UsageReport{
		Volumes: []control.VolumeUsage{
			{Name: "files10", Engine: "dir", Root: "nas", Error: "the storage does not answer"},
			{Name: "db", Engine: "btrfs", Used: 3 << 29, Files: 1200, Limit: 10 << 30, Free: 17 << 29, Snapshots: 2, SnapshotsUsed: 5 << 20, Exclusive: 1600 << 20},
		},
		Roots: []control.RootUsage{
			{Path: "/data", FileSystem: "btrfs", Size: 100 << 30, Used: 30 << 30, Free: 70 << 30, Volumes: 2, Trash: 3, TrashUsed: 7 << 20},
			{Name: "nas", Path: "/mnt/nas", FileSystem: "nfs4", Volumes: 2, Error: "the storage does not answer"},
		},
	}
	s.vault = fullVault(now)
	for name := range s.volumes {
		s.docker[name] = volume.Volume{Name: name, Driver: "berth-vol:latest"}
	}
	s.docker["legacy"] = volume.Volume{Name: "legacy", Driver: "local", Mountpoint: "/var/lib/docker/volumes/legacy/_data"}
	s.docker["share"] = volume.Volume{Name: "share", Driver: "local", Options: map[string]string{"type": "nfs", "device": ":/export"}}
	// One of the containers has the volume at two places.
	w.containers[1].State = container.StateRunning
	w.containers[1].Mounts = []container.MountPoint{{Type: mount.TypeVolume, Name: "db"}, {Type: mount.TypeVolume, Name: "db"}}
	w.containers = append(w.containers, container.Summary{
		ID: long("8"), Names: []string{"/report"}, State: container.StateExited, Mounts: []container.MountPoint{{Type: mount.TypeVolume, Name: "db"}, {Type: mount.TypeVolume, Name: "files10"}},
	})
	w.shelf = s
	s.server = w.newServer(control.VolumeService)
	s.server.SetVolumes(s)
	w.install("berth-vol:latest", pluginID(volID), true, "volumedriver", s.server)
	return w
}

func (s *shelf) do(req any) error {
	if s.fail == nil {
		s.got = append(s.got, req)
	}
	return s.fail
}

func (s *shelf) find(name string) (control.Volume, error) {
	v, ok := s.volumes[name]
	if !ok {
		return v, fault.NotFound("volume %s not found", name)
	}
	return v, nil
}

func (s *shelf) Volumes(context.Context) ([]control.Volume, error) {
	var list []control.Volume
	for _, name := range slices.Sorted(maps.Keys(s.volumes)) {
		list = append(list, s.volumes[name])
	}
	return list, s.fail
}

func (s *shelf) Volume(_ context.Context, name string) (control.Volume, error) {
	v, err := s.find(name)
	for _, snapshot := range s.snapshots {
		if snapshot.Volume == name {
			v.Snapshots = append(v.Snapshots, snapshot)
		}
	}
	return v, err
}

func (s *shelf) CloneVolume(_ context.Context, req control.CloneRequest, progress func(control.Progress)) (control.Volume, error) {
	v, err := s.find(req.Volume)
	if err != nil {
		return v, err
	}
	progress(control.Progress{Bytes: 1, TotalBytes: 2})
	v.Name = req.Name
	return v, s.do(req)
}

func (s *shelf) RollbackVolume(_ context.Context, req control.RollbackRequest, _ func(control.Progress)) (control.Rollback, error) {
	v, err := s.find(req.Volume)
	if err != nil {
		return control.Rollback{}, err
	}
	return control.Rollback{Volume: v, Kept: control.Snapshot{Volume: req.Volume, Name: "rollback-1"}}, s.do(req)
}

func (s *shelf) RenameVolume(_ context.Context, req control.RenameRequest) (control.Volume, error) {
	v, err := s.find(req.Volume)
	if err != nil {
		return v, err
	}
	delete(s.volumes, req.Volume)
	delete(s.docker, req.Volume)
	v.Name = req.Name
	s.volumes[req.Name] = v
	return v, s.do(req)
}

func (s *shelf) ResizeVolume(_ context.Context, req control.ResizeRequest, _ func(control.Progress)) (control.Volume, error) {
	v, err := s.find(req.Volume)
	if err != nil {
		return v, err
	}
	return v, s.do(req)
}

func (s *shelf) VolumeUsage(context.Context, control.UsageRequest, func(control.Progress)) (control.UsageReport, error) {
	return s.usage, s.fail
}

func (s *shelf) AdoptVolume(_ context.Context, req control.AdoptRequest, _ func(control.Progress)) (control.Volume, error) {
	return control.Volume{Name: req.Name}, s.do(req)
}

func (s *shelf) UpdateVolume(_ context.Context, req control.UpdateRequest) (control.Volume, error) {
	v, err := s.find(req.Volume)
	if err != nil {
		return v, err
	}
	return v, s.do(req)
}

func (s *shelf) CreateSnapshot(ctx context.Context, req control.SnapshotRequest, _ func(control.Progress)) (control.Snapshot, error) {
	if _, err := s.find(req.Volume); err != nil {
		return control.Snapshot{}, err
	}
	if s.during != nil {
		if err := s.during(ctx); err != nil {
			return control.Snapshot{}, err
		}
	}
	made := control.Snapshot{Volume: req.Volume, Name: req.Name, Unstable: 2, Consistency: control.ConsistencyNone}
	if req.Name == "" {
		made.Name = "20261128T190000Z"
	}
	if req.Paused {
		made.Unstable, made.Consistency = 0, control.ConsistencyPaused
	}
	s.snapshots = append(s.snapshots, made)
	return made, s.do(req)
}

func (s *shelf) Snapshots(_ context.Context, name string) (found []control.Snapshot, _ error) {
	if name != "" {
		if _, err := s.find(name); err != nil {
			return nil, err
		}
	}
	for _, snapshot := range s.snapshots {
		if name == "" || snapshot.Volume == name {
			found = append(found, snapshot)
		}
	}
	return found, s.fail
}

func (s *shelf) RemoveSnapshot(_ context.Context, ref control.SnapshotRef, _ func(control.Progress)) error {
	i := slices.IndexFunc(s.snapshots, func(have control.Snapshot) bool { return refOf(have) == ref.String() })
	if i < 0 {
		return fault.NotFound("volume %s has no snapshot %s", ref.Volume, ref.Name)
	}
	s.snapshots = slices.Delete(s.snapshots, i, i+1)
	return s.do(ref)
}

func (s *shelf) PruneSnapshots(_ context.Context, req control.PruneSnapshotsRequest, _ func(control.Progress)) (report control.PruneSnapshotsReport, _ error) {
	for _, snapshot := range s.snapshots {
		if (req.Volume == "" || snapshot.Volume == req.Volume) && (req.All || snapshot.Origin == control.SnapshotSchedule) {
			report.Removed = append(report.Removed, snapshot)
		}
	}
	return report, s.do(req)
}

func (s *shelf) Trash(context.Context) ([]control.TrashEntry, error) { return s.trash, s.fail }

func (s *shelf) RestoreTrash(_ context.Context, req control.RestoreTrashRequest) (control.Volume, error) {
	for _, e := range s.trash {
		if e.UUID == req.UUID {
			name := e.Name
			if req.Name != "" {
				name = req.Name
			}
			return control.Volume{Name: name}, s.do(req)
		}
	}
	return control.Volume{}, fault.NotFound("%s is not in the trash", req.UUID)
}

func (s *shelf) PurgeTrash(_ context.Context, req control.PurgeTrashRequest, _ func(control.Progress)) (report control.PurgeTrashReport, _ error) {
	for _, e := range s.trash {
		switch {
		case !slices.Contains(req.UUIDs, e.UUID):
		case e.Deleting:
			report.Failed = map[string]string{e.UUID: "it is busy"}
		default:
			report.Purged = append(report.Purged, e)
		}
	}
	return report, s.do(req)
}

func (s *shelf) Findings(context.Context) []control.Finding { return nil }

// What Docker does with containers and volumes, beside what it tells.

func (w *world) containerOf(id string) (*container.Summary, error) {
	for i := range w.containers {
		if w.containers[i].ID == id {
			return &w.containers[i], w.apiErr
		}
	}
	return nil, fault.NotFound("no such container: %s", id)
}

func (w *world) ContainerInspect(_ context.Context, id string) (container.InspectResponse, error) {
	c, err := w.containerOf(id)
	if err != nil {
		return container.InspectResponse{}, err
	}
	state := &container.State{
		Running: c.State == container.StateRunning || c.State == container.StatePaused, Paused: c.State == container.StatePaused, StartedAt: "2026-11-28T12:00:00Z",
	}
	return container.InspectResponse{ContainerJSONBase: &container.ContainerJSONBase{ID: id, State: state}}, nil
}

func (w *world) ContainerPause(_ context.Context, id string) error {
	return w.turn(id, container.StateRunning, container.StatePaused)
}

func (w *world) ContainerUnpause(_ context.Context, id string) error {
	return w.turn(id, container.StatePaused, container.StateRunning)
}

func (w *world) turn(id, from, to string) error {
	c, err := w.containerOf(id)
	if err != nil {
		return err
	}
	if c.State != from {
		return fault.Conflict("container %s is %s", id, c.State)
	}
	c.State = to
	return nil
}

func (w *world) VolumeInspect(_ context.Context, name string) (volume.Volume, error) {
	if w.apiErr != nil {
		return volume.Volume{}, w.apiErr
	}
	v, ok := w.shelf.docker[name]
	if !ok {
		w.shelf.forgot = append(w.shelf.forgot, name)
		return v, fault.NotFound("get %s: no such volume", name)
	}
	return v, nil
}

func (w *world) VolumeRemove(_ context.Context, name string, force bool) error {
	for _, c := range w.containers {
		if slices.ContainsFunc(c.Mounts, func(m container.MountPoint) bool { return m.Name == name }) {
			return fault.Conflict("volume is in use - [%s]", c.ID)
		}
	}
	if force {
		return fmt.Errorf("forced removal of %s", name)
	}
	delete(w.shelf.docker, name)
	delete(w.shelf.volumes, name)
	w.shelf.gone = append(w.shelf.gone, name)
	return nil
}

// words splits a command line; a word with spaces is written with underscores.
func words(line string) []string {
	list := strings.Fields(line)
	for i := range list {
		list[i] = strings.ReplaceAll(list[i], "_", " ")
	}
	return list
}

// onTerminal is a Docker whose errors go to a terminal.
type onTerminal struct {
	*world
	screen *terminal
}

func (d onTerminal) Err() io.Writer { return d.screen }
