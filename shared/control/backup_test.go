package control

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logged "github.com/sirupsen/logrus/hooks/test"
	"gotest.tools/v3/assert"
)

func (s *shelf) AddTarget(ctx context.Context, req TargetSpec, progress func(Progress)) (TargetReport, error) {
	return s.report(), s.long(ctx, req, progress)
}

func (s *shelf) Targets(context.Context) ([]Target, error) {
	return []Target{s.target}, s.short("targets")
}

func (s *shelf) TestTarget(ctx context.Context, req TargetRef, progress func(Progress)) (TargetReport, error) {
	return s.report(), s.long(ctx, req, progress)
}

func (s *shelf) RemoveTarget(_ context.Context, req TargetRef) (struct{}, error) {
	return struct{}{}, s.short(req)
}

func (s *shelf) CreateBackup(ctx context.Context, req BackupRequest, progress func(Progress)) (Backup, error) {
	return s.backup, s.long(ctx, req, progress)
}

func (s *shelf) Backups(ctx context.Context, req BackupsRequest, progress func(Progress)) (BackupList, error) {
	return BackupList{Backups: []Backup{s.backup}, Failed: failed()}, s.long(ctx, req, progress)
}

func (s *shelf) Backup(ctx context.Context, req BackupRef, progress func(Progress)) (Backup, error) {
	return s.backup, s.long(ctx, req, progress)
}

func (s *shelf) RemoveBackups(ctx context.Context, req RemoveBackupsRequest, progress func(Progress)) (RemoveBackupsReport, error) {
	return RemoveBackupsReport{Removed: []string{s.backup.Reference}, Failed: failed()}, s.long(ctx, req, progress)
}

func (s *shelf) PruneBackups(ctx context.Context, req PruneBackupsRequest, progress func(Progress)) (PruneBackupsReport, error) {
	return PruneBackupsReport{Removed: []Backup{s.backup}, Failed: failed()}, s.long(ctx, req, progress)
}

func (s *shelf) VerifyBackups(ctx context.Context, req VerifyRequest, progress func(Progress)) (VerifyReport, error) {
	return s.verified(), s.long(ctx, req, progress)
}

func (s *shelf) RestoreBackup(ctx context.Context, req RestoreRequest, progress func(Progress)) (Restore, error) {
	return s.restored(), s.long(ctx, req, progress)
}

func (s *shelf) ImportConvoy(ctx context.Context, req ConvoyRequest, progress func(Progress)) (Import, error) {
	return s.imported(), s.long(ctx, req, progress)
}

func failed() map[string]string { return map[string]string{"nas": "no answer"} }

func (s *shelf) report() TargetReport {
	return TargetReport{Target: s.target, Took: time.Second, Backups: 2, Volumes: 1, Made: true}
}

func (s *shelf) verified() VerifyReport {
	return VerifyReport{Errors: []string{"pack 1 is damaged"}, Hint: "repair it", Backup: &s.backup}
}

func (s *shelf) restored() Restore {
	return Restore{Volume: s.volume, Backup: s.backup, Kept: &s.snapshot}
}

// backupCall is a call of the Client's that tells its progress.
func backupCall[Q, A any](path string, req Q, ask func(*Client, context.Context, Q, func(Progress)) (A, error), want func(*shelf) A) call {
	return call{path, true, req, func(ctx context.Context, c *Client, progress func(Progress)) (any, error) {
		return ask(c, ctx, req, progress)
	}, func(s *shelf) any { return want(s) }}
}

var backupCalls = []call{
	backupCall(pathTarget, TargetSpec{
		Name: "nas", Engine: "restic", Repository: "s3:https://a/b", Password: "p", Environment: map[string]string{"A": "b"},
		Files: map[string]string{"ssh-key": "k"}, UploadLimit: 1, DownloadLimit: 2, PruneSchedule: "@weekly", CheckSchedule: "never", CheckShare: 0.25, Replace: true,
	}, (*Client).AddTarget, (*shelf).report),
	backupCall(pathTestTarget, TargetRef{Name: "nas"}, (*Client).TestTarget, (*shelf).report),
	{
		pathUntarget, false, TargetRef{Name: "nas"},
		func(ctx context.Context, c *Client, _ func(Progress)) (any, error) {
			return struct{}{}, c.RemoveTarget(ctx, TargetRef{Name: "nas"})
		}, func(*shelf) any { return struct{}{} },
	},
	backupCall(pathBackup, BackupRequest{Volume: "db", Snapshot: "s1", Target: "nas", Tags: []string{"t"}, Full: true}, (*Client).CreateBackup,
		func(s *shelf) Backup { return s.backup }),
	backupCall(pathBackups, BackupsRequest{Target: "nas", Volume: "db"}, (*Client).Backups,
		func(s *shelf) BackupList { return BackupList{Backups: []Backup{s.backup}, Failed: failed()} }),
	backupCall(pathBackupOf, BackupRef{Reference: "nas/db@latest"}, (*Client).Backup, func(s *shelf) Backup { return s.backup }),
	backupCall(pathUnbackup, RemoveBackupsRequest{References: []string{"nas/db@01234567"}}, (*Client).RemoveBackups,
		func(s *shelf) RemoveBackupsReport {
			return RemoveBackupsReport{Removed: []string{s.backup.Reference}, Failed: failed()}
		}),
	backupCall(pathPruneBackups, PruneBackupsRequest{Target: "nas", Volume: "db", Keep: "7d", All: true, DryRun: true}, (*Client).PruneBackups,
		func(s *shelf) PruneBackupsReport {
			return PruneBackupsReport{Removed: []Backup{s.backup}, Failed: failed()}
		}),
	backupCall(pathVerify, VerifyRequest{Target: "nas", Share: 0.5}, (*Client).VerifyBackups, (*shelf).verified),
	backupCall(pathRestoreBackup, RestoreRequest{
		Reference: "nas/db@latest", Name: "new", InPlace: true, Paths: []string{"etc"}, Options: map[string]string{"size": "1G"},
	}, (*Client).RestoreBackup, (*shelf).restored),
	backupCall(pathConvoy, ConvoyRequest{
		Name: "new", Directory: "/backup", Volume: "db", Backup: "backup-1", Options: map[string]string{"size": "1G"},
	}, (*Client).ImportConvoy, (*shelf).imported),
}

func TestTargetsArriveWhole(t *testing.T) {
	service, _, client := serveVolumes(t)
	targets, err := client.Targets(t.Context())
	assert.NilError(t, err)
	assert.DeepEqual(t, targets, []Target{service.target})
}

// The service gets whole requests only, and no secret is in what is said of another one.
func TestBackupRequestsAreChecked(t *testing.T) {
	server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: VolumeService}}}})
	service := fullShelf()
	server.SetVolumes(service)
	for _, c := range []struct{ path, body, want string }{
		{pathTarget, `{}`, "Name is empty"},
		{pathTarget, `{"Name":"a/b"}`, "Name"},
		{pathTarget, `{"Name":"a"}`, "Repository"},
		{pathTarget, `{"Name":"a","Repository":"/b\u0000"}`, "Repository"},
		{pathTarget, `{"Name":"a","Repository":"/b","Password":1}`, "request body"},
		{pathTestTarget, `{"Name":"."}`, "Name"},
		{pathUntarget, `{}`, "Name is empty"},
		{pathBackup, `{}`, "Volume is empty"},
		{pathBackup, `{"Volume":"a","Snapshot":"b/c"}`, "Snapshot"},
		{pathBackup, `{"Volume":"a","Target":".."}`, "Target"},
		{pathBackups, `{"Target":"/"}`, "Target"},
		{pathBackups, `{"Volume":"/"}`, "Volume"},
		{pathBackupOf, `{}`, "Reference"},
		{pathUnbackup, `{}`, "References is empty"},
		{pathUnbackup, `{"References":["a/b@01234567",""]}`, "References"},
		{pathPruneBackups, `{"Target":"/"}`, "Target"},
		{pathPruneBackups, `{"Volume":"/"}`, "Volume"},
		{pathVerify, `{}`, "either Target or Reference"},
		{pathVerify, `{"Target":"a","Reference":"a/b"}`, "either Target or Reference"},
		{pathVerify, `{"Target":"a","Share":1.1}`, "Share 1.1"},
		{pathVerify, `{"Target":"a","Share":-1}`, "Share -1"},
		{pathVerify, `{"Target":"a/b"}`, "Target"},
		{pathRestoreBackup, `{"Name":"a"}`, "Reference"},
		{pathRestoreBackup, `{"Reference":"a/b"}`, "Name is empty"},
		{pathExport, `{}`, "Volume is empty"},
		{pathExport, `{"Volume":"a","Snapshot":"b/c"}`, "Snapshot"},
		{pathExport, `{"Volume":"a","Compress":"xz"}`, `Compress "xz": want zstd or none`},
		{pathConvoy, `{"Directory":"/a"}`, "Name is empty"},
		{pathConvoy, `{"Name":"a"}`, "Directory"},
		{pathConvoy, `{"Name":"a","Directory":"b"}`, "want an absolute path"},
		{pathConvoy, `{"Name":"a","Directory":"/b","Volume":"c/d"}`, "Volume"},
		{pathConvoy, `{"Name":"a","Directory":"/b","Backup":"c/d"}`, "Backup"},
		{pathImport, "an archive", "want a JSON object"},
		{pathImport + "?request={}", "an archive", "Name is empty"},
		{pathImport + `?request={"Name":"a","Strip":-1}`, "an archive", "Strip -1: want 0 or more"},
	} {
		assertRefused(t, server, c.path, c.body, c.want)
	}
	assert.Equal(t, len(service.got), 0, "a wrong request reached the service")
}

// What changes something is in the log, with the object and without a secret.
func TestBackupChangesAreTold(t *testing.T) {
	log, seen := logged.NewNullLogger()
	server := New(Config{Log: logrus.NewEntry(log), Info: Info{Services: []Service{{Name: VolumeService}}}})
	server.SetVolumes(fullShelf())
	for _, c := range []struct {
		path           string
		req            any
		message, about string
	}{
		{pathTarget, TargetSpec{Name: "nas", Repository: "/r", Password: "geheim", Environment: map[string]string{"A": "geheim"}}, "backup target added by an operator", "nas"},
		{pathBackup, BackupRequest{Volume: "db"}, "volume backed up by an operator", "db"},
		{pathUnbackup, RemoveBackupsRequest{References: []string{"nas/db@01234567", "nas/db@89abcdef"}}, "backups removed by an operator", "nas/db@01234567 nas/db@89abcdef"},
		{pathPruneBackups, PruneBackupsRequest{Volume: "db"}, "backups pruned by an operator", "db"},
		{pathRestoreBackup, RestoreRequest{Reference: "nas/db@latest", Name: "new"}, "volume restored from nas/db@latest by an operator", "new"},
		{pathExport, ExportRequest{Volume: "db"}, "volume exported by an operator", "db"},
		{pathConvoy, ConvoyRequest{Name: "new", Directory: "/backup"}, "volume imported from convoy's backups in /backup by an operator", "new"},
		{pathPruneBackups, PruneBackupsRequest{Volume: "db", DryRun: true}, "", ""},
		{pathTestTarget, TargetRef{Name: "nas"}, "", ""},
		{pathBackups, BackupsRequest{}, "", ""},
		{pathBackupOf, BackupRef{Reference: "nas/db"}, "", ""},
		{pathVerify, VerifyRequest{Target: "nas"}, "", ""},
	} {
		seen.Reset()
		text, err := json.Marshal(c.req)
		assert.NilError(t, err)
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Prefix+version+"/"+c.path, strings.NewReader(string(text))))
		assert.Equal(t, w.Code, http.StatusOK, c.path)
		if c.message == "" {
			assert.Equal(t, len(seen.AllEntries()), 0, c.path)
			continue
		}
		entry := seen.LastEntry()
		assert.Assert(t, entry != nil, c.path)
		assert.Equal(t, entry.Message, c.message)
		assert.Equal(t, entry.Data["volume"], c.about)
		line, err := entry.String()
		assert.NilError(t, err)
		assert.Assert(t, !strings.Contains(line, "geheim"), line)
	}
}
