package options

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// CheckPool reads the options of RequestPool (--ipam-opt). Berth has none yet.
func CheckPool(opts map[string]string) (warnings []string, err error) {
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		if !strings.HasPrefix(key, dockerPrefix) {
			return nil, fault.Invalid("unknown IPAM option %s: Berth has none", shown(key))
		}
		warnings = append(warnings, fmt.Sprintf("IPAM option %s is not known to Berth and has no effect", shown(key)))
	}
	return warnings, nil
}
