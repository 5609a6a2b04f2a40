package options

import (
	"fmt"
	"io/fs"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/docker/go-units"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/schedule"
)

const (
	// maxID is the largest user or group ID; the one above means "no change" to
	// chown(2).
	maxID = 1<<32 - 2
	// MinSize is the least size of a volume in bytes. Engines may want more.
	MinSize = 1 << 20
	// MaxSize is the greatest. Up to it go-units, which counts in float64, is exact.
	MaxSize = 1 << 53
	// maxSnapshot is the longest name of a snapshot in bytes.
	maxSnapshot = 100
	maxVolume   = 200
	maxRoot     = 64
	maxText     = 4096
	maxLabel    = 128
)

// wrong is the error about a value: want says what is allowed. It goes into logs, so
// it holds no password.
func wrong(name, value, want string, args ...any) error {
	if name == "o" {
		value = netfs.Redact(value)
	}
	return fault.Invalid("option %s=%s: %s", name, quote(value), fmt.Sprintf(want, args...))
}

// quote shows a user's text on one line and no longer than a line.
func quote(s string) string {
	const limit = 60
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}

// oneOf takes one of the words.
func oneOf(name, value string, words ...string) (string, error) {
	for _, word := range words {
		if value == word {
			return word, nil
		}
	}
	list := words[0]
	if last := len(words) - 1; last > 0 {
		list = strings.Join(words[:last], ", ") + " or " + words[last]
	}
	return "", wrong(name, value, "want %s", list)
}

// parseBool takes a bare option for true: `-o ro` is `-o ro=` to Docker.
func parseBool(name, value string) (bool, error) {
	switch value {
	case "", "true", "1":
		return true, nil
	case "false", "0":
		return false, nil
	}
	return false, wrong(name, value, "want true, false, 1 or 0, or no value for true")
}

// parseID takes decimal digits only: names would have to be looked up in the
// plugin's own passwd file, not in the container's or the host's.
func parseID(name, value string) (*uint32, error) {
	id, err := strconv.ParseUint(value, 10, 32)
	if err != nil || id > maxID {
		return nil, wrong(name, value, "want a number from 0 to %d", uint32(maxID))
	}
	short := uint32(id)
	return &short, nil
}

func parseMode(name, value string) (*uint32, error) {
	mode, err := strconv.ParseUint(value, 8, 32)
	if err != nil || mode > 0o7777 || len(value) < 3 || len(value) > 5 {
		return nil, wrong(name, value, "want octal permission bits of 3 or 4 digits, as 0750")
	}
	short := uint32(mode)
	return &short, nil
}

// sizeForm is what go-units takes and means what it looks like: it would also
// take 1e9 and 0x1p20.
var sizeForm = regexp.MustCompile(`^[0-9]{1,16}(\.[0-9]{1,9})?( ?[kKmMgGtTpP]([iI]?[bB])?| ?[bB])?$`)

// parseSize takes powers of 1024, whatever the unit is called, as `docker run
// --memory` does.
func parseSize(name, value string) (uint64, error) {
	if !sizeForm.MatchString(value) {
		return 0, wrong(name, value, "want a number of bytes, or one with a unit as 512M, 10G or 1.5TiB")
	}
	size, err := units.RAMInBytes(value)
	// go-units does not look for overflow: what is too large may come out negative.
	if number, _ := strconv.ParseFloat(strings.TrimRight(value, " kKmMgGtTpPiIbB"), 64); err != nil || number > MaxSize || size < 0 || size > MaxSize || overflows(number, value) {
		return 0, wrong(name, value, "want at most %s", units.BytesSize(MaxSize))
	}
	if size < MinSize {
		return 0, wrong(name, value, "want at least %s", units.BytesSize(MinSize))
	}
	return uint64(size), nil
}

// overflows tells whether the number in the value's unit is more than MaxSize.
func overflows(number float64, value string) bool {
	factor := 1.0
	if i := strings.IndexAny(strings.ToLower(value), "kmgtp"); i >= 0 {
		factor = math.Exp2(10 * float64(1+strings.IndexByte("kmgtp", strings.ToLower(value)[i])))
	}
	return number*factor > MaxSize
}

// checkName is volume.CheckName, which cannot be called here, with another limit: a
// test compares them.
func checkName(s string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for i := range len(s) {
		c := s[i]
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alphanumeric && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return true
}

func parseRoot(name, value string) (string, error) {
	if !checkName(value, maxRoot) {
		return "", wrong(name, value, "want the name of a volume root, of letters, digits, and after the first also _ . -; a directory is not named here")
	}
	return value, nil
}

func parseSource(name, value string) (*Source, error) {
	volume, snapshot, at := strings.Cut(value, "@")
	if !checkName(volume, maxVolume) || at && !checkName(snapshot, maxSnapshot) {
		return nil, wrong(name, value, "want VOLUME or VOLUME@SNAPSHOT")
	}
	return &Source{Volume: volume, Snapshot: snapshot}, nil
}

func parseSeed(name, value string) (string, error) {
	first, _, _ := strings.Cut(value, "/")
	if !fs.ValidPath(value) || value == "." || len(value) > maxText || !printable(value) {
		return "", wrong(name, value, "want a path below the volume root, without .. and not beginning with /, or a volume")
	}
	if strings.HasPrefix(first, ".") {
		return "", wrong(name, value, "names that begin with a dot are Berth's own in the volume root")
	}
	return value, nil
}

func parseTarget(name, value string) (string, error) {
	if backup.CheckTarget(value) != nil {
		return "", wrong(name, value, "want the name of a target, as docker berth target ls shows them")
	}
	return value, nil
}

func parseBackup(name, value string) (string, error) {
	ref, err := backup.ParseReference(value)
	if err != nil {
		return "", wrong(name, value, "want TARGET/VOLUME, TARGET/VOLUME@latest, @TIME or @ID")
	}
	return ref.String(), nil
}

func parseKeep(name, value string) (keep.Policy, error) {
	policy, err := keep.Parse(value)
	if err != nil {
		return policy, wrong(name, value, "%s", err)
	}
	return policy, nil
}

func parseSchedule(name, value string) (string, error) {
	s, err := schedule.Parse(value)
	if err != nil {
		return "", wrong(name, value, "%s", oneLine(err))
	}
	return s.String(), nil
}

func parseTrashKeep(name, value string) (*time.Duration, error) {
	d, err := schedule.ParseInterval(value)
	if err != nil {
		return nil, wrong(name, value, "want a duration such as 12h, 7d or 2w")
	}
	if d <= 0 {
		return nil, wrong(name, value, "want more than 0; on-remove=purge does without the trash")
	}
	return &d, nil
}

// setLabel takes a label. Docker's own labels do not reach plugins.
func (s *Spec) setLabel(key, value string) error {
	if key == "" || len(key) > maxLabel || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || r == '=' || r == '"' }) {
		return wrong(labelPrefix+key, value, "want label.KEY=VALUE with a key of 1 to %d printable ASCII characters without spaces, = and quotes", maxLabel)
	}
	if len(value) > maxText || !printable(value) {
		return wrong(labelPrefix+key, value, "want at most %d bytes of printable text", maxText)
	}
	if s.Labels == nil {
		s.Labels = make(map[string]string)
	}
	s.Labels[key] = value
	return nil
}

// printable tells whether the text is UTF-8 on one line.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' })
}

// oneLine is the text of another package's error, which may repeat what was typed.
func oneLine(err error) string {
	const limit = 200
	text := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, err.Error())
	if len(text) > limit {
		return strings.ToValidUTF8(text[:limit], "") + "…"
	}
	return text
}
