package netfs

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func parse(t testing.TB, kind, device, o string) Share {
	t.Helper()
	s, err := Parse(Source{kind, device, o})
	assert.NilError(t, err)
	return s
}

func TestFormsOfADevice(t *testing.T) {
	for _, tc := range []struct{ kind, device, o, shown, id string }{
		{"nfs", "nas:/export", "", "nas:/export", "nfs:nas:/export"},
		{"nfs4", "NAS.lan:/export//a/", "", "nas.lan:/export/a", "nfs:nas.lan:/export/a"},
		{"nfs", ":/export", "addr=10.0.0.9,rw", "10.0.0.9:/export", "nfs:10.0.0.9:/export"},
		{"nfs", ":/export", "rw,addr=nas", "nas:/export", "nfs:nas:/export"},
		{"nfs", "nas:/export", "addr=10.0.0.9", "nas:/export", "nfs:nas:/export"},
		{"nfs", "nas:/", "", "nas:/", "nfs:nas:/"},
		{"nfs", "[fd00::1]:/export", "", "[fd00::1]:/export", "nfs:[fd00::1]:/export"},
		{"nfs", ":/export", "addr=[fd00::1]", "[fd00::1]:/export", "nfs:[fd00::1]:/export"},
		{"cifs", "//nas/Share", "", "//nas/Share", "cifs://nas/share"},
		{"cifs", `\\nas\share\dir`, "", "//nas/share/dir", "cifs://nas/share/dir"},
		{"cifs", "//nas/share/", "addr=10.0.0.9", "//nas/share", "cifs://nas/share"},
	} {
		s := parse(t, tc.kind, tc.device, tc.o)
		assert.Equal(t, s.String(), tc.shown)
		assert.Equal(t, s.ID(), tc.id)
		assert.Equal(t, s.Source(), Source{tc.kind, tc.device, tc.o})
	}
}

func TestSharesThatAreRefused(t *testing.T) {
	for _, tc := range []struct{ kind, device, o, want string }{
		{"", "nas:/export", "", "type"},
		{"btrfs", "nas:/export", "", "want nfs, nfs4 or cifs"},
		{"nfs", "", "", "names no server"},
		{"nfs", "/export", "", "names no server"},
		{"nfs", ":/export", "", "names no server"},
		{"nfs", "nas:export", "", "names no server"},
		{"nfs", "nas:/a/../../etc", "", ".."},
		{"nfs", "fd00::1:/export", "", "brackets"},
		{"nfs", "[nas]:/export", "", "brackets"},
		{"nfs", "na s:/export", "", "names no server"},
		{"nfs", "nas,x:/export", "", "names no server"},
		{"cifs", "nas/share", "", "//HOST/SHARE"},
		{"cifs", "//nas", "", "names no share"},
		{"cifs", "//nas/", "", "names no share"},
		{"cifs", "///share", "", "names no server"},
		{"nfs", "nas:/e", "bind", "does not go with a share"},
		{"nfs", "nas:/e", "remount,rw", "does not go with a share"},
		{"nfs", "nas:/e", "addr=", "addr"},
		{"nfs", "nas:/e", "addr=a b", "addr"},
		{"nfs", "nas:/e", "port=0", "port"},
		{"nfs", "nas:/e", "port=x", "port"},
		{"nfs", "nas:/e", "ro=1", "takes no value"},
		{"nfs", "nas:/e", "v ers=4", "no option"},
		{"nfs", "nas:/e", "=4", "no option"},
		{"nfs", "nas:/e\n", "", "device"},
		{"nfs", "nas:/e", "x=\x00", "option o"},
		{"nfs", "nas:/e", strings.Repeat("x", 2000), "at most"},
		{"nfs", "nas:/e", "credentials=/f", "type=cifs"},
		{"cifs", "//nas/s", "credentials=f", "absolute path"},
		{"cifs", "//nas/s", "unc=//x/y", "device"},
	} {
		_, err := Parse(Source{tc.kind, tc.device, tc.o})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v: %v", tc, err)
		assert.ErrorContains(t, err, tc.want)
	}
}

func TestOptionsGoWhereTheyBelong(t *testing.T) {
	s := parse(t, "nfs", "nas:/e", "rw,ro,nosuid,nodev,noexec,exec,vers=4.1,soft,_netdev,x-systemd.automount,bg,noatime,defaults,retry=2")
	assert.Equal(t, s.Access(), Access{ReadOnly: true, NoSUID: true, NoDev: true})
	assert.Equal(t, s.flags, uintptr(1024)) // MS_NOATIME
	assert.Equal(t, s.nfsData("", mustAddr("10.0.0.9")), "vers=4.1,soft,addr=10.0.0.9")
	assert.Equal(t, Access{ReadOnly: true}.Or(Access{NoExec: true}), Access{ReadOnly: true, NoExec: true})
}

func TestSecretsAreNotShown(t *testing.T) {
	for o, want := range map[string]string{
		"username=me,password=hunter2,vers=3.0": "username=me,password=***,vers=3.0",
		"pass=hunter2":                          "pass=***",
		"PASSWORD=hunter2,ro":                   "PASSWORD=***,ro",
		"password=hunter2,,hunter3,uid=0":       "password=***,uid=0",
		// A comma that was not doubled: the rest looks like an option.
		"password=hunter2,hunter3":            "password=***,***",
		"password=hunter2,hunter3=x,soft":     "password=***,***,soft",
		"vers=4.2,soft,a=b,,c":                "vers=4.2,soft,a=b,,c",
		"username=me,password2=hunter2,sec=x": "username=me,password2=***,sec=x",
		"":                                    "",
	} {
		assert.Equal(t, Redact(o), want)
	}
	for _, o := range []string{"password=hunter2,hunter 3", "port=x,password=hunter2", "password=hunter2,=hunter3"} {
		_, err := Parse(Source{"cifs", "//nas/s", o})
		assert.Assert(t, err != nil)
		assert.Assert(t, !strings.Contains(err.Error(), "hunter"), "%v", err)
	}
	s := parse(t, "cifs", "//nas/s", "password=hunter2")
	assert.Assert(t, !strings.Contains(s.String()+s.ID(), "hunter2"))
}

func TestSharesThatAreMountedTheSameWay(t *testing.T) {
	a := parse(t, "cifs", "//nas/s", "vers=3.0,password=a,ro")
	assert.Assert(t, a.Same(parse(t, "cifs", "//NAS/s/", "password=b,vers=3.0,nodev")))
	assert.Assert(t, !a.Same(parse(t, "cifs", "//nas/s", "vers=3.1")))
	assert.Assert(t, !a.Same(parse(t, "cifs", "//nas/t", "vers=3.0")))
	assert.Assert(t, !a.Same(parse(t, "cifs", "//nas/s", "vers=3.0,noatime")))
	assert.Assert(t, !a.Same(parse(t, "cifs", "//nas/s", "vers=3.0,addr=10.0.0.9")))
}

func TestURLs(t *testing.T) {
	for text, want := range map[string]Source{
		"nfs://nas/export":                        {"nfs", "nas:/export", ""},
		"nfs://nas":                               {"nfs", "nas:/", ""},
		"nfs4://nas/a%20b?vers=4.2,soft":          {"nfs4", "nas:/a b", "vers=4.2,soft"},
		"nfs://[fd00::1]:2050/e?soft":             {"nfs", "[fd00::1]:/e", "soft,port=2050"},
		"cifs://nas/share/dir?credentials=/state": {"cifs", "//nas/share/dir", "credentials=/state"},
	} {
		src, err := ParseURL(text)
		assert.NilError(t, err)
		assert.Equal(t, src, want)
	}
	for text, want := range map[string]string{
		"nfs:///export":             "names no server",
		"nfs://me:hunter2@nas/e":    "credentials=FILE",
		"cifs://nas":                "names no share",
		"http://nas/e":              "want nfs, nfs4 or cifs",
		"nfs://nas/e#x":             "want nfs://",
		"nfs://nas/e?a=%zz":         "stands for nothing",
		"nfs://nas/../e":            "..",
		"nfs://nas:port/e":          "not a URL",
		"nfs:nas":                   "want nfs://",
		"nfs://nas/e?bind":          "does not go",
		"cifs://nas/s?password=a b": "",
	} {
		_, err := ParseURL(text)
		if want == "" {
			continue // a secret in a setting is the operator's to have
		}
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", text, err)
		assert.ErrorContains(t, err, want)
		assert.Assert(t, !strings.Contains(err.Error(), "hunter2"))
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []Source{
		{"nfs", "nas:/export", "vers=4.2,ro"}, {"nfs", ":/e", "addr=[fd00::1]"}, {"cifs", `\\nas\s\d`, "username=u,password=a,,b"},
		{"nfs4", "[::1]:/", "port=1"}, {"nfs", "a:/../x", "bind"}, {"cifs", "//a/b", "credentials=/x"},
	} {
		f.Add(seed.Type, seed.Device, seed.Options)
	}
	f.Fuzz(func(t *testing.T, kind, device, o string) {
		src := Source{kind, device, o}
		s, err := Parse(src)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\r\x00"), "%q", err)
			return
		}
		assert.Equal(t, s.Source(), src)
		assert.Assert(t, strings.HasPrefix(s.path, "/") && !strings.Contains(s.path+"/", "/../"), "%q", s.path)
		// What is shown is a device of the same directory.
		again, err := Parse(Source{kind, s.String(), o})
		assert.NilError(t, err, "%q", s.String())
		assert.Equal(t, again.ID(), s.ID())
		assert.Assert(t, s.Same(s))
		// The kernel gets a list, and commas in values do not make more of it.
		if !s.cifs {
			assert.Assert(t, strings.HasSuffix(s.nfsData("4.2", mustAddr("10.0.0.9")), "vers=4.2,addr=10.0.0.9"))
		}
		shown := Redact(o)
		assert.Equal(t, Redact(shown), shown)
	})
}

func FuzzParseURL(f *testing.F) {
	for _, seed := range []string{"nfs://nas/export?vers=4.2", "cifs://u:p@nas/s", "nfs://[fd00::1]:1/e", "nfs:x", "://", "nfs4://a/%2e%2e/b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		src, err := ParseURL(text)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\r\x00"), "%q", err)
			return
		}
		_, err = Parse(src)
		assert.NilError(t, err)
	})
}
