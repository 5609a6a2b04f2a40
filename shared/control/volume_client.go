package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// silence is how long a daemon may say nothing during a call that takes long.
const silence = 6 * heartbeat

// errSilent ends a call whose daemon hangs.
var errSilent = errors.New("the daemon gives no sign of life")

// Volumes is VolumeAdmin.Volumes.
func (c *Client) Volumes(ctx context.Context) (volumes []Volume, _ error) {
	return volumes, c.call(ctx, http.MethodGet, pathVolumes, nil, &volumes)
}

// Volume is VolumeAdmin.Volume.
func (c *Client) Volume(ctx context.Context, name string) (volume Volume, _ error) {
	// "." and ".." would be another path.
	if err := wantName("volume name", name); err != nil {
		return volume, err
	}
	return volume, c.call(ctx, http.MethodGet, pathVolumes+"/"+url.PathEscape(name), nil, &volume)
}

// CloneVolume is VolumeAdmin.CloneVolume. Here and in what follows progress is called
// from the caller's goroutine and may be nil, and a ctx that ends undoes the call.
func (c *Client) CloneVolume(ctx context.Context, req CloneRequest, progress func(Progress)) (volume Volume, _ error) {
	return volume, c.follow(ctx, pathClone, req, &volume, progress)
}

// RollbackVolume is VolumeAdmin.RollbackVolume.
func (c *Client) RollbackVolume(ctx context.Context, req RollbackRequest, progress func(Progress)) (done Rollback, _ error) {
	return done, c.follow(ctx, pathRollback, req, &done, progress)
}

// RenameVolume is VolumeAdmin.RenameVolume.
func (c *Client) RenameVolume(ctx context.Context, req RenameRequest) (volume Volume, _ error) {
	return volume, c.call(ctx, http.MethodPost, pathRename, req, &volume)
}

// ResizeVolume is VolumeAdmin.ResizeVolume.
func (c *Client) ResizeVolume(ctx context.Context, req ResizeRequest, progress func(Progress)) (volume Volume, _ error) {
	return volume, c.follow(ctx, pathResize, req, &volume, progress)
}

// VolumeUsage is VolumeAdmin.VolumeUsage.
func (c *Client) VolumeUsage(ctx context.Context, req UsageRequest, progress func(Progress)) (report UsageReport, _ error) {
	return report, c.follow(ctx, pathUsage, req, &report, progress)
}

// AdoptVolume is VolumeAdmin.AdoptVolume.
func (c *Client) AdoptVolume(ctx context.Context, req AdoptRequest, progress func(Progress)) (volume Volume, _ error) {
	return volume, c.follow(ctx, pathAdopt, req, &volume, progress)
}

// UpdateVolume is VolumeAdmin.UpdateVolume.
func (c *Client) UpdateVolume(ctx context.Context, req UpdateRequest) (volume Volume, _ error) {
	return volume, c.call(ctx, http.MethodPost, pathUpdate, req, &volume)
}

// CreateSnapshot is VolumeAdmin.CreateSnapshot.
func (c *Client) CreateSnapshot(ctx context.Context, req SnapshotRequest, progress func(Progress)) (snapshot Snapshot, _ error) {
	return snapshot, c.follow(ctx, pathSnapshot, req, &snapshot, progress)
}

// Snapshots is VolumeAdmin.Snapshots.
func (c *Client) Snapshots(ctx context.Context, volume string) (snapshots []Snapshot, _ error) {
	path := pathSnapshots
	if volume != "" {
		path += "?" + url.Values{"volume": {volume}}.Encode()
	}
	return snapshots, c.call(ctx, http.MethodGet, path, nil, &snapshots)
}

// RemoveSnapshot is VolumeAdmin.RemoveSnapshot.
func (c *Client) RemoveSnapshot(ctx context.Context, ref SnapshotRef, progress func(Progress)) error {
	return c.follow(ctx, pathUnsnapshot, ref, &struct{}{}, progress)
}

// PruneSnapshots is VolumeAdmin.PruneSnapshots.
func (c *Client) PruneSnapshots(ctx context.Context, req PruneSnapshotsRequest, progress func(Progress)) (report PruneSnapshotsReport, _ error) {
	return report, c.follow(ctx, pathPrune, req, &report, progress)
}

// Trash is VolumeAdmin.Trash.
func (c *Client) Trash(ctx context.Context) (entries []TrashEntry, _ error) {
	return entries, c.call(ctx, http.MethodGet, pathTrash, nil, &entries)
}

// RestoreTrash is VolumeAdmin.RestoreTrash.
func (c *Client) RestoreTrash(ctx context.Context, req RestoreTrashRequest) (volume Volume, _ error) {
	return volume, c.call(ctx, http.MethodPost, pathRestore, req, &volume)
}

// PurgeTrash is VolumeAdmin.PurgeTrash.
func (c *Client) PurgeTrash(ctx context.Context, req PurgeTrashRequest, progress func(Progress)) (report PurgeTrashReport, _ error) {
	return report, c.follow(ctx, pathPurge, req, &report, progress)
}

// follow sends a request whose answer may come in lines.
func (c *Client) follow(ctx context.Context, path string, request, answer any, progress func(Progress)) error {
	text, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("encode %T: %w", request, err)
	}
	return c.listen(ctx, path, bytes.NewReader(text), answer, nil, progress)
}

// listen sends a body and reads the answer, which may come in lines. What is no line in
// it goes to data; an answer must not have such unless data is there, and must have
// lines then.
func (c *Client) listen(ctx context.Context, path string, body io.Reader, answer any, data io.Writer, progress func(Progress)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(c.silence, func() { cancel(errSilent) })
	defer watch.Stop()
	failed := func(err error) error {
		if errors.Is(context.Cause(ctx), errSilent) {
			return fault.Unavailable("%s: %w", c.socket, errSilent)
		}
		return c.unreachable(err)
	}
	resp, err := c.send(ctx, http.MethodPost, path, body)
	if err != nil {
		return failed(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") != streamType {
		text, err := c.read(resp, path)
		if err == nil && data != nil {
			err = fault.Unavailable("%s: not an answer of Berth", c.socket)
		}
		if err != nil {
			return err
		}
		return c.decode(text, answer)
	}
	parts := &parts{}
	scanner := bufio.NewScanner(resp.Body)
	scanner.Buffer(make([]byte, bufferSize), maxAnswer)
	scanner.Split(parts.split)
	for scanner.Scan() {
		if parts.data {
			// Nobody is silent while who wants the data does not take it.
			watch.Stop()
			if _, err := data.Write(scanner.Bytes()); err != nil {
				return err
			}
			watch.Reset(c.silence)
			continue
		}
		watch.Reset(c.silence)
		var l line
		if err := c.decode(scanner.Bytes(), &l); err != nil {
			return err
		}
		switch {
		case l.Data < 0 || l.Data > 0 && data == nil:
			return fault.Unavailable("%s: not an answer of Berth", c.socket)
		case l.Data > 0:
			parts.left = l.Data
		case l.Kind != "":
			return ofKind(errorBody{Err: l.Err, Kind: l.Kind})
		case l.Result != nil:
			return c.decode(l.Result, answer)
		case l.Progress != nil && progress != nil:
			progress(*l.Progress)
		}
	}
	if err := scanner.Err(); err != nil {
		return failed(err)
	}
	return failed(io.ErrUnexpectedEOF)
}

// parts split an answer into lines and what comes between them.
type parts struct {
	// left is how many bytes come before the next line.
	left int
	// data says that the last part was no line.
	data bool
}

// split is a bufio.SplitFunc.
func (p *parts) split(text []byte, atEOF bool) (advance int, part []byte, err error) {
	if p.left == 0 {
		p.data = false
		return bufio.ScanLines(text, atEOF)
	}
	n := min(p.left, len(text))
	if n == 0 {
		return 0, nil, nil
	}
	p.data = true
	p.left -= n
	return n, text[:n], nil
}
