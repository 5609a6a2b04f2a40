// Package backup is what Berth's backups are, whoever keeps them: the contract of
// engines, targets with their secrets, references and the manifest.
//
// # Repositories
//
// A target is one repository that an administrator has set up. Engine restic keeps
// standard restic repositories, which plain restic reads without Berth. Engine archive
// keeps one compressed tar file for each backup. All volumes of all hosts may share one
// target: backups are told apart by the UUID of their volume.
//
// # Layout
//
// What is backed up is a directory with two entries: data, the top directory of the
// volume with its own owner and mode, and manifest.json (Manifest). A backup has the
// same two at its top, so that a volume can be made from nothing but a target.
//
// # Trust
//
// A backup is good when the engine's program ended well, its own account of what it
// stored was understood and agrees with what was there to be stored, and the repository
// lists it afterwards. Everything else is an error, or a Result that is incomplete and
// names what is missing. Nothing in a repository is trusted when it is read: it may have
// been written by somebody else.
package backup
