// Package control is the administration of a running berthd: what an operator
// asks that Docker's plugin protocol has no call for. It is HTTP with JSON bodies
// below Prefix, on the socket that Docker itself uses, so whoever may speak to
// Docker's plugins may administer Berth, and nobody else.
//
//	GET    /Berth/v1/info                     Info
//	GET    /Berth/v1/networks                 []Network
//	GET    /Berth/v1/networks/ID              Network
//	DELETE /Berth/v1/networks/ID              nothing; see Networks.RemoveNetwork
//	GET    /Berth/v1/endpoints?network=ID     []Endpoint
//	POST   /Berth/v1/endpoints/collect        CollectRequest, CollectReport
//	GET    /Berth/v1/ports?network=ID         []Port
//	GET    /Berth/v1/leases?network=ID        []Lease
//	POST   /Berth/v1/leases/reserve           ReserveRequest, Lease
//	POST   /Berth/v1/leases/release           ReleaseRequest, Lease
//	GET    /Berth/v1/pools                    []Pool
//	GET    /Berth/v1/volumes                  []Volume
//	GET    /Berth/v1/volumes/NAME             Volume
//	POST   /Berth/v1/volumes/clone            CloneRequest, Volume *
//	POST   /Berth/v1/volumes/rollback         RollbackRequest, Rollback *
//	POST   /Berth/v1/volumes/rename           RenameRequest, Volume
//	POST   /Berth/v1/volumes/resize           ResizeRequest, Volume *
//	POST   /Berth/v1/volumes/usage            UsageRequest, UsageReport *
//	POST   /Berth/v1/volumes/adopt            AdoptRequest, Volume *
//	POST   /Berth/v1/volumes/update           UpdateRequest, Volume
//	GET    /Berth/v1/snapshots?volume=NAME    []Snapshot
//	POST   /Berth/v1/snapshots/create         SnapshotRequest, Snapshot *
//	POST   /Berth/v1/snapshots/remove         SnapshotRef, nothing *
//	POST   /Berth/v1/snapshots/prune          PruneSnapshotsRequest, PruneSnapshotsReport *
//	GET    /Berth/v1/trash                    []TrashEntry
//	POST   /Berth/v1/trash/restore            RestoreTrashRequest, Volume
//	POST   /Berth/v1/trash/purge              PurgeTrashRequest, PurgeTrashReport *
//	GET    /Berth/v1/targets                  []Target
//	POST   /Berth/v1/targets/add              TargetSpec, TargetReport *
//	POST   /Berth/v1/targets/test             TargetRef, TargetReport *
//	POST   /Berth/v1/targets/remove           TargetRef, nothing
//	POST   /Berth/v1/backups                  BackupsRequest, BackupList *
//	POST   /Berth/v1/backups/create           BackupRequest, Backup *
//	POST   /Berth/v1/backups/inspect          BackupRef, Backup *
//	POST   /Berth/v1/backups/remove           RemoveBackupsRequest, RemoveBackupsReport *
//	POST   /Berth/v1/backups/prune            PruneBackupsRequest, PruneBackupsReport *
//	POST   /Berth/v1/backups/verify           VerifyRequest, VerifyReport *
//	POST   /Berth/v1/backups/restore          RestoreRequest, Restore *
//	POST   /Berth/v1/backups/export           ExportRequest, Export * and an archive
//	POST   /Berth/v1/backups/import?request=  ImportRequest and an archive, Import *
//	POST   /Berth/v1/backups/convoy           ConvoyRequest, Import *
//	GET    /Berth/v1/doctor                   []Finding
//	GET    /Berth/v1/metrics                  Prometheus' text format
//
// Calls with a * may take long. One that does answers in lines of JSON: any number of
// {"Progress":{…}}, at least one in five seconds, and at last {"Result":…} or
// {"Err":…,"Kind":…}, the status being 200 in either case. To hang up is to undo it.
// The parts of an archive come between lines, after a line {"Data":N} that says how many
// bytes they have. The archive for an import is the body, and the request in the query.
//
// The version in the path changes when an older client would misread an answer. A
// new field or path changes nothing: both sides pass over fields they do not know.
//
// An error is a JSON object with its text in Err and the word of fault.Kind in
// Kind; Client gives it back as an error of that kind.
//
// The package has the types, the Server and the Client, and knows neither networks
// nor volumes beyond the interfaces that their drivers implement.
package control

// Prefix is where all paths begin. No call of Docker's plugin protocol does.
const Prefix = "/Berth/"

// version is the first element of all paths below Prefix.
const version = "v1"

// Paths below Prefix and the version.
const (
	pathInfo      = "info"
	pathNetworks  = "networks"
	pathEndpoints = "endpoints"
	pathCollect   = "endpoints/collect"
	pathPorts     = "ports"
	pathLeases    = "leases"
	pathReserve   = "leases/reserve"
	pathRelease   = "leases/release"
	pathPools     = "pools"
	pathDoctor    = "doctor"
	pathMetrics   = "metrics"

	pathVolumes    = "volumes"
	pathClone      = "volumes/clone"
	pathRollback   = "volumes/rollback"
	pathRename     = "volumes/rename"
	pathResize     = "volumes/resize"
	pathUsage      = "volumes/usage"
	pathAdopt      = "volumes/adopt"
	pathUpdate     = "volumes/update"
	pathSnapshots  = "snapshots"
	pathSnapshot   = "snapshots/create"
	pathUnsnapshot = "snapshots/remove"
	pathPrune      = "snapshots/prune"
	pathTrash      = "trash"
	pathRestore    = "trash/restore"
	pathPurge      = "trash/purge"

	pathTargets       = "targets"
	pathTarget        = "targets/add"
	pathUntarget      = "targets/remove"
	pathTestTarget    = "targets/test"
	pathBackups       = "backups"
	pathBackup        = "backups/create"
	pathBackupOf      = "backups/inspect"
	pathUnbackup      = "backups/remove"
	pathPruneBackups  = "backups/prune"
	pathVerify        = "backups/verify"
	pathRestoreBackup = "backups/restore"
	pathExport        = "backups/export"
	pathImport        = "backups/import"
	pathConvoy        = "backups/convoy"
)
