package control

import (
	"cmp"
	"context"
	"net/http"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

// SetVolumes tells that the volume service is ready.
func (s *Server) SetVolumes(v VolumeAdmin) {
	s.mu.Lock()
	s.volume = v
	s.mu.Unlock()
	s.setState(VolumeService, ServiceReady, "")
}

// volumes returns the volume service, or why there is none.
func (s *Server) volumes() (VolumeAdmin, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.volume != nil {
		return s.volume, nil
	}
	for _, service := range s.info.Services {
		if service.Name != VolumeService {
			continue
		}
		if service.State == ServiceRefusing {
			return nil, fault.Unavailable("the volume service cannot start: %s", service.Reason)
		}
		return nil, fault.Unavailable("the volume service is still starting; try again")
	}
	return nil, fault.Unavailable("this Berth daemon serves no volumes")
}

func (s *Server) routeVolumes() {
	get := func(path string, serve func(context.Context, VolumeAdmin, *http.Request) (any, error)) {
		s.handle(http.MethodGet, path, func(r *http.Request) (any, error) {
			v, err := s.volumes()
			if err != nil {
				return nil, err
			}
			return serve(r.Context(), v, r)
		})
	}
	get(pathVolumes, func(ctx context.Context, v VolumeAdmin, _ *http.Request) (any, error) { return list(v.Volumes(ctx)) })
	get(pathVolumes+"/{name}", func(ctx context.Context, v VolumeAdmin, r *http.Request) (any, error) {
		return v.Volume(ctx, r.PathValue("name"))
	})
	get(pathSnapshots, func(ctx context.Context, v VolumeAdmin, r *http.Request) (any, error) {
		return list(v.Snapshots(ctx, r.URL.Query().Get("volume")))
	})
	get(pathTrash, func(ctx context.Context, v VolumeAdmin, _ *http.Request) (any, error) { return list(v.Trash(ctx)) })

	short(s, pathRename, VolumeAdmin.RenameVolume)
	short(s, pathUpdate, VolumeAdmin.UpdateVolume)
	short(s, pathRestore, VolumeAdmin.RestoreTrash)

	long(s, pathClone, VolumeAdmin.CloneVolume)
	long(s, pathRollback, VolumeAdmin.RollbackVolume)
	long(s, pathResize, VolumeAdmin.ResizeVolume)
	long(s, pathUsage, VolumeAdmin.VolumeUsage)
	long(s, pathAdopt, VolumeAdmin.AdoptVolume)
	long(s, pathSnapshot, VolumeAdmin.CreateSnapshot)
	long(s, pathUnsnapshot, func(v VolumeAdmin, ctx context.Context, ref SnapshotRef, progress func(Progress)) (struct{}, error) {
		return struct{}{}, v.RemoveSnapshot(ctx, ref, progress)
	})
	long(s, pathPrune, VolumeAdmin.PruneSnapshots)
	long(s, pathPurge, VolumeAdmin.PurgeTrash)

	s.routeBackups(get)
}

// An order is a request that is checked before the service gets it.
type order interface {
	// check finds what no service could make sense of. The error is invalid.
	check() error
	// told is what the log says when it was done, and of which object; "" is nothing.
	told() (what, object string)
}

// short adds a call that has a minute.
func short[Q order, A any](s *Server, path string, call func(VolumeAdmin, context.Context, Q) (A, error)) {
	s.handle(http.MethodPost, path, func(r *http.Request) (any, error) {
		return obey(s, r, func(v VolumeAdmin, ctx context.Context, req Q) (A, error) { return call(v, ctx, req) })
	})
}

// long adds a call that takes as long as it takes and tells its progress.
func long[Q order, A any](s *Server, path string, call func(VolumeAdmin, context.Context, Q, func(Progress)) (A, error)) {
	s.stream(path, func(r *http.Request, progress func(Progress)) (any, error) {
		return obey(s, r, func(v VolumeAdmin, ctx context.Context, req Q) (A, error) { return call(v, ctx, req, progress) })
	})
}

func obey[Q order, A any](s *Server, r *http.Request, call func(VolumeAdmin, context.Context, Q) (A, error)) (any, error) {
	var req Q
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	if err := req.check(); err != nil {
		return nil, err
	}
	v, err := s.volumes()
	if err != nil {
		return nil, err
	}
	answer, err := call(v, r.Context(), req)
	if err != nil {
		return nil, err
	}
	if what, object := req.told(); what != "" {
		s.log.WithFields(logrus.Fields{"volume": object}).Info(what + " by an operator")
	}
	return answer, nil
}

// maxName bounds a name on the wire, in bytes. The service has narrower rules.
const maxName = 255

// wantName checks a name of a field that must not be empty.
func wantName(field, value string) error {
	if value == "" {
		return fault.Invalid("%s is empty", field)
	}
	return optionalName(field, value)
}

func optionalName(field, value string) error {
	if len(value) > maxName || value == "." || value == ".." || strings.ContainsAny(value, "/\x00") {
		return fault.Invalid("%s %.40q: want at most %d bytes without a slash", field, value, maxName)
	}
	return nil
}

func (r CloneRequest) check() error {
	return cmp.Or(wantName("Volume", r.Volume), optionalName("Snapshot", r.Snapshot), wantName("Name", r.Name))
}
func (r CloneRequest) told() (what, object string) { return "volume cloned from " + r.Volume, r.Name }

func (r RollbackRequest) check() error {
	return cmp.Or(wantName("Volume", r.Volume), wantName("Snapshot", r.Snapshot))
}

func (r RollbackRequest) told() (what, object string) {
	return "volume rolled back to " + r.Snapshot, r.Volume
}

func (r RenameRequest) check() error {
	return cmp.Or(wantName("Volume", r.Volume), wantName("Name", r.Name))
}

func (r RenameRequest) told() (what, object string) {
	return "volume renamed to " + r.Name, r.Volume
}

func (r ResizeRequest) check() error                { return wantName("Volume", r.Volume) }
func (r ResizeRequest) told() (what, object string) { return "volume resized", r.Volume }

func (r AdoptRequest) check() error {
	err := wantName("Name", r.Name)
	switch {
	case err != nil:
		return err
	case r.Source == "" || strings.ContainsRune(r.Source, 0):
		return fault.Invalid("Source %q: want the path of a directory", r.Source)
	default:
		return nil
	}
}
func (r AdoptRequest) told() (what, object string) { return "directory adopted", r.Name }

func (r UpdateRequest) check() error {
	if len(r.Set) == 0 {
		return fault.Invalid("Set is empty: want at least one property")
	}
	return wantName("Volume", r.Volume)
}
func (r UpdateRequest) told() (what, object string) { return "volume changed", r.Volume }

func (r UsageRequest) check() error {
	for _, volume := range r.Volumes {
		if err := wantName("Volumes", volume); err != nil {
			return err
		}
	}
	return nil
}
func (r UsageRequest) told() (what, object string) { return "", "" }

func (r SnapshotRequest) check() error {
	return cmp.Or(wantName("Volume", r.Volume), optionalName("Name", r.Name))
}
func (r SnapshotRequest) told() (what, object string) { return "snapshot made", r.Volume }

func (r SnapshotRef) check() error {
	return cmp.Or(wantName("Volume", r.Volume), wantName("Name", r.Name))
}
func (r SnapshotRef) told() (what, object string) { return "snapshot removed", r.String() }

// String is VOLUME@NAME, as users write it.
func (r SnapshotRef) String() string { return r.Volume + "@" + r.Name }

func (r PruneSnapshotsRequest) check() error { return optionalName("Volume", r.Volume) }

func (r PruneSnapshotsRequest) told() (what, object string) {
	if r.DryRun {
		return "", ""
	}
	return "snapshots pruned", r.Volume
}

func (r RestoreTrashRequest) check() error {
	return cmp.Or(wantName("UUID", r.UUID), optionalName("Name", r.Name))
}
func (r RestoreTrashRequest) told() (what, object string) { return "volume restored", r.UUID }

func (r PurgeTrashRequest) check() error {
	if r.All != (len(r.UUIDs) == 0) {
		return fault.Invalid("want either UUIDs or All")
	}
	for _, id := range r.UUIDs {
		if err := wantName("UUIDs", id); err != nil {
			return err
		}
	}
	return nil
}
func (r PurgeTrashRequest) told() (what, object string) { return "trash purged", "" }
