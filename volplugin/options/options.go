// Package options turns the -o map of `docker volume create` into a typed,
// validated Spec. Below it nothing reads option maps. It does not look at any
// file or volume: what depends on a root, an engine's abilities or another volume
// is decided where those are known.
package options

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/keep"
)

// OnRemove says what becomes of a volume's data when the volume is removed.
type OnRemove string

// What removal does with the data.
const (
	// Trash moves the data into the root's trash.
	Trash OnRemove = "trash"
	// Keep leaves the data where it is, without a record.
	Keep OnRemove = "keep"
	// Purge deletes the data.
	Purge OnRemove = "purge"
)

// A Spec is the validated form of a volume's options. What was not given is the
// zero value, which is also what was given as false, or as engine=auto.
type Spec struct {
	// Root is the name of one of the roots that the operator has set up, "" for the
	// default one. It is never set together with Share.
	Root string
	// Share is a file server's directory that is the volume's root, nil for none.
	Share *Share
	// Engine is "dir", "reflink", "btrfs", "image" or "thin", and "" when Berth
	// chooses.
	Engine string
	// Size is the limit in bytes, at least MinSize; 0 is none.
	Size uint64
	// FS is the file system in an image or on a thin device: "btrfs", "xfs", "ext4",
	// "" when Berth chooses. It is never set with an engine that has neither.
	FS string
	// Sparse asks for an image that takes space as it fills.
	Sparse bool
	// NoCOW asks btrfs to overwrite in place.
	NoCOW bool
	// UID and GID own the top directory of the data.
	UID, GID *uint32
	// Mode is the permission bits of the top directory, at most octal 7777.
	Mode *uint32
	// OwnerEnforce asks for UID, GID and Mode to be set again after dockerd has
	// copied an image's content into the volume. One of them at least is set.
	OwnerEnforce bool
	// ReadOnly, NoSUID, NoDev and NoExec are how containers get it mounted.
	ReadOnly, NoSUID, NoDev, NoExec bool
	// From is what the volume is to be a clone of, nil for none. It is never set
	// together with Seed.
	From *Source
	// Seed is what is copied into the new volume: a path below the root, relative
	// and free of "." and "..", or, as a path of one element, the name of a volume.
	Seed string
	// Protect refuses removal.
	Protect  bool
	OnRemove *OnRemove
	// TrashKeep is how long the data stays in the trash, more than 0. It is not set
	// when OnRemove says that none gets there.
	TrashKeep *time.Duration
	// Schedule of snapshots is a text that schedule.Parse accepts; "" is none.
	Schedule string
	// Keep is how many of the scheduled snapshots stay, the zero Policy for all.
	Keep keep.Policy
	// BackupSchedule and BackupKeep are the same for backups, and BackupTarget is the
	// name of their target, "" for the only one there is.
	BackupSchedule string
	BackupKeep     keep.Policy
	BackupTarget   string
	// FromBackup is the backup that the volume is made from, in the form that
	// backup.ParseReference reads; "" is none. It is never set together with From or
	// Seed.
	FromBackup string
	// BackupPaths limit what is restored, as backup.Engine's Restore takes them; no
	// option sets them.
	BackupPaths []string
	// BackupFound is the backup that FromBackup was found to mean; no option sets it. nil
	// leaves that to whoever makes the volume.
	BackupFound *backup.Backup
	// FromArchive says that the volume is made from an archive that somebody sends; no
	// option sets it. It is never set together with From, Seed or FromBackup.
	FromArchive bool
	// Exclusive lets one host at a time have the volume. Whether false was asked for,
	// which some engines cannot do, is in Given.
	Exclusive bool
	// Labels by their names without "label."; nil for none.
	Labels map[string]string
	// Given is the map as it came, passwords and all, for comparing with a later Create.
	Given map[string]string
}

// A Share is a file server's directory, in the words of the local driver's options.
type Share struct {
	// Type is "nfs", "nfs4" or "cifs".
	Type string
	// Device is HOST:/PATH, or :/PATH with addr=HOST among the options, or //HOST/SHARE
	// for cifs.
	Device string
	// Options are those of mount(8), with commas between, and may hold a password. All
	// three are what netfs.Parse accepts.
	Options string
}

// A Source is a volume to clone, or one of its snapshots.
type Source struct {
	Volume string
	// Snapshot is "" for the volume as it is now.
	Snapshot string
}

// String is the form of the option: VOLUME or VOLUME@SNAPSHOT.
func (s Source) String() string {
	if s.Snapshot == "" {
		return s.Volume
	}
	return s.Volume + "@" + s.Snapshot
}

// maxGiven bounds all names and values together, in bytes. They are stored in the
// volume's record, which is read up to a limit.
const maxGiven = 8 << 10

// Parse checks the map of a Create; nil is the empty map. The error is invalid
// and names the first wrong option in alphabetical order, its value and what is
// allowed, or else the options that contradict each other.
func Parse(given map[string]string) (Spec, error) {
	spec := Spec{Given: maps.Clone(given)}
	total := 0
	for _, name := range slices.Sorted(maps.Keys(given)) {
		total += len(name) + len(given[name])
		if err := spec.set(name, given[name], given); err != nil {
			return Spec{}, err
		}
	}
	if total > maxGiven {
		return Spec{}, fault.Invalid("the options have %d bytes together: at most %d are allowed", total, maxGiven)
	}
	if err := spec.finish(given); err != nil {
		return Spec{}, err
	}
	return spec, nil
}

// An option is one name and what is done with its value. A parse function gets the
// name for its message and sets its field of the Spec.
type option struct {
	name  string
	parse func(s *Spec, name, value string) error
}

// labelPrefix begins the names of options that are labels.
const labelPrefix = "label."

// table lists the options in the order messages show them.
func table() []option {
	return []option{
		{"backup.keep", func(s *Spec, name, value string) (err error) { s.BackupKeep, err = parseKeep(name, value); return err }},
		{"backup.schedule", func(s *Spec, name, value string) (err error) {
			s.BackupSchedule, err = parseSchedule(name, value)
			return err
		}},
		{"backup.target", func(s *Spec, name, value string) (err error) {
			s.BackupTarget, err = parseTarget(name, value)
			return err
		}},
		{"device", nil}, // with type, by finish
		{"engine", func(s *Spec, name, value string) (err error) {
			s.Engine, err = oneOf(name, value, "auto", "dir", "reflink", "btrfs", "image", "thin")
			if s.Engine == "auto" {
				s.Engine = ""
			}
			return err
		}},
		{"exclusive", func(s *Spec, name, value string) (err error) { s.Exclusive, err = parseBool(name, value); return err }},
		{"from", func(s *Spec, name, value string) (err error) { s.From, err = parseSource(name, value); return err }},
		{"from-backup", func(s *Spec, name, value string) (err error) {
			s.FromBackup, err = parseBackup(name, value)
			return err
		}},
		{"fs", func(s *Spec, name, value string) (err error) {
			s.FS, err = oneOf(name, value, "btrfs", "xfs", "ext4")
			return err
		}},
		{"gid", func(s *Spec, name, value string) (err error) { s.GID, err = parseID(name, value); return err }},
		{"mode", func(s *Spec, name, value string) (err error) { s.Mode, err = parseMode(name, value); return err }},
		{"nocow", func(s *Spec, name, value string) (err error) { s.NoCOW, err = parseBool(name, value); return err }},
		{"nodev", func(s *Spec, name, value string) (err error) { s.NoDev, err = parseBool(name, value); return err }},
		{"noexec", func(s *Spec, name, value string) (err error) { s.NoExec, err = parseBool(name, value); return err }},
		{"nosuid", func(s *Spec, name, value string) (err error) { s.NoSUID, err = parseBool(name, value); return err }},
		{"o", nil}, // with type, by finish
		{"on-remove", func(s *Spec, name, value string) error {
			policy, err := oneOf(name, value, string(Trash), string(Keep), string(Purge))
			s.OnRemove = (*OnRemove)(&policy)
			return err
		}},
		{"owner", func(s *Spec, name, value string) error {
			_, err := oneOf(name, value, "enforce")
			s.OwnerEnforce = true
			return err
		}},
		{"protect", func(s *Spec, name, value string) (err error) { s.Protect, err = parseBool(name, value); return err }},
		{"ro", func(s *Spec, name, value string) (err error) { s.ReadOnly, err = parseBool(name, value); return err }},
		{"root", func(s *Spec, name, value string) (err error) { s.Root, err = parseRoot(name, value); return err }},
		{"seed", func(s *Spec, name, value string) (err error) { s.Seed, err = parseSeed(name, value); return err }},
		{"size", func(s *Spec, name, value string) (err error) { s.Size, err = parseSize(name, value); return err }},
		{"snapshot.keep", func(s *Spec, name, value string) (err error) { s.Keep, err = parseKeep(name, value); return err }},
		{"snapshot.schedule", func(s *Spec, name, value string) (err error) {
			s.Schedule, err = parseSchedule(name, value)
			return err
		}},
		{"sparse", func(s *Spec, name, value string) (err error) { s.Sparse, err = parseBool(name, value); return err }},
		{"trash.keep", func(s *Spec, name, value string) (err error) {
			s.TrashKeep, err = parseTrashKeep(name, value)
			return err
		}},
		{"type", nil}, // by finish
		{"uid", func(s *Spec, name, value string) (err error) { s.UID, err = parseID(name, value); return err }},
	}
}

// set takes one option.
func (s *Spec) set(name, value string, given map[string]string) error {
	if key, ok := strings.CutPrefix(name, labelPrefix); ok {
		return s.setLabel(key, value)
	}
	for _, option := range table() {
		if option.name != name {
			continue
		}
		if option.parse == nil {
			return checkShareOption(name, value, given)
		}
		return option.parse(s, name, value)
	}
	return refuse(name)
}

// finish makes what several options say together, and refuses what they cannot.
func (s *Spec) finish(given map[string]string) error {
	var err error
	if s.Share, err = parseShare(given); err != nil {
		return err
	}
	imageless := s.Engine != "" && s.Engine != "image" && s.Engine != "thin"
	for _, clash := range []struct {
		is        bool
		one, with string
		why       string
	}{
		{s.Share != nil && s.Root != "", "root", "type", "a share is a root of its own"},
		{s.FS != "" && imageless, "fs", "engine", "it is for the engines image and thin"},
		{s.Sparse && imageless, "sparse", "engine", "it is for the engines image and thin"},
		{s.NoCOW && s.FS != "" && s.FS != "btrfs", "nocow", "fs", "it is for btrfs"},
		{s.From != nil && s.Seed != "", "from", "seed", "a volume is made from one of them"},
		{s.FromBackup != "" && s.From != nil, "from-backup", "from", "a volume is made from one of them"},
		{s.FromBackup != "" && s.Seed != "", "from-backup", "seed", "a volume is made from one of them"},
		{s.TrashKeep != nil && s.OnRemove != nil && *s.OnRemove != Trash, "trash.keep", "on-remove", "the data does not get into the trash"},
	} {
		if clash.is {
			return fault.Invalid("options %s=%s and %s=%s contradict each other: %s", clash.one, quote(given[clash.one]), clash.with, quote(given[clash.with]), clash.why)
		}
	}
	if s.OwnerEnforce && s.UID == nil && s.GID == nil && s.Mode == nil {
		return fault.Invalid("option owner=enforce: there is nothing to enforce without uid, gid or mode")
	}
	return nil
}
