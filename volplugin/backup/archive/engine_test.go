package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/archive"
	"github.com/berth-plugin/berth/volplugin/backup/backuptest"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func open(t testing.TB, target backup.Target) backup.Engine {
	t.Helper()
	target.Name, target.Engine = "test", backup.Archive
	e, err := archive.New(target)
	assert.NilError(t, err)
	return e
}

func TestConformanceLocal(t *testing.T) {
	backuptest.Run(t, func(t testing.TB) backuptest.Repository {
		dir := filepath.Join(t.TempDir(), "yet")
		return backuptest.Repository{
			Open: func(t testing.TB) backup.Engine { return open(t, backup.Target{Repository: dir}) },
			Damage: func(t testing.TB) {
				all, err := filepath.Glob(filepath.Join(dir, "*/*.tar.zst"))
				assert.NilError(t, err)
				assert.Equal(t, len(all), 1)
				text, err := os.ReadFile(all[0])
				assert.NilError(t, err)
				text[len(text)/2] ^= 1
				assert.NilError(t, os.WriteFile(all[0], text, 0o600))
			},
			Stray: func(t testing.TB) { stray(t, dir) },
			Plant: func(t testing.TB, entries []backuptest.Entry) string { return plant(t, dir, entries) },
		}
	})
}

// stray leaves in a repository what is no backup.
func stray(t testing.TB, dir string) {
	t.Helper()
	id := strings.Repeat("0123", 8)
	for name, text := range map[string]string{
		"README": "x", "vol/notes.json": "{}", "vol/" + id + ".json": "{}", "vol/sub/" + id + ".json": "{}", ".hidden/" + id + ".json": "{}",
		"vol/" + strings.Repeat("4567", 8) + ".tar.zst": "no archive", "odd name/" + id + ".json": "{}",
		"other/" + id + ".json": `{"schema":1,"id":"` + id + `","volume":"vol","size":1,"sha256":"` + strings.Repeat("0", 64) + `"}`,
	} {
		path := filepath.Join(dir, name)
		assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		assert.NilError(t, os.WriteFile(path, []byte(text), 0o644))
	}
	assert.NilError(t, unix.Mkfifo(filepath.Join(dir, "vol", strings.Repeat("89ab", 8)+".json"), 0o600))
	assert.NilError(t, os.Symlink("/", filepath.Join(dir, "away")))
	assert.NilError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "vol", strings.Repeat("cdef", 8)+".json")))
}

// plant stores an archive that no Berth has made.
func plant(t testing.TB, dir string, entries []backuptest.Entry) (id string) {
	t.Helper()
	manifest, err := backup.Manifest{Volume: "hostile"}.Encode()
	assert.NilError(t, err)
	var b bytes.Buffer
	z, err := tarball.Compress(&b)
	assert.NilError(t, err)
	w := tar.NewWriter(z)
	put := func(h tar.Header, text string) {
		h.Format, h.Mode = tar.FormatPAX, 0o777
		assert.NilError(t, w.WriteHeader(&h))
		_, err := w.Write([]byte(text))
		assert.NilError(t, err)
	}
	put(tar.Header{Name: backup.ManifestName, Typeflag: tar.TypeReg, Size: int64(len(manifest))}, string(manifest))
	for _, e := range entries {
		switch e.Type {
		case unix.S_IFREG:
			put(tar.Header{Name: e.Name, Typeflag: tar.TypeReg, Size: int64(len(e.Text))}, e.Text)
		case unix.S_IFDIR:
			put(tar.Header{Name: e.Name + "/", Typeflag: tar.TypeDir}, "")
		case unix.S_IFLNK:
			put(tar.Header{Name: e.Name, Typeflag: tar.TypeSymlink, Linkname: e.Text}, "")
		case backuptest.HardLink:
			put(tar.Header{Name: e.Name, Typeflag: tar.TypeLink, Linkname: e.Text}, "")
		}
	}
	assert.NilError(t, w.Close())
	assert.NilError(t, z.Close())
	id = fmt.Sprintf("%x", sha256.Sum256(b.Bytes()))[:32]
	record, err := json.Marshal(map[string]any{
		"schema": 1, "id": id, "volume": "hostile", "files": len(entries), "size": b.Len(), "sha256": fmt.Sprintf("%x", sha256.Sum256(b.Bytes())),
	})
	assert.NilError(t, err)
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "hostile"), 0o700))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "hostile", id+".tar.zst"), b.Bytes(), 0o600))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "hostile", id+".json"), record, 0o600))
	return id
}

// server runs an S3 server until the test ends.
func server(t testing.TB, options ...gofakes3.Option) (url string, backend gofakes3.Backend) {
	t.Helper()
	backend = s3mem.New()
	s := httptest.NewServer(gofakes3.New(backend, options...).Server())
	t.Cleanup(s.Close)
	return s.URL, backend
}

func s3(url string) backup.Target {
	return backup.Target{
		Repository:  "s3:" + url + "/bucket/some/prefix",
		Environment: map[string]string{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"},
	}
}

func TestConformanceS3(t *testing.T) {
	backuptest.Run(t, func(t testing.TB) backuptest.Repository {
		url, backend := server(t)
		return backuptest.Repository{
			Open: func(t testing.TB) backup.Engine { return open(t, s3(url)) },
			Damage: func(t testing.TB) {
				list, err := backend.ListBucket("bucket", nil, gofakes3.ListBucketPage{})
				assert.NilError(t, err)
				for _, o := range list.Contents {
					if strings.HasSuffix(o.Key, ".tar.zst") {
						text := bytes.Repeat([]byte{'x'}, int(o.Size))
						_, err := backend.PutObject("bucket", o.Key, map[string]string{}, bytes.NewReader(text), o.Size, nil)
						assert.NilError(t, err)
					}
				}
			},
		}
	})
}

// source makes one with a file of some MB.
func source(t testing.TB) backup.Source {
	t.Helper()
	dir := t.TempDir()
	s := backup.Source{Dir: dir, Volume: "vol", UUID: "u", Host: "h", Time: time.Unix(1000, 0)}
	manifest, err := backup.Manifest{Volume: "vol"}.Encode()
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(dir, backup.ManifestName), manifest, 0o600))
	assert.NilError(t, os.Mkdir(filepath.Join(dir, backup.DataName), 0o700))
	content := make([]byte, 4<<20)
	_, err = unix.Getrandom(content, 0)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(dir, backup.DataName, "file"), content, 0o600))
	return s
}

// What a kill leaves is never listed, and Prune removes it when it is a day old.
func TestWhatWasNotCompletedIsSwept(t *testing.T) {
	dir := t.TempDir()
	e := open(t, backup.Target{Repository: dir})
	assert.NilError(t, e.Init(t.Context()))
	kept, err := e.Backup(t.Context(), source(t), nil)
	assert.NilError(t, err)
	old := time.Now().Add(-25 * time.Hour)
	left := map[string]bool{
		strings.Repeat("a", 32) + ".tar.zst": false, "." + strings.Repeat("a", 32) + ".tar.zst.X.part": false,
		strings.Repeat("b", 32) + ".tar.zst": true, "." + strings.Repeat("b", 32) + ".tar.zst.X.part": true,
		kept.ID + ".tar.zst": true, kept.ID + ".json": true, "notes.txt": true,
	}
	for name := range left {
		path := filepath.Join(dir, "vol", name)
		if !strings.HasPrefix(name, kept.ID) {
			assert.NilError(t, os.WriteFile(path, []byte("x"), 0o600))
		}
		if !strings.Contains(name, "bbb") {
			assert.NilError(t, os.Chtimes(path, old, old))
		}
	}
	assert.NilError(t, e.Prune(t.Context(), nil))
	for name, want := range left {
		_, err := os.Stat(filepath.Join(dir, "vol", name))
		assert.Equal(t, err == nil, want, "%s: %v", name, err)
	}
	all, err := e.List(t.Context(), backup.Filter{})
	assert.NilError(t, err)
	assert.Equal(t, len(all), 1)
}

// The same of uploads to a server, whose clock says what is old.
func TestUploadsThatWereNotCompletedAreSwept(t *testing.T) {
	for ago, want := range map[time.Duration]int{25 * time.Hour: 0, time.Hour: 1} {
		clock := gofakes3.FixedTimeSource(time.Now().Add(-ago))
		url, _ := server(t, gofakes3.WithTimeSource(clock), gofakes3.WithTimeSkewLimit(0))
		e := open(t, s3(url))
		assert.NilError(t, e.Init(t.Context()))
		client, err := minio.NewCore(strings.TrimPrefix(url, "http://"), &minio.Options{Creds: credentials.NewStaticV4("key", "secret", ""), Region: "us-east-1"})
		assert.NilError(t, err)
		begin := func(key string) {
			t.Helper()
			_, err := client.NewMultipartUpload(t.Context(), "bucket", key, minio.PutObjectOptions{})
			assert.NilError(t, err)
		}
		count := func(prefix string) (n int) {
			t.Helper()
			for upload := range client.ListIncompleteUploads(t.Context(), "bucket", prefix, true) {
				if upload.Err == nil {
					n++
				}
			}
			return n
		}
		begin("some/prefix/vol/x.tar.zst")
		begin("other/prefix/x")
		assert.NilError(t, e.Prune(t.Context(), nil))
		assert.Equal(t, count("some/prefix/"), want)
		assert.Equal(t, count("other/prefix/"), 1, "what belongs to others was removed")

		// One that fails is not left.
		ctx, cancel := context.WithCancel(t.Context())
		_, err = e.Backup(ctx, source(t), func(backup.Progress) { cancel() })
		cancel()
		assert.ErrorIs(t, err, context.Canceled)
		assert.Equal(t, count("some/prefix/"), want)
	}
}

func TestAFailureLeavesNothing(t *testing.T) {
	dir := mounttest.Tmpfs(t, 1<<20)
	e := open(t, backup.Target{Repository: dir})
	assert.NilError(t, e.Init(t.Context()))
	_, err := e.Backup(t.Context(), source(t), nil)
	assert.ErrorIs(t, err, unix.ENOSPC)
	assert.NilError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if !entry.IsDir() && entry.Name() != "berth-archive.json" {
			t.Errorf("%s is left", path)
		}
		return err
	}))
}

func TestLimitsOfSpeedLetAllThrough(t *testing.T) {
	big := open(t, backup.Target{Repository: t.TempDir(), UploadLimit: 1 << 20, DownloadLimit: 1 << 20})
	assert.NilError(t, big.Init(t.Context()))
	result, err := big.Backup(t.Context(), source(t), nil)
	assert.NilError(t, err)
	_, err = big.Restore(t.Context(), backup.Backup{ID: result.ID}, t.TempDir(), nil, nil)
	assert.NilError(t, err)
}

func TestWrongTargetsAreRefused(t *testing.T) {
	env := map[string]string{"AWS_ACCESS_KEY_ID": "key-id", "AWS_SECRET_ACCESS_KEY": "top-secret"}
	for repository, want := range map[string]string{
		"s3:https://host": "want s3:https://HOST", "s3:https://": "want s3:https://HOST", "s3:ftp://host/b": "want s3:https://HOST", "s3:https://u:hush-hush@host/b": "has a user",
		"s3:https://host/b?x=1": "not used", "relative": "absolute path", "sftp:h:/x": "one of s3",
	} {
		target := backup.Target{Name: "t", Engine: backup.Archive, Repository: repository, Environment: env}
		_, err := archive.New(target)
		assert.ErrorContains(t, err, want, repository)
		assert.Assert(t, !strings.Contains(err.Error(), "secret") && !strings.Contains(err.Error(), "hush"), "%v", err)
	}
	_, err := archive.New(backup.Target{Name: "t", Engine: backup.Archive, Repository: "s3:host/b"})
	assert.ErrorContains(t, err, "AWS_ACCESS_KEY_ID")
	_, err = archive.New(backup.Target{Name: "t", Repository: "/x", Password: "p"})
	assert.ErrorContains(t, err, "restic")
}

// The directory above may be a disk that is not mounted.
func TestARepositoryIsNotMadeWhereNothingIs(t *testing.T) {
	dir := t.TempDir()
	err := open(t, backup.Target{Repository: filepath.Join(dir, "nas", "repository")}).Init(t.Context())
	assert.ErrorContains(t, err, "is its disk mounted?")
	_, err = os.Stat(filepath.Join(dir, "nas"))
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

func TestNoServerIsNoMissingRepository(t *testing.T) {
	target := s3("http://127.0.0.1:1")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := open(t, target).List(ctx, backup.Filter{})
	assert.Assert(t, err != nil)
	assert.Assert(t, !strings.Contains(err.Error(), "secret"))
	assert.Assert(t, !errors.Is(err, backup.ErrNoRepository), "%v", err)
}
