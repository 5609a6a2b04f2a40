package volplugin

import (
	"context"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

var errLater = fault.Unavailable("not yet")

// AddTarget implements control.BackupAdmin.
func (d *Driver) AddTarget(ctx context.Context, spec control.TargetSpec, tell func(control.Progress)) (out control.TargetReport, err error) {
	return out, errLater
}

// Targets implements control.BackupAdmin.
func (d *Driver) Targets(ctx context.Context) ([]control.Target, error) { return nil, errLater }

// TestTarget implements control.BackupAdmin.
func (d *Driver) TestTarget(ctx context.Context, ref control.TargetRef, tell func(control.Progress)) (out control.TargetReport, err error) {
	return out, errLater
}

// RemoveTarget implements control.BackupAdmin.
func (d *Driver) RemoveTarget(ctx context.Context, ref control.TargetRef) (struct{}, error) {
	return struct{}{}, errLater
}

// CreateBackup implements control.BackupAdmin.
func (d *Driver) CreateBackup(ctx context.Context, req control.BackupRequest, tell func(control.Progress)) (out control.Backup, err error) {
	return out, errLater
}

// Backups implements control.BackupAdmin.
func (d *Driver) Backups(ctx context.Context, req control.BackupsRequest, tell func(control.Progress)) (out control.BackupList, err error) {
	return out, errLater
}

// Backup implements control.BackupAdmin.
func (d *Driver) Backup(ctx context.Context, ref control.BackupRef, tell func(control.Progress)) (out control.Backup, err error) {
	return out, errLater
}

// RemoveBackups implements control.BackupAdmin.
func (d *Driver) RemoveBackups(ctx context.Context, req control.RemoveBackupsRequest, tell func(control.Progress)) (out control.RemoveBackupsReport, err error) {
	return out, errLater
}

// PruneBackups implements control.BackupAdmin.
func (d *Driver) PruneBackups(ctx context.Context, req control.PruneBackupsRequest, tell func(control.Progress)) (out control.PruneBackupsReport, err error) {
	return out, errLater
}

// VerifyBackups implements control.BackupAdmin.
func (d *Driver) VerifyBackups(ctx context.Context, req control.VerifyRequest, tell func(control.Progress)) (out control.VerifyReport, err error) {
	return out, errLater
}

// RestoreBackup implements control.BackupAdmin.
func (d *Driver) RestoreBackup(ctx context.Context, req control.RestoreRequest, tell func(control.Progress)) (out control.Restore, err error) {
	return out, errLater
}
