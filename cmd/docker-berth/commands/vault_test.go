package commands

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// A vault is what a shelf has of backups.
type vault struct {
	targets []control.Target
	backups []control.Backup
	// failed are targets that do not answer.
	failed map[string]string
	// missing is what the next backup cannot read.
	missing []string
	// unchanged says that the next backup is the last one.
	unchanged bool
	verify    control.VerifyReport
	// imported is what comes of an archive, but for the volume's name.
	imported control.Import
}

func backupID(digit string) string { return strings.Repeat(digit, 64) }

func fullVault(now time.Time) vault {
	made := func(target, digit, volume string, day int) control.Backup {
		id := backupID(digit)
		return control.Backup{
			Reference: target + "/" + volume + "@" + id[:8], Target: target, ID: id, Volume: volume, UUID: "7d8f0c3a-0000-4000-8000-000000000001", Host: "alpha",
			Time: time.Date(2026, 11, day, 17, 0, 0, 0, time.UTC), Files: 1200, Bytes: 3 << 29, Added: 5 << 20, Tags: []string{"nightly"},
		}
	}
	v := vault{
		targets: []control.Target{
			{
				Name: "nas", Engine: backup.Restic, Repository: "sftp:berth@nas:/backup", Files: []string{backup.SSHKey}, Volumes: []string{"db"},
				Prune: &control.Schedule{Spec: "@weekly", Last: now.Add(-50 * time.Hour)}, Check: &control.Schedule{Spec: "@monthly", Last: now.Add(-100 * time.Hour)}, CheckShare: 0.1,
			},
			{Name: "old", Error: "target old: /targets/old.json has mode 0644"},
			{
				Name: "s3", Engine: backup.Restic, Repository: "s3:https://s3.example.com/berth", Variables: []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
				Check: &control.Schedule{Spec: "@weekly", Last: now.Add(-26 * time.Hour), LastError: "pack 12 is damaged"},
			},
		},
		backups: []control.Backup{made("nas", "1", "db", 25), made("nas", "2", "db", 26), made("nas", "3", "db", 28), made("s3", "4", "web", 27)},
		failed:  map[string]string{},
	}
	v.backups[1].Incomplete = true
	v.backups[3].Host, v.backups[3].Files, v.backups[3].Added, v.backups[3].Tags = "beta", 0, 0, nil
	return v
}

func (s *shelf) target(name string) (control.Target, error) {
	for _, t := range s.vault.targets {
		if t.Name == name {
			return t, nil
		}
	}
	return control.Target{}, fault.NotFound("there is no target %s", name)
}

func (s *shelf) AddTarget(_ context.Context, spec control.TargetSpec, _ func(control.Progress)) (control.TargetReport, error) {
	if _, err := s.target(spec.Name); err == nil && !spec.Replace {
		return control.TargetReport{}, fault.Conflict("there is a target %s already", spec.Name)
	}
	made := control.Target{Name: spec.Name, Engine: spec.Engine, Repository: backup.Redact(spec.Repository)}
	return control.TargetReport{Target: made, Made: !spec.Replace, Backups: 4, Volumes: 2}, s.do(spec)
}

func (s *shelf) Targets(context.Context) ([]control.Target, error) { return s.vault.targets, s.fail }

func (s *shelf) TestTarget(_ context.Context, ref control.TargetRef, _ func(control.Progress)) (control.TargetReport, error) {
	t, err := s.target(ref.Name)
	if err != nil {
		return control.TargetReport{}, err
	}
	return control.TargetReport{Target: t, Took: 1234 * time.Millisecond, Backups: 3, Volumes: 1}, s.do(ref)
}

func (s *shelf) RemoveTarget(_ context.Context, ref control.TargetRef) (struct{}, error) {
	t, err := s.target(ref.Name)
	if err != nil {
		return struct{}{}, err
	}
	if len(t.Volumes) > 0 {
		return struct{}{}, fault.Conflict("target %s: volumes are backed up to it by schedule: %s", t.Name, strings.Join(t.Volumes, ", "))
	}
	return struct{}{}, s.do(ref)
}

func (s *shelf) CreateBackup(_ context.Context, req control.BackupRequest, _ func(control.Progress)) (control.Backup, error) {
	if _, err := s.find(req.Volume); err != nil {
		return control.Backup{}, err
	}
	made := s.vault.backups[0]
	made.Missing, made.Incomplete = s.vault.missing, len(s.vault.missing) > 0
	made.Unchanged = s.vault.unchanged
	return made, s.do(req)
}

func (s *shelf) Backups(_ context.Context, req control.BackupsRequest, _ func(control.Progress)) (list control.BackupList, _ error) {
	list.Failed = s.vault.failed
	for _, b := range s.vault.backups {
		if (req.Target == "" || b.Target == req.Target) && (req.Volume == "" || b.Volume == req.Volume) {
			list.Backups = append(list.Backups, b)
		}
	}
	return list, s.fail
}

func (s *shelf) Backup(_ context.Context, ref control.BackupRef, _ func(control.Progress)) (control.Backup, error) {
	r, err := backup.ParseReference(ref.Reference)
	if err != nil {
		return control.Backup{}, err
	}
	i := slices.IndexFunc(s.vault.backups, func(b control.Backup) bool {
		return b.Target == r.Target && b.Volume == r.Volume && (r.Pick == backup.Latest || strings.HasPrefix(b.ID, r.Pick))
	})
	if i < 0 {
		return control.Backup{}, fault.NotFound("target %s has no backup %s@%s", r.Target, r.Volume, r.Pick)
	}
	return s.vault.backups[i], s.fail
}

func (s *shelf) RemoveBackups(ctx context.Context, req control.RemoveBackupsRequest, _ func(control.Progress)) (report control.RemoveBackupsReport, _ error) {
	report.Failed = map[string]string{}
	for _, ref := range req.References {
		if _, err := s.Backup(ctx, control.BackupRef{Reference: ref}, nil); err != nil {
			report.Failed[ref] = err.Error()
			continue
		}
		report.Removed = append(report.Removed, ref)
	}
	return report, s.do(req)
}

func (s *shelf) PruneBackups(_ context.Context, req control.PruneBackupsRequest, _ func(control.Progress)) (report control.PruneBackupsReport, _ error) {
	report.Failed = s.vault.failed
	for _, b := range s.vault.backups {
		if b.Incomplete && (req.Target == "" || b.Target == req.Target) {
			report.Removed = append(report.Removed, b)
		}
	}
	return report, s.do(req)
}

func (s *shelf) VerifyBackups(_ context.Context, req control.VerifyRequest, _ func(control.Progress)) (control.VerifyReport, error) {
	report := s.vault.verify
	if req.Reference != "" {
		report.Backup = &s.vault.backups[0]
	}
	return report, s.do(req)
}

func (s *shelf) RestoreBackup(_ context.Context, req control.RestoreRequest, _ func(control.Progress)) (control.Restore, error) {
	done := control.Restore{Volume: control.Volume{Name: req.Name}, Backup: s.vault.backups[0]}
	if req.InPlace {
		v, err := s.find(req.Name)
		if err != nil {
			return control.Restore{}, err
		}
		done.Volume, done.Kept = v, &control.Snapshot{Volume: req.Name, Name: "pre-restore-1"}
	}
	return done, s.do(req)
}

func (s *shelf) ExportVolume(_ context.Context, req control.ExportRequest, w io.Writer, _ func(control.Progress)) (control.Export, error) {
	if _, err := s.find(req.Volume); err != nil {
		return control.Export{}, err
	}
	done := control.Export{Volume: req.Volume, Files: 2, Bytes: 3, Missing: s.vault.missing, MissingCount: uint64(len(s.vault.missing))}
	if _, err := io.WriteString(w, archiveText); err != nil {
		return control.Export{}, err
	}
	return done, s.do(req)
}

func (s *shelf) ImportVolume(_ context.Context, req control.ImportRequest, archive io.Reader, _ func(control.Progress)) (control.Import, error) {
	text, err := io.ReadAll(archive)
	if err != nil {
		return control.Import{}, err
	}
	if string(text) != archiveText {
		return control.Import{}, fault.Invalid("the archive is damaged")
	}
	done := s.vault.imported
	done.Volume.Name = req.Name
	return done, s.do(req)
}

func (s *shelf) ImportConvoy(_ context.Context, req control.ConvoyRequest, _ func(control.Progress)) (control.Import, error) {
	done := s.vault.imported
	done.Volume.Name = req.Name
	return done, s.do(req)
}

// archiveText is the archive that a shelf exports, and takes.
const archiveText = "an archive"
