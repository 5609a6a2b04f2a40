package vmlab

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// cpioFile is one entry of an initial RAM disk.
type cpioFile struct {
	name string
	mode uint32 // type and permission bits as in stat(2)
	data []byte
}

const (
	modeFile = 0o100644
	modeExec = 0o100755
	modeDir  = 0o040755
)

// writeCPIO writes the "newc" form that the kernel unpacks: for each entry a
// header of hexadecimal fields, the name and the data, each padded to 4 bytes.
func writeCPIO(w io.Writer, files []cpioFile) error {
	out := bufio.NewWriter(w)
	for i, f := range append(files, cpioFile{name: "TRAILER!!!"}) {
		links := 1
		if f.mode&modeDir == modeDir {
			links = 2
		}
		head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			i+1, f.mode, 0, 0, links, 0, len(f.data), 0, 0, 0, 0, len(f.name)+1, 0, f.name)
		for _, part := range [][]byte{[]byte(head), f.data} {
			if _, err := out.Write(part); err != nil {
				return err
			}
			if _, err := out.Write(make([]byte, (4-len(part)%4)%4)); err != nil {
				return err
			}
		}
	}
	return out.Flush()
}

// moduleOrder returns the files of the named modules and of all they depend on,
// each after what it needs, as modules.dep in dir tells.
func moduleOrder(dir string, names []string) ([]string, error) {
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	// modules.dep names a module's dependencies nearest first.
	needs := map[string][]string{}
	paths := map[string]string{}
	for line := range strings.Lines(string(dep)) {
		path, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		needs[path] = strings.Fields(rest)
		name := strings.TrimSuffix(filepath.Base(path), ".ko")
		paths[strings.ReplaceAll(name, "-", "_")] = path
	}
	var order []string
	taken := map[string]bool{}
	take := func(path string) {
		if !taken[path] {
			taken[path] = true
			order = append(order, filepath.Join(dir, path))
		}
	}
	for _, name := range names {
		path, ok := paths[name]
		if !ok {
			return nil, fmt.Errorf("kernel module %s is not in %s", name, dir)
		}
		for i := len(needs[path]) - 1; i >= 0; i-- {
			take(needs[path][i])
		}
		take(path)
	}
	return order, nil
}
