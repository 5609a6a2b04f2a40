package backup

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// Latest picks the newest complete backup of a volume.
const Latest = "latest"

// A Reference names a backup by one string that means the same on every host whose
// target has the same name: TARGET/VOLUME, TARGET/VOLUME@latest, TARGET/VOLUME@TIME
// (the newest that is not newer than TIME) or TARGET/VOLUME@ID.
type Reference struct {
	Target, Volume string
	// Pick is Latest, a time in RFC 3339 (or its date alone, which means the end of
	// that day in UTC), or an ID of which 8 to 64 characters are given.
	Pick string
}

var (
	names = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)
	ids   = regexp.MustCompile(`^[0-9a-f]{8,64}$`)
	// volumes are named as package volume does.
	volumes = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}$`)
)

// CheckTarget refuses what cannot be the name of a target. The error is invalid.
func CheckTarget(name string) error {
	if !names.MatchString(name) {
		return fault.Invalid("target %.80q: want at most 63 letters, digits, _ . and -, of which the first is a letter or a digit", name)
	}
	return nil
}

// ParseReference reads the form that String gives, with or without @PICK. The error is
// invalid.
func ParseReference(text string) (Reference, error) {
	wrong := func(why string) (Reference, error) {
		return Reference{}, fault.Invalid("backup %.300q: want TARGET/VOLUME, TARGET/VOLUME@latest, @TIME or @ID: %s", text, why)
	}
	target, rest, ok := strings.Cut(text, "/")
	if !ok {
		return wrong("there is no /")
	}
	if err := CheckTarget(target); err != nil {
		return wrong(err.Error())
	}
	volume, pick, given := strings.Cut(rest, "@")
	if !given {
		pick = Latest
	}
	if !volumes.MatchString(volume) {
		return wrong(fmt.Sprintf("%.80q is not the name of a volume", volume))
	}
	ref := Reference{Target: target, Volume: volume, Pick: pick}
	if _, _, err := ref.picks(); err != nil {
		return wrong(err.Error())
	}
	return ref, nil
}

// String is TARGET/VOLUME@PICK.
func (r Reference) String() string { return r.Target + "/" + r.Volume + "@" + r.Pick }

// picks tells which kind Pick is: the beginning of an ID, a time, or neither for Latest.
func (r Reference) picks() (id string, at time.Time, err error) {
	if r.Pick == Latest {
		return "", time.Time{}, nil
	}
	if day, err := time.Parse(time.DateOnly, r.Pick); err == nil {
		return "", day.Add(24*time.Hour - time.Nanosecond), nil
	}
	if at, err := time.Parse(time.RFC3339, r.Pick); err == nil {
		return "", at, nil
	}
	if ids.MatchString(r.Pick) {
		return r.Pick, time.Time{}, nil
	}
	return "", time.Time{}, fmt.Errorf("%.80q is not latest, a time such as 2026-01-31 or 2026-01-31T12:00:00Z, or 8 to 64 digits of an ID", r.Pick)
}

// Select finds the backup that is meant among those of a list, whatever its order. An
// incomplete one is found by its ID only. The error is not found, or invalid when an ID
// is not unique, or when latest or a time may mean either of two volumes: hosts that share
// a repository may each have one of the name.
func (r Reference) Select(list []Backup) (Backup, error) {
	id, at, err := r.picks()
	if err != nil {
		return Backup{}, fault.Invalid("%w", err)
	}
	var found []Backup
	for _, b := range list {
		switch {
		case b.Volume != r.Volume:
		case id != "" && strings.HasPrefix(b.ID, id):
			found = append(found, b)
		case id != "", b.Incomplete, !at.IsZero() && b.Time.After(at):
		default:
			found = append(found, b)
		}
	}
	if id == "" && len(found) > 0 {
		return r.newest(found)
	}
	switch len(found) {
	case 0:
		return Backup{}, fault.NotFound("%w: %s", ErrNoBackup, r)
	case 1:
		return found[0], nil
	}
	return Backup{}, fault.Invalid("backup %s: %d backups have IDs that begin so: docker berth backup ls --no-trunc shows more of them", r, len(found))
}

// newest picks the newest of backups, of which there are some. It refuses to choose when a
// volume of another host was still backed up after the first backup of the one that has the
// newest. A volume that has moved, and goes on under another UUID elsewhere, was not.
func (r Reference) newest(list []Backup) (Backup, error) {
	first, last := map[string]time.Time{}, map[string]Backup{}
	for _, b := range list {
		if at, ok := first[b.UUID]; !ok || b.Time.Before(at) {
			first[b.UUID] = b.Time
		}
		if one, ok := last[b.UUID]; !ok || b.Time.After(one.Time) {
			last[b.UUID] = b
		}
	}
	volumes := slices.SortedFunc(maps.Values(last), func(x, y Backup) int {
		return cmp.Or(y.Time.Compare(x.Time), strings.Compare(x.ID, y.ID))
	})
	newest := volumes[0]
	for _, other := range volumes[1:] {
		if other.Host != newest.Host && !other.Time.Before(first[newest.UUID]) {
			return Backup{}, fault.Invalid("backup %s: there are two volumes %s, of different hosts, and it may mean %s or %s: name the one that is meant by its ID",
				r, r.Volume, r.described(newest), r.described(other))
		}
	}
	return newest, nil
}

// described tells a backup from others of the same name.
func (r Reference) described(b Backup) string {
	const short = 8
	r.Pick = b.ID[:min(len(b.ID), short)]
	return fmt.Sprintf("%s (host %s, %s)", r, b.Host, b.Time.UTC().Format(time.RFC3339))
}

// ByID tells whether an ID is given.
func (r Reference) ByID() bool {
	id, _, err := r.picks()
	return err == nil && id != ""
}
