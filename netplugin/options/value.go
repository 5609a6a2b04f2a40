package options

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/berth-plugin/berth/shared/fault"
)

// maxLinkName is the kernel's IFNAMSIZ without the closing NUL.
const maxLinkName = 15

// shown is a user's text for a message: quoted, on one line, and cut when it is
// long.
func shown(s string) string {
	const limit = 64
	if len(s) <= limit {
		return strconv.Quote(s)
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return strconv.Quote(s[:cut]) + "..."
}

// text is the value as a string. dockerd sends nothing else below
// com.docker.network.generic and for driver options of an endpoint.
func text(key string, value any) (string, error) {
	s, ok := value.(string)
	if !ok {
		return "", fault.Invalid("option %s: want a string, got %T", shown(key), value)
	}
	return s, nil
}

// parseBool reads true and false as Docker does. `-o name` without a value
// arrives as "" and means true.
func parseBool(key, value string) (bool, error) {
	if value == "" {
		return true, nil
	}
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, fault.Invalid("option %s=%s: want true or false", key, shown(value))
	}
	return b, nil
}

// parseFlag reads a boolean that dockerd itself sends at the top of the map.
func parseFlag(key string, value any) (bool, error) {
	switch v := value.(type) {
	case bool:
		return v, nil
	case string:
		return parseBool(key, v)
	default:
		return false, fault.Invalid("option %s: want true or false, got %T", key, value)
	}
}

// parseInt reads a decimal number between low and high.
func parseInt(key, value string, low, high int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < low || n > high {
		return 0, fault.Invalid("option %s=%s: want a number from %d to %d", key, shown(value), low, high)
	}
	return n, nil
}

// parseLinkName reads a name or the beginning of a name of a link. The kernel
// allows more, but '%' is a template to it, '/' and the names all and default
// mean other files below /proc/sys/net, and ':' is an alias to older tools.
func parseLinkName(key, value string, limit int) (string, error) {
	ok := value != "" && len(value) <= limit && isAlnum(value[0])
	for _, c := range []byte(value) {
		ok = ok && (isAlnum(c) || strings.IndexByte("._-", c) >= 0)
	}
	if !ok {
		return "", fault.Invalid("option %s=%s: want 1 to %d of a-z, A-Z, 0-9, '.', '_', '-', beginning with a letter or digit", key, shown(value), limit)
	}
	switch value {
	case "all", "default", "lo":
		return "", fault.Invalid("option %s=%s: the kernel uses this name itself", key, shown(value))
	}
	return value, nil
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// checkID accepts the IDs that dockerd makes: they become parts of record keys
// and of the marks on links.
func checkID(name, id string) error {
	const longest = 64
	ok := id != "" && len(id) <= longest
	for _, c := range []byte(id) {
		ok = ok && isAlnum(c)
	}
	if !ok {
		return fault.Invalid("%s %s: want 1 to %d letters and digits", name, shown(id), longest)
	}
	return nil
}
