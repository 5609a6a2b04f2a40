package volplugin

import "github.com/berth-plugin/berth/shared/state"

// schemaVersion is that of the buckets in persist.go: the names of the fields of
// their record types, and of the types in them.
const schemaVersion = 1

// OpenState opens this host's cache and counts, one file for each host. The errors
// are those of state.Open.
func OpenState(path string) (*state.DB, error) {
	return state.Open(path, state.Options{Version: schemaVersion})
}
