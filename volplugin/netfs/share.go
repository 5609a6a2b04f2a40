package netfs

import (
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Source is a share as it is written in options type, device and o of Docker's
// local driver, and as it is kept. Options may hold secrets.
type Source struct {
	Type, Device, Options string
}

// maxText bounds each part of a Source, in bytes.
const maxText = 1024

// A Share is a directory of a file server, and how it is to be mounted.
type Share struct {
	source Source
	// cifs tells it from NFS.
	cifs bool
	// server is a name or an address, without brackets; addr replaces it for the
	// connection unless "".
	server, addr string
	// path on the server, clean and absolute. For CIFS its first part is the share's
	// name.
	path string
	// data are options for the file system, in the order given.
	data []option
	// flags of the mount, such as MS_NOATIME.
	flags uintptr
	// access are the flags that every volume gets, see Access.
	access Access
}

// Access is what a mount forbids. It belongs to a volume and not to its share, which
// Berth has to write its records on.
type Access struct {
	ReadOnly, NoSUID, NoDev, NoExec bool
}

// Or forbids what either forbids.
func (a Access) Or(b Access) Access {
	return Access{a.ReadOnly || b.ReadOnly, a.NoSUID || b.NoSUID, a.NoDev || b.NoDev, a.NoExec || b.NoExec}
}

// An option is NAME or NAME=VALUE.
type option struct {
	name, value string
	hasValue    bool
}

func (o option) String() string {
	if o.hasValue {
		return o.name + "=" + o.value
	}
	return o.name
}

// isSecret tells options that nobody is shown.
func (o option) isSecret() bool {
	switch strings.ToLower(o.name) {
	case "password", "pass", "password2":
		return true
	}
	return false
}

// Parse reads a source. Devices are HOST:/PATH, or :/PATH with option addr=HOST, of
// types nfs and nfs4, and //HOST/SHARE[/PATH] of type cifs; IPv6 addresses stand in
// brackets. The error is invalid, names the part, and holds no secret.
func Parse(src Source) (Share, error) {
	for _, part := range []struct{ name, value string }{{"type", src.Type}, {"device", src.Device}, {"o", src.Options}} {
		if len(part.value) > maxText || strings.ContainsFunc(part.value, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }) {
			return Share{}, fault.Invalid("option %s: want at most %d bytes of printable text", part.name, maxText)
		}
	}
	s := Share{source: src, cifs: src.Type == "cifs"}
	if !s.cifs && src.Type != "nfs" && src.Type != "nfs4" {
		return Share{}, fault.Invalid("option type=%.40q: want nfs, nfs4 or cifs", src.Type)
	}
	if err := s.parseOptions(src.Options); err != nil {
		return Share{}, err
	}
	if err := s.parseDevice(src.Device); err != nil {
		return Share{}, err
	}
	return s, nil
}

func (s *Share) parseDevice(device string) error {
	want := func(reason string) error {
		form := "HOST:/PATH, or :/PATH with o=addr=HOST"
		if s.cifs {
			form = "//HOST/SHARE"
		}
		return fault.Invalid("option device=%.200q: %s; want %s for type=%s", device, reason, form, s.source.Type)
	}
	host, rest, ok := strings.Cut(device, ":/")
	if s.cifs {
		host, ok = strings.CutPrefix(strings.ReplaceAll(device, `\`, "/"), "//")
		host, rest, _ = strings.Cut(host, "/")
	}
	if !ok {
		return want("it names no server")
	}
	if slices.Contains(strings.Split(rest, "/"), "..") {
		return want(".. is not allowed")
	}
	s.path = path.Clean("/" + rest)
	if s.cifs && s.path == "/" {
		return want("it names no share")
	}
	if inner, found := strings.CutPrefix(host, "["); found {
		host, found = strings.CutSuffix(inner, "]")
		if address, err := netip.ParseAddr(host); !found || err != nil || !address.Is6() {
			return want("what is in brackets is no IPv6 address")
		}
	} else if strings.ContainsAny(host, ":/[]") {
		return want("the host has a character that none has (an IPv6 address stands in brackets)")
	}
	s.server = strings.ToLower(host)
	if s.server == "" {
		s.server = s.addr
	}
	if s.server == "" || !isHost(s.server) {
		return want("it names no server")
	}
	return nil
}

// isHost is a loose test: what it lets through can be looked up.
func isHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return len(host) <= 253 && !strings.ContainsAny(host, " ,;:/\\[]%\"'") && host[0] != '-'
}

// mountFlags are the options of mount(8) that mount(2) takes as flags; true clears.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"sync": {unix.MS_SYNCHRONOUS, false}, "async": {unix.MS_SYNCHRONOUS, true},
	"dirsync": {unix.MS_DIRSYNC, false},
	"noatime": {unix.MS_NOATIME, false}, "atime": {unix.MS_NOATIME, true},
	"nodiratime": {unix.MS_NODIRATIME, false}, "diratime": {unix.MS_NODIRATIME, true},
	"relatime": {unix.MS_RELATIME, false}, "norelatime": {unix.MS_RELATIME, true},
	"strictatime": {unix.MS_STRICTATIME, false}, "nostrictatime": {unix.MS_STRICTATIME, true},
	"silent": {unix.MS_SILENT, false}, "loud": {unix.MS_SILENT, true},
}

// accessFlags are the options that go to the volume; false allows again.
var accessFlags = map[string]struct {
	field  func(*Access) *bool
	forbid bool
}{
	"ro":     {func(a *Access) *bool { return &a.ReadOnly }, true},
	"rw":     {func(a *Access) *bool { return &a.ReadOnly }, false},
	"nosuid": {func(a *Access) *bool { return &a.NoSUID }, true},
	"suid":   {func(a *Access) *bool { return &a.NoSUID }, false},
	"nodev":  {func(a *Access) *bool { return &a.NoDev }, true},
	"dev":    {func(a *Access) *bool { return &a.NoDev }, false},
	"noexec": {func(a *Access) *bool { return &a.NoExec }, true},
	"exec":   {func(a *Access) *bool { return &a.NoExec }, false},
}

// isForMount8 tells options that only programs such as mount(8), mount.nfs and
// systemd read, and that change nothing here.
func isForMount8(name string) bool {
	switch name {
	case "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "bg", "fg", "retry", "comment":
		return true
	}
	return strings.HasPrefix(name, "x-") || strings.HasPrefix(name, "X-")
}

func (s *Share) parseOptions(text string) error {
	options := splitOptions(text)
	secret := slices.ContainsFunc(options, option.isSecret)
	for _, o := range options {
		shown := fmt.Sprintf("%.60q", o.name)
		if secret {
			shown = "beside a password (a comma in a password is written twice)"
		}
		access, isAccess := accessFlags[o.name]
		flag, isFlag := mountFlags[o.name]
		switch {
		case o.name == "" || strings.ContainsFunc(o.name, isNoOptionRune):
			return fault.Invalid("option o: there is something that is no option: %s", shown)
		case slices.Contains([]string{"bind", "rbind", "move", "remount", "loop", "shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable"}, o.name):
			return fault.Invalid("option o=%s: it does not go with a share", o.name)
		case (isAccess || isFlag) && o.hasValue:
			return fault.Invalid("option o: %s takes no value", o.name)
		case isAccess:
			*access.field(&s.access) = access.forbid
		case isFlag && flag.clear:
			s.flags &^= flag.flag
		case isFlag:
			s.flags |= flag.flag
		case isForMount8(o.name):
		case o.name == "addr" || s.cifs && o.name == "ip":
			s.addr = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(o.value, "["), "]"))
			if s.addr == "" || !isHost(s.addr) {
				return fault.Invalid("option o=addr=%.60q: want a host's name or address", o.value)
			}
		case o.name == "port":
			if port, err := strconv.ParseUint(o.value, 10, 16); err != nil || port == 0 {
				return fault.Invalid("option o=port=%.20q: want a number from 1 to 65535", o.value)
			}
			s.data = append(s.data, o)
		case s.cifs && (o.name == "unc" || o.name == "source" || o.name == "prefixpath"):
			return fault.Invalid("option o: %s is said by device", o.name)
		case isCredentials(o.name) && (!s.cifs || !path.IsAbs(o.value)):
			return fault.Invalid("option o=%s=%.200q: want the absolute path of a file, with type=cifs", o.name, o.value)
		default:
			s.data = append(s.data, o)
		}
	}
	return nil
}

func isCredentials(name string) bool { return name == "credentials" || name == "cred" }

// isNoOptionRune tells what no option's name has.
func isNoOptionRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_.-", r)
}

// splitOptions splits at commas; two commas in a row are one within a value, as for
// mount.cifs.
func splitOptions(text string) []option {
	var options []option
	const comma = "\x00"
	for part := range strings.SplitSeq(strings.ReplaceAll(text, ",,", comma), ",") {
		part = strings.ReplaceAll(part, comma, ",")
		if part == "" {
			continue
		}
		var o option
		o.name, o.value, o.hasValue = strings.Cut(part, "=")
		options = append(options, o)
	}
	return options
}

// Redact replaces the secrets in the text of an option o. What follows a secret may
// be its rest, after a comma that was not written twice, so all of that goes unless
// it is an option's name with a value or one that is known.
func Redact(text string) string {
	var shown []string
	after := false
	for _, o := range splitOptions(text) {
		switch {
		case o.isSecret():
			shown, after = append(shown, o.name+"=***"), true
		case after && !isKnown(o):
			shown = append(shown, "***")
		default:
			o.value = strings.ReplaceAll(o.value, ",", ",,")
			shown = append(shown, o.String())
		}
	}
	return strings.Join(shown, ",")
}

// isKnown tells options that are surely not a piece of a password.
func isKnown(o option) bool {
	_, access := accessFlags[o.name]
	_, flag := mountFlags[o.name]
	if access || flag || isForMount8(o.name) {
		return true
	}
	switch o.name {
	case "vers", "username", "user", "domain", "dom", "workgroup", "uid", "gid", "file_mode", "dir_mode", "addr", "ip", "sec", "port",
		"credentials", "cred", "iocharset", "cache", "seal", "sign", "serverino", "noserverino", "nobrl", "mfsymlinks", "noperm",
		"forceuid", "forcegid", "hard", "soft", "rsize", "wsize", "actimeo", "nosharesock", "nounix", "echo_interval":
		return true
	}
	return false
}

// Source is what the share was parsed from.
func (s Share) Source() Source { return s.source }

// String is the directory in the form of a device, without options and secrets.
func (s Share) String() string {
	host := s.server
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if s.cifs {
		return "//" + host + s.path
	}
	return host + ":" + s.path
}

// ID names the directory on its server, whatever the options are: shares of one ID
// are one directory.
func (s Share) ID() string {
	if s.cifs {
		return "cifs:" + strings.ToLower(s.String())
	}
	return "nfs:" + s.String()
}

// Access is what the options forbid to volumes.
func (s Share) Access() Access { return s.access }

// Same tells whether both are mounted in the same way; secrets and Access are
// passed over.
func (s Share) Same(other Share) bool {
	list := func(s Share) []string {
		names := []string{"addr=" + s.addr, strconv.FormatUint(uint64(s.flags), 10), s.source.Type}
		for _, o := range s.data {
			if !o.isSecret() {
				names = append(names, o.String())
			}
		}
		slices.Sort(names)
		return names
	}
	return s.ID() == other.ID() && slices.Equal(list(s), list(other))
}

// get returns the value of the last of some options that was given.
func (s Share) get(names ...string) (string, bool) {
	for _, o := range slices.Backward(s.data) {
		if slices.Contains(names, o.name) {
			return o.value, true
		}
	}
	return "", false
}

// ParseURL reads the form in which settings name a share:
// nfs://HOST[:PORT]/PATH[?OPTION[,OPTION...]], nfs4:// and cifs://HOST/SHARE in the
// same way. Characters that have a meaning in a URL are escaped with %.
func ParseURL(text string) (Source, error) {
	u, err := url.Parse(text)
	if err != nil {
		return Source{}, fault.Invalid("this is not a URL such as nfs://HOST/PATH?vers=4.2")
	}
	src := Source{Type: u.Scheme}
	switch {
	case u.User != nil:
		return Source{}, fault.Invalid("%s://: a user and a password do not go into the URL; use ?credentials=FILE with cifs", u.Scheme)
	case u.Fragment != "" || u.Opaque != "":
		return Source{}, fault.Invalid("%s://%.100q: want %s://HOST/PATH?OPTION,OPTION", u.Scheme, u.Host, u.Scheme)
	case u.Hostname() == "":
		return Source{}, fault.Invalid("%s://%.100q: it names no server", u.Scheme, u.Path)
	}
	host := u.Hostname()
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	src.Device = host + ":" + u.Path
	if u.Path == "" {
		src.Device += "/"
	}
	if u.Scheme == "cifs" {
		src.Device = "//" + host + u.Path
	}
	if src.Options, err = url.PathUnescape(u.RawQuery); err != nil {
		return Source{}, fault.Invalid("%s://%.100q: the options have a %% that stands for nothing", u.Scheme, u.Host)
	}
	if port := u.Port(); port != "" {
		src.Options = strings.TrimPrefix(src.Options+",port="+port, ",")
	}
	_, err = Parse(src)
	return src, err
}
