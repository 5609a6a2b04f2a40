package volplugin

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/netfs"
)

func TestParseRoots(t *testing.T) {
	roots, err := ParseRoots("  fast=/data/fast\tnas.2=/srv/a=b,c \n")
	assert.NilError(t, err)
	assert.DeepEqual(t, roots, []NamedRoot{{Name: "fast", Path: "/data/fast"}, {Name: "nas.2", Path: "/srv/a=b,c"}})
	roots, err = ParseRoots("nas=nfs://nas.lan/export/v?vers=4.2,noatime win=cifs://win/share?credentials=/state/win")
	assert.NilError(t, err)
	assert.DeepEqual(t, roots, []NamedRoot{
		{Name: "nas", Share: &netfs.Source{Type: "nfs", Device: "nas.lan:/export/v", Options: "vers=4.2,noatime"}},
		{Name: "win", Share: &netfs.Source{Type: "cifs", Device: "//win/share", Options: "credentials=/state/win"}},
	})
	roots, err = ParseRoots(" ")
	assert.NilError(t, err)
	assert.Equal(t, len(roots), 0)
}

func TestRootsThatAreRefused(t *testing.T) {
	for setting, want := range map[string]string{
		"/data/fast":                        `root "/data/fast": want NAME=/PATH`,
		"fast=":                             "want an absolute path",
		"fast=data":                         `root fast="data": want an absolute path`,
		"fast=/data/../etc":                 "without . and ..",
		"fast=/data//x":                     "single slashes",
		"fast=/data/":                       "single slashes",
		"=/data":                            `root name ""`,
		"../x=/data":                        `root name "../x"`,
		"a=/a a=/b":                         "given twice",
		"default=/a":                        "the root that is always there",
		strings.Repeat("x", 33) + "=/data":  "at most 32",
		"nas=nfs://":                        `root "nas": nfs://"": it names no server`,
		"nas=ftp://nas/x":                   "want nfs, nfs4 or cifs",
		"nas=cifs://u:hunter2@nas/x":        "credentials=FILE",
		"fast=/data,slow=/slow fast=/other": "given twice",
	} {
		_, err := ParseRoots(setting)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", setting, err)
		assert.ErrorContains(t, err, want)
	}
}

func TestRootsInEachOthersWay(t *testing.T) {
	for _, roots := range [][]NamedRoot{
		{{Name: "a", Path: "/data"}},
		{{Name: "a", Path: "/x"}, {Name: "b", Path: "/x"}},
		{{Name: "a", Path: "/x"}, {Name: "a", Path: "/y"}},
		{{Name: "a", Path: "/data/.berth"}},
		{{Name: "a", Path: "/data/.berth/trash/x"}},
		{{Name: "a", Path: "x"}},
	} {
		err := (&Config{Root: "/data", Roots: roots}).checkRoots()
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v: %v", roots, err)
	}
	assert.NilError(t, (&Config{Root: "/data", Roots: []NamedRoot{{Name: "a", Path: "/data/a"}, {Name: "b", Path: "/database"}}}).checkRoots())
}

func FuzzParseRoots(f *testing.F) {
	for _, seed := range []string{"fast=/data/fast nas=/srv/nas", "a=/a a=/b", "=", "a=/\x00", "default=/x", "n=nfs://nas/e?vers=4.2 b=/c"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, setting string) {
		roots, err := ParseRoots(setting)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\r\x00"), "%q", err)
			return
		}
		back := []string{}
		for _, root := range roots {
			assert.NilError(t, root.check())
			if root.Share != nil {
				_, err := netfs.Parse(*root.Share)
				assert.NilError(t, err)
				return
			}
			back = append(back, root.Name+"="+root.Path)
		}
		assert.DeepEqual(t, back, strings.Fields(setting))
	})
}
