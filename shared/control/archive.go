package control

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// Values of ExportRequest.Compress.
const (
	CompressZstd = "zstd"
	CompressNone = "none"
)

// An ExportRequest asks for a volume as an archive.
type ExportRequest struct {
	// Volume is exported from a snapshot that is made for it, or from Snapshot unless
	// that is "".
	Volume   string
	Snapshot string `json:",omitempty"`
	// Compress is CompressZstd, also when it is "", or CompressNone.
	Compress string `json:",omitempty"`
}

// An Export is what an archive has.
type Export struct {
	Volume string
	// Time and Consistency are those of the snapshot.
	Time        time.Time
	Consistency Consistency
	Files       uint64
	Bytes       uint64
	// Missing names files that could not be read, with the reasons. The list may be cut,
	// MissingCount is not.
	Missing      []string `json:",omitempty"`
	MissingCount uint64   `json:",omitempty"`
}

// An ImportRequest asks for a volume with the content of an archive.
type ImportRequest struct {
	// Name of the volume, which must be free.
	Name string
	// Strip is how many leading components of the paths are cut off in an archive that
	// is not of a volume of Berth's.
	Strip int `json:",omitempty"`
	// Options of the volume, beside those that an archive of Berth's has for it.
	Options map[string]string `json:",omitempty"`
}

// A ConvoyRequest asks for a volume with the data of a backup that convoy has made.
type ConvoyRequest struct {
	// Name of the volume, which must be free.
	Name string
	// Directory that has convoy's store, as the daemon sees it.
	Directory string
	// Volume and Backup are convoy's names. "" is all; it is invalid when several are
	// left, and the error lists them.
	Volume string `json:",omitempty"`
	Backup string `json:",omitempty"`
	// Options of the volume.
	Options map[string]string `json:",omitempty"`
}

// An Import is what came of an archive.
type Import struct {
	Volume Volume
	// Files and Bytes of the data.
	Files uint64
	Bytes uint64
	// Lost counts extended attributes that the file system of the volume cannot store.
	// LostSome names files that had them; it may be cut.
	Lost     uint64   `json:",omitempty"`
	LostSome []string `json:",omitempty"`
	// Missing counts files that were not complete when the archive was made, and are
	// not in it.
	Missing uint64 `json:",omitempty"`
}

func (r ExportRequest) check() error {
	switch r.Compress {
	case "", CompressZstd, CompressNone:
	default:
		return fault.Invalid("Compress %.40q: want %s or %s", r.Compress, CompressZstd, CompressNone)
	}
	return cmp.Or(wantName("Volume", r.Volume), optionalName("Snapshot", r.Snapshot))
}
func (r ExportRequest) told() (what, object string) { return "volume exported", r.Volume }

func (r ImportRequest) check() error {
	if r.Strip < 0 {
		return fault.Invalid("Strip %d: want 0 or more", r.Strip)
	}
	return wantName("Name", r.Name)
}
func (r ImportRequest) told() (what, object string) { return "volume imported", r.Name }

func (r ConvoyRequest) check() error {
	if err := cmp.Or(wantName("Name", r.Name), wantText("Directory", r.Directory)); err != nil {
		return err
	}
	if !path.IsAbs(r.Directory) {
		return fault.Invalid("Directory %.200q: want an absolute path", r.Directory)
	}
	return cmp.Or(optionalName("Volume", r.Volume), optionalName("Backup", r.Backup))
}

func (r ConvoyRequest) told() (what, object string) {
	return "volume imported from convoy's backups in " + r.Directory, r.Name
}

// requestKey is the key of the query that has the ImportRequest, as JSON. The body is the
// archive.
const requestKey = "request"

// bufferSize is how much of an archive is sent at once, in bytes.
const bufferSize = 128 << 10

func (s *Server) routeArchives() {
	long(s, pathConvoy, VolumeAdmin.ImportConvoy)
	s.handleLong(pathExport, func(w http.ResponseWriter, r *http.Request) {
		if err := readBody(w, r); err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		// Who does not take more of an archive may have to make room for it first.
		s.answer(w, r, exportTimeout, func(r *http.Request, out io.Writer, progress func(Progress)) (any, error) {
			return obey(s, r, func(v VolumeAdmin, ctx context.Context, req ExportRequest) (Export, error) {
				buffer := bufio.NewWriterSize(out, bufferSize)
				done, err := v.ExportVolume(ctx, req, buffer, progress)
				if err == nil {
					err = buffer.Flush()
				}
				return done, err
			})
		})
	})
	s.handleLong(pathImport, func(w http.ResponseWriter, r *http.Request) {
		// Progress is told while the archive comes in.
		_ = http.NewResponseController(w).EnableFullDuplex() // not every connection has to be told
		archive, cut, end := receive(w, r.Body)
		defer end()
		r.Body = io.NopCloser(strings.NewReader(r.URL.Query().Get(requestKey)))
		s.answer(w, r, writeTimeout, func(r *http.Request, _ io.Writer, progress func(Progress)) (any, error) {
			// Whatever waits for more of the archive ends with the call.
			defer context.AfterFunc(r.Context(), func() { cut(context.Cause(r.Context())) })()
			return obey(s, r, func(v VolumeAdmin, ctx context.Context, req ImportRequest) (Import, error) {
				return v.ImportVolume(ctx, req, archive, progress)
			})
		})
	})
}

// drainTime is how long a client may go on with sending after the answer. It would not
// see an answer whose connection is closed against it.
const drainTime = 5 * time.Second

// receive returns what reads body until it is cut with an error, or end is called; body
// is read on after that, so that the client gets to the answer. end returns when nobody
// reads body any more.
func receive(w http.ResponseWriter, body io.Reader) (archive io.Reader, cut func(error), end func()) {
	from, to := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := io.Copy(to, body)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errCutOff
		}
		_ = to.CloseWithError(err) // never fails
		_, _ = io.Copy(io.Discard, body)
	}()
	cut = func(err error) { _ = to.CloseWithError(err) } // never fails
	return from, cut, func() {
		_ = from.Close() // never fails
		conn := http.NewResponseController(w)
		_ = conn.Flush() // the answer
		limit := time.AfterFunc(drainTime, func() { _ = conn.SetReadDeadline(time.Now()) })
		defer limit.Stop()
		<-done
	}
}

// errCutOff is why no more of an archive comes in.
var errCutOff = fmt.Errorf("the sender has gone in the middle: %w", io.ErrUnexpectedEOF)

// ExportVolume is BackupAdmin.ExportVolume. What is in w is whole only when there is no
// error.
func (c *Client) ExportVolume(ctx context.Context, req ExportRequest, w io.Writer, progress func(Progress)) (export Export, _ error) {
	text, err := json.Marshal(req)
	if err != nil {
		return export, fmt.Errorf("encode %T: %w", req, err)
	}
	return export, c.listen(ctx, pathExport, bytes.NewReader(text), &export, w, progress)
}

// ImportVolume is BackupAdmin.ImportVolume. It may return while a Read of archive has not
// returned yet.
func (c *Client) ImportVolume(ctx context.Context, req ImportRequest, archive io.Reader, progress func(Progress)) (done Import, _ error) {
	text, err := json.Marshal(req)
	if err != nil {
		return done, fmt.Errorf("encode %T: %w", req, err)
	}
	body := &upload{r: archive}
	query := "?" + url.Values{requestKey: {string(text)}}.Encode()
	err = c.listen(ctx, pathImport+query, body, &done, nil, progress)
	if cause := body.err.Load(); cause != nil {
		return done, fmt.Errorf("read the archive: %w", *cause)
	}
	return done, err
}

// ImportConvoy is BackupAdmin.ImportConvoy.
func (c *Client) ImportConvoy(ctx context.Context, req ConvoyRequest, progress func(Progress)) (done Import, _ error) {
	return done, c.follow(ctx, pathConvoy, req, &done, progress)
}

// An upload is the body of a request, and keeps the error that ended it.
type upload struct {
	r   io.Reader
	err atomic.Pointer[error]
}

// Read implements io.Reader.
func (u *upload) Read(buf []byte) (int, error) {
	n, err := u.r.Read(buf)
	if err != nil && !errors.Is(err, io.EOF) {
		u.err.Store(&err)
	}
	return n, err
}
