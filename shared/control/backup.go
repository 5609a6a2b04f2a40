package control

import (
	"cmp"
	"context"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// A TargetSpec says what a target is to be. It holds secrets.
type TargetSpec struct {
	// Name is the administrator's for the target.
	Name string
	// Engine is "restic", also when it is "", or "archive".
	Engine string `json:",omitempty"`
	// Repository is a path as the daemon sees it, or a place in restic's words:
	// "sftp:USER@HOST:/PATH", "s3:https://HOST/BUCKET".
	Repository string
	// Password of the repository.
	Password string `json:",omitempty"`
	// Environment is what the place needs, AWS_ACCESS_KEY_ID for example.
	Environment map[string]string `json:",omitempty"`
	// Files are contents of files by the variables that hold their paths, or
	// "ssh-key" and "known-hosts".
	Files map[string]string `json:",omitempty"`
	// UploadLimit and DownloadLimit are in KiB/s, 0 for none.
	UploadLimit   int `json:",omitempty"`
	DownloadLimit int `json:",omitempty"`
	// PruneSchedule and CheckSchedule are "@weekly" or the like, "" for once a week,
	// or "never". CheckShare is the share of the data that a check reads, up to 1.
	PruneSchedule string  `json:",omitempty"`
	CheckSchedule string  `json:",omitempty"`
	CheckShare    float64 `json:",omitempty"`
	// VerifySchedule is when a backup chosen by chance is restored for a test; "" is
	// never.
	VerifySchedule string `json:",omitempty"`
	// Replace a target of the name.
	Replace bool `json:",omitempty"`
}

// A Target is where backups go, without its secrets.
type Target struct {
	Name   string
	Engine string `json:",omitempty"`
	// Repository has no password.
	Repository string `json:",omitempty"`
	// Variables and Files are the names of those that are set.
	Variables     []string `json:",omitempty"`
	Files         []string `json:",omitempty"`
	UploadLimit   int      `json:",omitempty"`
	DownloadLimit int      `json:",omitempty"`
	// Prune, Check and Verify are the schedules; nil for never.
	Prune      *Schedule `json:",omitempty"`
	Check      *Schedule `json:",omitempty"`
	Verify     *Schedule `json:",omitempty"`
	CheckShare float64   `json:",omitempty"`
	// Volumes that are backed up to it by schedule.
	Volumes []string `json:",omitempty"`
	// Error is why it cannot be used; "" when nothing is known to be wrong.
	Error string `json:",omitempty"`
}

// A TargetRef names a target.
type TargetRef struct{ Name string }

// A TargetReport is what a test of a target has found.
type TargetReport struct {
	Target Target
	// Took is how long the repository needed to open, in nanoseconds on the wire.
	Took time.Duration
	// Backups is how many Berth finds in it, of how many volumes.
	Backups, Volumes int
	// Made says that there was no repository before.
	Made bool `json:",omitempty"`
}

// A BackupRequest asks for a backup.
type BackupRequest struct {
	// Volume is backed up from a snapshot that is made for it, or from Snapshot unless
	// that is "".
	Volume   string
	Snapshot string `json:",omitempty"`
	// Target is "" for the volume's own, or the only one there is.
	Target string `json:",omitempty"`
	// Tags are words without white space and commas.
	Tags []string `json:",omitempty"`
	// Full reads all files, also those that look unchanged since the last backup.
	Full bool `json:",omitempty"`
}

// A Backup is one in the repository of a target.
type Backup struct {
	// Reference is TARGET/VOLUME@ID, which means the same on every host that has the
	// target under this name.
	Reference string
	Target    string
	ID        string
	Volume    string
	UUID      string
	// Host made it. Time is that of its data.
	Host string
	Time time.Time
	Tags []string `json:",omitempty"`
	// Files and Bytes of the data, and what was Added to the repository for it; 0 when
	// not known.
	Files uint64 `json:",omitempty"`
	Bytes uint64 `json:",omitempty"`
	Added uint64 `json:",omitempty"`
	// Consistency of the snapshot; "" in lists, which do not read so much.
	Consistency Consistency `json:",omitempty"`
	// Incomplete says that files are missing. Missing names some of them, with reasons,
	// in the answer to a BackupRequest.
	Incomplete bool     `json:",omitempty"`
	Missing    []string `json:",omitempty"`
	// Unchanged says, in the answer to a BackupRequest, that no backup was made: nothing
	// in the volume has changed since this one.
	Unchanged bool `json:",omitempty"`
	// Took is how long it took, in nanoseconds on the wire, in the answer to a
	// BackupRequest.
	Took time.Duration `json:",omitempty"`
	// Manifest is that of the backup, as JSON, in the answer for a single one.
	Manifest map[string]any `json:",omitempty"`
}

// A BackupsRequest asks for a list of backups.
type BackupsRequest struct {
	// Target and Volume limit it; "" is all.
	Target string `json:",omitempty"`
	Volume string `json:",omitempty"`
}

// A BackupList is what targets have, the oldest first. Failed are targets that did not
// answer, with the reason.
type BackupList struct {
	Backups []Backup
	Failed  map[string]string `json:",omitempty"`
}

// A BackupRef names a backup: TARGET/VOLUME with or without @latest, @TIME or @ID.
type BackupRef struct{ Reference string }

// A RemoveBackupsRequest asks for the removal of backups.
type RemoveBackupsRequest struct {
	// References have IDs.
	References []string
}

// A RemoveBackupsReport lists the references that are gone. Failed are the others, with
// the reason.
type RemoveBackupsReport struct {
	Removed []string
	Failed  map[string]string `json:",omitempty"`
}

// A PruneBackupsRequest asks for the removal of old backups, and for the space of all
// that were removed.
type PruneBackupsRequest struct {
	// Target and Volume limit it; "" is all.
	Target string `json:",omitempty"`
	Volume string `json:",omitempty"`
	// Keep is the policy, as "7d:4w:12m"; "" is each volume's own, and volumes without
	// one keep all.
	Keep string `json:",omitempty"`
	// All looks at every backup; otherwise only at those that a schedule made.
	All bool `json:",omitempty"`
	// DryRun removes nothing.
	DryRun bool `json:",omitempty"`
}

// A PruneBackupsReport lists the backups that were removed, or would be. Failed are
// those, or the targets, that failed, with the reason.
type PruneBackupsReport struct {
	Removed []Backup
	Failed  map[string]string `json:",omitempty"`
}

// A VerifyRequest asks whether backups can be trusted.
type VerifyRequest struct {
	// Target is looked through for damage, or Reference is restored to a place that is
	// removed afterwards, and compared with what the repository says of it. One of them
	// is set.
	Target    string `json:",omitempty"`
	Reference string `json:",omitempty"`
	// Share of the target's data that is read, from 0 to 1.
	Share float64 `json:",omitempty"`
}

// A VerifyReport is what was found. Errors are none when all is well.
type VerifyReport struct {
	Errors []string `json:",omitempty"`
	// Hint says what to do; "" is nothing.
	Hint string `json:",omitempty"`
	// Backup that was restored, with its Files and Bytes; nil for a target.
	Backup *Backup `json:",omitempty"`
}

// A RestoreRequest asks for a volume with the data of a backup.
type RestoreRequest struct {
	Reference string
	// Name of the volume, which must be free, unless InPlace is set: then its data is
	// replaced, and what was there is kept as a snapshot.
	Name    string
	InPlace bool `json:",omitempty"`
	// Paths below the data limit what is restored, and in place what is replaced; none are
	// all.
	Paths []string `json:",omitempty"`
	// Options of a new volume beside those that it had when it was backed up.
	Options map[string]string `json:",omitempty"`
}

// A Restore is what a RestoreRequest came to.
type Restore struct {
	Volume Volume
	Backup Backup
	// Kept is the snapshot with the data of before; nil for a new volume.
	Kept *Snapshot `json:",omitempty"`
}

// BackupAdmin is the part of VolumeAdmin that has to do with backups. What its comment
// says holds here too. A call that gets no answer from a repository errs with what its
// engine said last, without secrets.
type BackupAdmin interface {
	// AddTarget stores a target once its repository could be opened, or made if there
	// is none. It is a conflict when the name is taken.
	AddTarget(context.Context, TargetSpec, func(Progress)) (TargetReport, error)
	// Targets lists all, by name, without asking a repository.
	Targets(context.Context) ([]Target, error)
	// TestTarget opens the repository.
	TestTarget(context.Context, TargetRef, func(Progress)) (TargetReport, error)
	// RemoveTarget forgets a target and leaves its repository alone. It is a conflict
	// while volumes are backed up to it by schedule.
	RemoveTarget(context.Context, TargetRef) (struct{}, error)
	// CreateBackup returns when the backup is in the repository and was seen there. An
	// incomplete one is no error. The last one is returned, with Unchanged, when it is
	// known to hold the same and is young.
	CreateBackup(context.Context, BackupRequest, func(Progress)) (Backup, error)
	// Backups asks all repositories that are meant.
	Backups(context.Context, BackupsRequest, func(Progress)) (BackupList, error)
	// Backup tells all of one.
	Backup(context.Context, BackupRef, func(Progress)) (Backup, error)
	RemoveBackups(context.Context, RemoveBackupsRequest, func(Progress)) (RemoveBackupsReport, error)
	PruneBackups(context.Context, PruneBackupsRequest, func(Progress)) (PruneBackupsReport, error)
	VerifyBackups(context.Context, VerifyRequest, func(Progress)) (VerifyReport, error)
	// RestoreBackup returns when the volume is whole. It is a conflict when the name is
	// taken, or, in place, while the volume is mounted anywhere.
	RestoreBackup(context.Context, RestoreRequest, func(Progress)) (Restore, error)
	// ExportVolume writes a volume as an archive. It is whole only when there is no
	// error; files may be missing in it then too.
	ExportVolume(context.Context, ExportRequest, io.Writer, func(Progress)) (Export, error)
	// ImportVolume makes a volume of an archive, and returns when it is whole. What is
	// not made of a whole archive is removed. A Read ends when the context does.
	ImportVolume(context.Context, ImportRequest, io.Reader, func(Progress)) (Import, error)
	// ImportConvoy makes a volume of a backup of convoy's, and returns when it is whole.
	ImportConvoy(context.Context, ConvoyRequest, func(Progress)) (Import, error)
}

func (s *Server) routeBackups(get func(string, func(context.Context, VolumeAdmin, *http.Request) (any, error))) {
	get(pathTargets, func(ctx context.Context, v VolumeAdmin, _ *http.Request) (any, error) { return list(v.Targets(ctx)) })
	short(s, pathUntarget, VolumeAdmin.RemoveTarget)
	long(s, pathTarget, VolumeAdmin.AddTarget)
	long(s, pathTestTarget, VolumeAdmin.TestTarget)
	long(s, pathBackup, VolumeAdmin.CreateBackup)
	long(s, pathBackups, VolumeAdmin.Backups)
	long(s, pathBackupOf, VolumeAdmin.Backup)
	long(s, pathUnbackup, VolumeAdmin.RemoveBackups)
	long(s, pathPruneBackups, VolumeAdmin.PruneBackups)
	long(s, pathVerify, VolumeAdmin.VerifyBackups)
	long(s, pathRestoreBackup, VolumeAdmin.RestoreBackup)
	s.routeArchives()
}

// wantText checks a text of users that is not a name.
func wantText(field, value string) error {
	if value == "" || strings.ContainsRune(value, 0) {
		return fault.Invalid("%s %.80q: want a text", field, value)
	}
	return nil
}

func (r TargetSpec) check() error {
	return cmp.Or(wantName("Name", r.Name), wantText("Repository", r.Repository))
}
func (r TargetSpec) told() (what, object string) { return "backup target added", r.Name }

func (r TargetRef) check() error                { return wantName("Name", r.Name) }
func (r TargetRef) told() (what, object string) { return "", "" }

func (r BackupRequest) check() error {
	return cmp.Or(wantName("Volume", r.Volume), optionalName("Snapshot", r.Snapshot), optionalName("Target", r.Target))
}
func (r BackupRequest) told() (what, object string) { return "volume backed up", r.Volume }

func (r BackupsRequest) check() error {
	return cmp.Or(optionalName("Target", r.Target), optionalName("Volume", r.Volume))
}
func (r BackupsRequest) told() (what, object string) { return "", "" }

func (r BackupRef) check() error                { return wantText("Reference", r.Reference) }
func (r BackupRef) told() (what, object string) { return "", "" }

func (r RemoveBackupsRequest) check() error {
	if len(r.References) == 0 {
		return fault.Invalid("References is empty: want at least one")
	}
	for _, ref := range r.References {
		if err := wantText("References", ref); err != nil {
			return err
		}
	}
	return nil
}

func (r RemoveBackupsRequest) told() (what, object string) {
	return "backups removed", strings.Join(r.References, " ")
}

func (r PruneBackupsRequest) check() error {
	return cmp.Or(optionalName("Target", r.Target), optionalName("Volume", r.Volume))
}

func (r PruneBackupsRequest) told() (what, object string) {
	if r.DryRun {
		return "", ""
	}
	return "backups pruned", r.Volume
}

func (r VerifyRequest) check() error {
	if (r.Target == "") == (r.Reference == "") {
		return fault.Invalid("want either Target or Reference")
	}
	if r.Share < 0 || r.Share > 1 {
		return fault.Invalid("Share %g: want a number from 0 to 1", r.Share)
	}
	return optionalName("Target", r.Target)
}
func (r VerifyRequest) told() (what, object string) { return "", "" }

func (r RestoreRequest) check() error {
	return cmp.Or(wantText("Reference", r.Reference), wantName("Name", r.Name))
}

func (r RestoreRequest) told() (what, object string) {
	return "volume restored from " + r.Reference, r.Name
}

// AddTarget is BackupAdmin.AddTarget.
func (c *Client) AddTarget(ctx context.Context, spec TargetSpec, progress func(Progress)) (report TargetReport, _ error) {
	return report, c.follow(ctx, pathTarget, spec, &report, progress)
}

// Targets is BackupAdmin.Targets.
func (c *Client) Targets(ctx context.Context) (targets []Target, _ error) {
	return targets, c.call(ctx, http.MethodGet, pathTargets, nil, &targets)
}

// TestTarget is BackupAdmin.TestTarget.
func (c *Client) TestTarget(ctx context.Context, ref TargetRef, progress func(Progress)) (report TargetReport, _ error) {
	return report, c.follow(ctx, pathTestTarget, ref, &report, progress)
}

// RemoveTarget is BackupAdmin.RemoveTarget.
func (c *Client) RemoveTarget(ctx context.Context, ref TargetRef) error {
	return c.call(ctx, http.MethodPost, pathUntarget, ref, &struct{}{})
}

// CreateBackup is BackupAdmin.CreateBackup.
func (c *Client) CreateBackup(ctx context.Context, req BackupRequest, progress func(Progress)) (backup Backup, _ error) {
	return backup, c.follow(ctx, pathBackup, req, &backup, progress)
}

// Backups is BackupAdmin.Backups.
func (c *Client) Backups(ctx context.Context, req BackupsRequest, progress func(Progress)) (list BackupList, _ error) {
	return list, c.follow(ctx, pathBackups, req, &list, progress)
}

// Backup is BackupAdmin.Backup.
func (c *Client) Backup(ctx context.Context, ref BackupRef, progress func(Progress)) (backup Backup, _ error) {
	return backup, c.follow(ctx, pathBackupOf, ref, &backup, progress)
}

// RemoveBackups is BackupAdmin.RemoveBackups.
func (c *Client) RemoveBackups(ctx context.Context, req RemoveBackupsRequest, progress func(Progress)) (report RemoveBackupsReport, _ error) {
	return report, c.follow(ctx, pathUnbackup, req, &report, progress)
}

// PruneBackups is BackupAdmin.PruneBackups.
func (c *Client) PruneBackups(ctx context.Context, req PruneBackupsRequest, progress func(Progress)) (report PruneBackupsReport, _ error) {
	return report, c.follow(ctx, pathPruneBackups, req, &report, progress)
}

// VerifyBackups is BackupAdmin.VerifyBackups.
func (c *Client) VerifyBackups(ctx context.Context, req VerifyRequest, progress func(Progress)) (report VerifyReport, _ error) {
	return report, c.follow(ctx, pathVerify, req, &report, progress)
}

// RestoreBackup is BackupAdmin.RestoreBackup.
func (c *Client) RestoreBackup(ctx context.Context, req RestoreRequest, progress func(Progress)) (restore Restore, _ error) {
	return restore, c.follow(ctx, pathRestoreBackup, req, &restore, progress)
}
