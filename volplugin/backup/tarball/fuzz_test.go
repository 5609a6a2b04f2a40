package tarball_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// tarOf makes an archive of headers, each a text of type, name, target, content and
// records with the byte 0 between.
func tarOf(script string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for line := range strings.SplitSeq(script, "\n") {
		field := append(strings.SplitN(line, "|", 6), "", "", "", "", "", "")
		h := &tar.Header{Format: tar.FormatPAX, Name: field[1], Linkname: field[2], Mode: 0o644, PAXRecords: map[string]string{}}
		if field[0] != "" {
			h.Typeflag = field[0][0]
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(field[3]))
		}
		if field[4] != "" {
			h.PAXRecords[field[4]] = field[5]
		}
		if w.WriteHeader(h) == nil && h.Size > 0 {
			_, _ = w.Write([]byte(field[3]))
		}
	}
	_ = w.Close()
	return b.Bytes()
}

var scripts = []string{
	"5|data/|||\n0|data/f||content|SCHILY.xattr.user.a%3Db|v",
	"5|data/|||SCHILY.acl.default|user::rwx,user:7:r-x,group::r-x,mask::rwx,other::r--\n0|data/f||x||\n1|data/g|data/f|||",
	"5|data|||\n2|data/l|/outside|||\n0|data/l/f||x||",
	"0|data/f||x||\n0|data/f|||BERTH.missing|gone\n1|data/g|data/f|||",
	"5|../x|||\n0|/abs||x||\n6|data/p|||\n3|data/c|||\n4|data/b|||",
	"2|data/l|../../outside|||\n1|data/h|data/l|||\n0|data/h||changed||",
	"0|manifest.json||{}||\n0|a||x|GNU.sparse.realsize|9223372036854775807",
}

// FuzzExtract gives what may be an archive to Extract: however it ends, nothing beside the
// directory is there or changed afterwards.
func FuzzExtract(f *testing.F) {
	for _, script := range scripts {
		f.Add(script, []byte(nil), true)
		f.Add(script, tarOf(script), false)
	}
	top := mounttest.Tmpfs(f, 32<<20)
	outside := filepath.Join(top, "outside")
	f.Fuzz(func(t *testing.T, script string, data []byte, made bool) {
		if made {
			data = tarOf(script)
		}
		for i, layout := range []tarball.Layout{tarball.Detect, tarball.Volume, tarball.Foreign} {
			name := fmt.Sprint("in", i)
			in := filepath.Join(top, name)
			if err := errors.Join(os.WriteFile(outside, []byte("outside"), 0o600), os.Mkdir(in, 0o700)); err != nil {
				t.Fatal(err)
			}
			dst := open(t, in)
			// An error is as good.
			_, _ = tarball.Extract(t.Context(), bytes.NewReader(data), dst, tarball.Options{Layout: layout, Strip: i / 2, MaxBytes: 16 << 20})
			text, err := os.ReadFile(outside)
			if err != nil || string(text) != "outside" {
				t.Errorf("outside: %q %v", text, err)
			}
			entries, err := os.ReadDir(top)
			if err != nil || len(entries) != 2 {
				t.Errorf("beside the directory: %v %v", entries, err)
			}
			remove(t, top, name)
		}
	})
}

func remove(t *testing.T, top, name string) {
	t.Helper()
	dir, err := rooted.Open(top)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := dir.RemoveTree(t.Context(), name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// What an ACL says in words is what it says in bytes.
func FuzzACL(f *testing.F) {
	for _, text := range []string{
		"user::rwx,user:1000:rw-,group::r-x,group:7:---,mask::rwx,other::r--", "u::rwx\ng::r-x # comment\no::---", "user:lisa:rw-:1000", "user:lisa:rw-",
		"mask:7:rwx", ":::", "user::rwxrwx", "",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		value, err := tarball.ParseACL(text)
		if err != nil {
			return
		}
		words, err := tarball.ACLText(value)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		again, err := tarball.ParseACL(words)
		if err != nil || !bytes.Equal(again, value) {
			t.Fatalf("%q: %q: %v", text, words, err)
		}
	})
}
