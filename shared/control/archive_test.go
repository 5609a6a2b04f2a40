package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

func (s *shelf) ExportVolume(ctx context.Context, req ExportRequest, w io.Writer, progress func(Progress)) (Export, error) {
	if _, err := w.Write(s.archive); err != nil {
		return Export{}, err
	}
	return s.exported(), s.long(ctx, req, progress)
}

func (s *shelf) ImportVolume(ctx context.Context, req ImportRequest, archive io.Reader, progress func(Progress)) (Import, error) {
	if err := s.long(ctx, req, progress); err != nil {
		return Import{}, err
	}
	var err error
	s.archive, err = io.ReadAll(archive)
	return s.imported(), err
}

func (s *shelf) exported() Export {
	return Export{Volume: "db", Time: time.Unix(60, 0).UTC(), Consistency: ConsistencyFrozen, Files: 1, Bytes: 2, Missing: []string{"data/x: denied"}, MissingCount: 3}
}

func (s *shelf) imported() Import {
	return Import{Volume: s.volume, Files: 1, Bytes: 2, Lost: 3, LostSome: []string{"x: user.a"}, Missing: 4}
}

// large is an archive that has what lines end with, and does not fit into any buffer.
func large() []byte {
	return bytes.Repeat([]byte("{\"Result\":{}}\n\x00\r\n"), 100_000)
}

func TestExportArrivesWhole(t *testing.T) {
	service, _, client := serveVolumes(t)
	service.archive = large()
	req := ExportRequest{Volume: "db", Snapshot: "s1", Compress: CompressNone}
	for _, inLines := range []bool{false, true} {
		told := make(chan struct{})
		var once sync.Once
		if service.got, service.work = nil, nil; inLines {
			service.work = func(_ context.Context, progress func(Progress)) error {
				progress(Progress{Step: "reading", Files: 1})
				<-told
				return nil
			}
		}
		var got bytes.Buffer
		done, err := client.ExportVolume(t.Context(), req, &got, func(p Progress) {
			if p.Files == 1 {
				once.Do(func() { close(told) })
			}
		})
		assert.NilError(t, err)
		assert.DeepEqual(t, done, service.exported())
		assert.Assert(t, bytes.Equal(got.Bytes(), service.archive))
		assert.DeepEqual(t, service.got, []any{req})
	}
}

// What is not whole is told, whatever has been written by then.
func TestExportThatFails(t *testing.T) {
	service, _, client := serveVolumes(t)
	service.archive = large()
	service.fail = fault.Unavailable("the disk is gone")
	var got bytes.Buffer
	_, err := client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, &got, nil)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "the disk is gone")
	assert.Assert(t, got.Len() > 0)

	service.archive = nil
	service.fail = fault.NotFound("there is no volume db")
	got.Reset()
	_, err = client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, &got, nil)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.Equal(t, got.Len(), 0)

	for name, lines := range map[string]string{
		"killed at once":   "",
		"between parts":    `{"Data":3}` + "\nabc",
		"in a part":        `{"Data":3}` + "\nab",
		"before a part":    `{"Data":3}` + "\n",
		"other words":      "hello\n",
		"not that much":    `{"Data":-1}` + "\n",
		"in the last line": `{"Data":1}` + "\na" + `{"Result":{`,
	} {
		client := dial(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", streamType)
			_, _ = w.Write([]byte(lines))
		}))
		_, err := client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, io.Discard, nil)
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", name, err)
	}
	// An older daemon, or none at all, has exported nothing.
	client = dial(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, Export{}) }))
	_, err = client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, io.Discard, nil)
	assert.ErrorContains(t, err, "not an answer of Berth")
}

// The daemon stops with the work when nobody takes its result.
func TestExportEndsWithItsReader(t *testing.T) {
	service, server, client := serveVolumes(t)
	ended := make(chan error, 1)
	server.SetVolumes(&cutShelf{shelf: service, ended: ended})
	full := errors.New("disk full")
	_, err := client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, writerFunc(func([]byte) (int, error) { return 0, full }), nil)
	assert.ErrorIs(t, err, full)
	assert.Assert(t, <-ended != nil)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(part []byte) (int, error) { return f(part) }

// A reader that is slow is not a daemon that is silent.
func TestExportWaitsForItsReader(t *testing.T) {
	service, server, client := serveVolumes(t)
	service.archive = large()
	client.silence, server.beat = 200*time.Millisecond, time.Millisecond
	slept := false
	_, err := client.ExportVolume(t.Context(), ExportRequest{Volume: "db"}, writerFunc(func(part []byte) (int, error) {
		if !slept {
			slept = true
			time.Sleep(2 * client.silence)
		}
		return len(part), nil
	}), nil)
	assert.NilError(t, err)
}

func TestImportArrivesWhole(t *testing.T) {
	service, _, client := serveVolumes(t)
	req := ImportRequest{Name: "new ü", Strip: 2, Options: map[string]string{"label.a": "b&c=\n"}}
	for _, inLines := range []bool{false, true} {
		told := make(chan struct{})
		var once sync.Once
		if service.got, service.work = nil, nil; inLines {
			service.work = func(_ context.Context, progress func(Progress)) error {
				progress(Progress{Files: 1})
				<-told
				return nil
			}
		}
		done, err := client.ImportVolume(t.Context(), req, bytes.NewReader(large()), func(p Progress) {
			if p.Files == 1 {
				once.Do(func() { close(told) })
			}
		})
		assert.NilError(t, err)
		assert.DeepEqual(t, done, service.imported())
		assert.DeepEqual(t, service.got, []any{req})
		assert.Assert(t, bytes.Equal(service.archive, large()))
	}
}

// endless is an archive that does not end by itself.
type endless struct{}

func (endless) Read(buf []byte) (int, error) { return len(buf), nil }

// The reason arrives, though the client would have gone on with sending.
func TestImportThatIsRefused(t *testing.T) {
	service, _, client := serveVolumes(t)
	for range 20 {
		service.fail = fault.Conflict("there is a volume new")
		_, err := client.ImportVolume(t.Context(), ImportRequest{Name: "new"}, endless{}, nil)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.ErrorContains(t, err, "there is a volume new")
	}
}

// A cut archive is never taken for a whole one.
func TestImportThatIsCutOff(t *testing.T) {
	service, _, client := serveVolumes(t)
	service.work = func(context.Context, func(Progress)) error { return nil }
	broken := errors.New("no tape")
	_, err := client.ImportVolume(t.Context(), ImportRequest{Name: "new"}, io.MultiReader(bytes.NewReader(large()), iotest.ErrReader(broken)), nil)
	assert.ErrorIs(t, err, broken)
	assert.ErrorContains(t, err, "read the archive: no tape")

	// The client goes, by what ends the command or its process.
	ended := make(chan error, 1)
	service, server, client := serveVolumes(t)
	server.SetVolumes(&cutShelf{shelf: service, ended: ended})
	ctx, cancel := context.WithCancel(t.Context())
	_, err = client.ImportVolume(ctx, ImportRequest{Name: "new"}, readerFunc(func(buf []byte) (int, error) {
		cancel()
		return len(buf), nil
	}), nil)
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, <-ended != nil)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(buf []byte) (int, error) { return f(buf) }

// A cutShelf tells how the reading of an archive ended, or the writing of an endless one.
type cutShelf struct {
	*shelf
	ended chan<- error
}

func (s *cutShelf) ImportVolume(_ context.Context, _ ImportRequest, archive io.Reader, _ func(Progress)) (Import, error) {
	_, err := io.Copy(io.Discard, archive)
	s.ended <- err
	return Import{}, err
}

func (s *cutShelf) ExportVolume(_ context.Context, _ ExportRequest, w io.Writer, _ func(Progress)) (Export, error) {
	_, err := io.Copy(w, endless{})
	s.ended <- err
	return Export{}, err
}

// A daemon that ends does not wait for the rest of an archive.
func TestStopEndsImports(t *testing.T) {
	service, server, client := serveVolumes(t)
	ended := make(chan error, 1)
	server.SetVolumes(&cutShelf{shelf: service, ended: ended})
	quietly, _ := io.Pipe()
	first := strings.NewReader("begin")
	time.AfterFunc(20*time.Millisecond, server.Stop)
	_, err := client.ImportVolume(t.Context(), ImportRequest{Name: "new"}, io.MultiReader(first, quietly), nil)
	assert.ErrorContains(t, err, "berthd is stopping")
	assert.ErrorIs(t, <-ended, errStopping)
}

// Whoever speaks HTTP can import.
func TestImportByOtherClients(t *testing.T) {
	service, _, client := serveVolumes(t)
	text, err := json.Marshal(ImportRequest{Name: "new"})
	assert.NilError(t, err)
	target := "http://berth" + Prefix + version + "/" + pathImport + "?" + url.Values{requestKey: {string(text)}}.Encode()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, target, bytes.NewReader(large()))
	assert.NilError(t, err)
	resp, err := client.http.Do(req)
	assert.NilError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, resp.StatusCode, http.StatusOK)
	// With the end of the answer all is read.
	_, err = io.ReadAll(resp.Body)
	assert.NilError(t, err)
	assert.Assert(t, bytes.Equal(service.archive, large()))
}
