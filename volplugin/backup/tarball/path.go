package tarball

import (
	"fmt"
	"strings"
)

// maxPath bounds the paths in an archive, in bytes. The kernel takes 4096 at once, but a
// tree can be deeper.
const maxPath = 64 << 10

// clean gives the path of an entry or of a link's target without empty components and
// ".", "" for the top. One that leads up is refused. An absolute one is taken
// as relative, as tar does.
func clean(path string) (string, error) {
	if len(path) > maxPath {
		return "", fmt.Errorf("%s: the path has %d bytes, at most %d are taken", shown(path), len(path), maxPath)
	}
	var components []string
	for component := range strings.SplitSeq(path, "/") {
		switch {
		case component == "" || component == ".":
		case component == ".." || strings.ContainsRune(component, 0):
			return "", fmt.Errorf("%s: the path leads out of the archive", shown(path))
		default:
			components = append(components, component)
		}
	}
	return strings.Join(components, "/"), nil
}

// checkPath refuses a path that somebody asks for unless it is clean.
func checkPath(path string) error {
	if cleaned, err := clean(path); err != nil || cleaned != path || path == "" {
		return fmt.Errorf("path %s: want a path below the volume's top, such as dir/file, without . and ..", shown(path))
	}
	return nil
}

// split cuts a path before its last component.
func split(path string) (dir, name string) {
	at := strings.LastIndexByte(path, '/')
	if at < 0 {
		return "", path
	}
	return path[:at], path[at+1:]
}

// within tells whether path is dir or below it.
func within(path, dir string) bool {
	return dir == "" || path == dir || strings.HasPrefix(path, dir+"/")
}

// shown quotes a path for messages.
func shown(path string) string {
	if len(path) > 1000 {
		path = path[:500] + "..." + path[len(path)-500:]
	}
	return fmt.Sprintf("%q", path)
}
