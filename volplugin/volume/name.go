package volume

import (
	"fmt"

	"github.com/berth-plugin/berth/shared/fault"
)

// maxName is the longest name in bytes; the record's file name adds five to it
// and a file name has at most 255.
const maxName = 200

// CheckName refuses what is no volume name. dockerd checks no names for plugins,
// so every handler does. A name that passes is safe as a single path element, and
// is never the name of Berth's own directory, since it does not begin with a dot.
func CheckName(name string) error {
	if name == "" {
		return fault.Invalid("volume name is empty")
	}
	if len(name) > maxName {
		return fault.Invalid("volume name %.40q… has %d bytes: at most %d are allowed", name, len(name), maxName)
	}
	for i := range len(name) {
		c := name[i]
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if alphanumeric || i > 0 && (c == '_' || c == '.' || c == '-') {
			continue
		}
		what := fmt.Sprintf("character %d", i+1)
		if i == 0 {
			what = "the first character"
		}
		return fault.Invalid("volume name %q: %s is not allowed; want letters, digits, and after the first also _ . -", name, what)
	}
	return nil
}

// Anonymous tells whether dockerd made the name up for a volume that the user
// did not name: 64 hexadecimal digits.
func Anonymous(name string) bool {
	if len(name) != 64 {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
