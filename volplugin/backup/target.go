package backup

import (
	"cmp"
	"crypto/x509"
	"errors"
	"maps"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/schedule"
)

// Engines that targets name.
const (
	Restic  = "restic"
	Archive = "archive"
)

// A Target is the configuration of one repository, as it is stored. It holds secrets:
// it is never logged or shown as it is.
type Target struct {
	// Name is not stored, but that of the file.
	Name string `json:"-"`
	// Engine is Restic, also when it is "", or Archive.
	Engine string `json:"engine,omitempty"`
	// Repository in the words of the engine: a path as the daemon sees it,
	// "sftp:USER@HOST:/PATH", "rest:https://HOST/", "s3:https://HOST/BUCKET",
	// "b2:BUCKET:PATH", "azure:CONTAINER:/", "gs:BUCKET:/" or "rclone:REMOTE:PATH".
	Repository string `json:"repository"`
	// Password of the repository. Engine Archive has none.
	Password string `json:"password,omitempty"`
	// Environment is what the repository's place needs, AWS_ACCESS_KEY_ID for example.
	Environment map[string]string `json:"environment,omitempty"`
	// Files are contents of files by the names of variables that hold their paths,
	// GOOGLE_APPLICATION_CREDENTIALS for example, or by the names SSHKey and KnownHosts.
	Files map[string]string `json:"files,omitempty"`
	// UploadLimit and DownloadLimit are in KiB/s, 0 for none.
	UploadLimit   int `json:"upload-limit,omitempty"`
	DownloadLimit int `json:"download-limit,omitempty"`
	// PruneSchedule and CheckSchedule are when the space of what was removed is freed
	// and the repository is looked through, as schedule.Parse reads them: "" is once a
	// week, and Never never.
	PruneSchedule string `json:"prune-schedule,omitempty"`
	CheckSchedule string `json:"check-schedule,omitempty"`
	// CheckShare is the share of the data that a scheduled check reads, from 0 to 1.
	CheckShare float64 `json:"check-share,omitempty"`
	// VerifySchedule is when the newest backup of a volume, one chosen by chance, is
	// restored to see whether it can be; "" and Never are never.
	VerifySchedule string `json:"verify-schedule,omitempty"`
}

// Never is the schedule of what is not done.
const Never = "never"

// Names of Files that are not variables.
const (
	// SSHKey is the private key for sftp repositories, KnownHosts the keys of servers.
	SSHKey     = "ssh-key"
	KnownHosts = "known-hosts"
	// CACert are the certificates, in PEM, that a server's has to be signed by; the
	// machine's own are not used then.
	CACert = "ca-cert"
	// CABundle is the same by the name of the variable of S3.
	CABundle = "AWS_CA_BUNDLE"
)

var fileNames = []string{SSHKey, KnownHosts, CACert}

var variable = regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,99}$`)

// FileVariables are the variables that hold the path of a file. Their contents are in
// Files, because a path of the administrator's means nothing to the daemon.
var FileVariables = []string{CABundle, "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "RCLONE_CONFIG"}

// reserved begin the names of variables that would change what Berth asks for.
var reserved = []string{"RESTIC_", "LD_", "PATH", "HOME", "TMPDIR", "XDG_", "GO"}

// allowed are variables of repositories' places that begin like reserved ones.
var allowed = []string{"GOOGLE_PROJECT_ID", "GOOGLE_ACCESS_TOKEN", "RESTIC_REST_USERNAME", "RESTIC_REST_PASSWORD"}

// Check refuses what no engine could work with, without looking at the repository. The
// error is invalid and holds no secret.
func (t Target) Check() error {
	if err := CheckTarget(t.Name); err != nil {
		return err
	}
	wrong := func(format string, args ...any) error {
		return fault.Invalid("target %s: "+format, append([]any{t.Name}, args...)...)
	}
	switch t.engine() {
	case Restic:
		if t.Password == "" {
			return wrong("a password is needed: whoever has the repository but not the password cannot read it")
		}
	case Archive:
		if t.Password != "" {
			return wrong("engine %s does not encrypt: it takes no password", Archive)
		}
	default:
		return wrong("engine %.40q: want %s or %s", t.Engine, Restic, Archive)
	}
	if err := t.checkRepository(); err != nil {
		return err
	}
	if strings.ContainsAny(t.Password, "\x00\n\r") {
		return wrong("the password has more than one line")
	}
	for _, name := range slices.Sorted(maps.Keys(t.Environment)) {
		if !variable.MatchString(name) {
			return wrong("variable %.80q: want capital letters, digits and _", name)
		}
		for _, prefix := range reserved {
			if strings.HasPrefix(name, prefix) && !slices.Contains(allowed, name) {
				return wrong("variable %s cannot be set", name)
			}
		}
		if slices.Contains(FileVariables, name) {
			return wrong("variable %s holds the path of a file: give the file itself, as %s=@FILE", name, name)
		}
		if strings.ContainsRune(t.Environment[name], 0) {
			return wrong("variable %s has a byte 0", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Files)) {
		if known := slices.Concat(fileNames, FileVariables); !slices.Contains(known, name) {
			return wrong("file %.80q: can be %s", name, strings.Join(known, ", "))
		}
	}
	if key, given := t.Files[SSHKey]; given {
		var locked *ssh.PassphraseMissingError
		// What only ssh understands is left to it.
		if _, err := ssh.ParseRawPrivateKey([]byte(key)); errors.As(err, &locked) {
			return wrong("%s: the key has a passphrase, and nobody is there to type it: ssh-keygen -p -f FILE removes it", SSHKey)
		}
		if !strings.Contains(key, "PRIVATE KEY-----") {
			return wrong("%s: this is no private key: want the file without .pub", SSHKey)
		}
	}
	if certificates := t.Authorities(); certificates != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(certificates)) {
		return wrong("%s: want certificates in PEM", CACert)
	}
	for name, limit := range map[string]int{"upload": t.UploadLimit, "download": t.DownloadLimit} {
		if limit < 0 {
			return wrong("%s limit %d: want KiB/s, or 0 for none", name, limit)
		}
	}
	for name, spec := range map[string]string{"prune": t.PruneSchedule, "check": t.CheckSchedule, "verify": t.VerifySchedule} {
		if spec == "" || spec == Never {
			continue
		}
		if _, err := schedule.Parse(spec); err != nil {
			return wrong("%s schedule %.60q: %w; or %s", name, spec, err, Never)
		}
	}
	if t.CheckShare < 0 || t.CheckShare > 1 {
		return wrong("check share %g: want a number from 0 to 1", t.CheckShare)
	}
	return nil
}

func (t Target) engine() string {
	if t.Engine == "" {
		return Restic
	}
	return t.Engine
}

// EngineName is Restic or Archive.
func (t Target) EngineName() string { return t.engine() }

// kinds are the places that an engine knows, by the words before the first colon.
var kinds = map[string][]string{
	Restic:  {"local", "sftp", "rest", "s3", "b2", "azure", "gs", "swift", "rclone"},
	Archive: {"local", "s3"},
}

// forms are what follows the first colon of a repository, and how that is told. restic says the
// same later, or nothing for long.
var forms = map[string]struct {
	pattern *regexp.Regexp
	want    string
}{
	"sftp":   {regexp.MustCompile(`^([^/:]+:.+|//[^/]*[^/@]/.+)$`), "sftp:USER@HOST:/DIRECTORY, or sftp://USER@HOST:PORT//DIRECTORY"},
	"rest":   {regexp.MustCompile(`^(https?://[^/]*[^/@](/.*)?|http\+unix:///.+)$`), "rest:https://HOST/, or rest:https://USER:PASSWORD@HOST:PORT/PATH/"},
	"s3":     {regexp.MustCompile(`^((https?:)?//)?[^/:]+(:[^/]+)?/+[^/].*$`), "s3:https://HOST/BUCKET, or s3:https://HOST:PORT/BUCKET/PATH"},
	"b2":     {regexp.MustCompile(`^[^:/]+(:.*)?$`), "b2:BUCKET:PATH"},
	"azure":  {regexp.MustCompile(`^[^:/]+:.*$`), "azure:CONTAINER:/PATH"},
	"gs":     {regexp.MustCompile(`^[^:/]+:.*$`), "gs:BUCKET:/PATH"},
	"swift":  {regexp.MustCompile(`^[^:/]+:/.*$`), "swift:CONTAINER:/PATH"},
	"rclone": {regexp.MustCompile(`^[^:]+:.*$`), "rclone:REMOTE:PATH"},
}

// Kind is the kind of place of the repository, "local" for a path.
func (t Target) Kind() string {
	kind, _, ok := strings.Cut(t.Repository, ":")
	if !ok || strings.HasPrefix(t.Repository, "/") {
		return "local"
	}
	return kind
}

func (t Target) checkRepository() error {
	shown := Redact(t.Repository)
	if t.Repository == "" || strings.HasPrefix(t.Repository, "-") || strings.ContainsAny(t.Repository, "\x00\n\r") {
		return fault.Invalid("target %s: repository %.200q: want a path or KIND:PLACE", t.Name, shown)
	}
	known := kinds[t.engine()]
	if !slices.Contains(known, t.Kind()) {
		return fault.Invalid("target %s: repository %.200q: engine %s takes an absolute path, or one of %s before a colon", t.Name, shown, t.engine(), strings.Join(known[1:], ", "))
	}
	if t.Kind() == "local" {
		path := strings.TrimPrefix(t.Repository, "local:")
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return fault.Invalid("target %s: repository %.200q: want an absolute path without . and .. and with single slashes", t.Name, shown)
		}
		return nil
	}
	_, place, _ := strings.Cut(t.Repository, ":")
	if form := forms[t.Kind()]; !form.pattern.MatchString(place) {
		return fault.Invalid("target %s: repository %.200q: want %s", t.Name, shown, form.want)
	}
	return nil
}

// Authorities are certificates in PEM, one of which a server's has to be signed by; "" are
// those of the machine.
func (t Target) Authorities() string { return cmp.Or(t.Files[CACert], t.Files[CABundle]) }

// Secrets are the texts that must not be shown.
func (t Target) Secrets() []string {
	secrets := []string{t.Password}
	for _, m := range []map[string]string{t.Environment, t.Files} {
		secrets = slices.AppendSeq(secrets, maps.Values(m))
	}
	if _, place, ok := strings.Cut(t.Repository, ":"); ok {
		if u, err := url.Parse(place); err == nil && u.User != nil {
			if password, ok := u.User.Password(); ok {
				secrets = append(secrets, password, url.QueryEscape(password))
			}
		}
	}
	return slices.DeleteFunc(secrets, func(s string) bool { return len(s) < 4 })
}

// Redact gives a repository without the password that a URL may hold.
func Redact(repository string) string {
	kind, place, ok := strings.Cut(repository, ":")
	if !ok || !strings.Contains(place, "://") {
		return repository
	}
	u, err := url.Parse(place)
	if err != nil {
		// It may hold one all the same.
		return kind + ":…"
	}
	if _, has := u.User.Password(); !has {
		return repository
	}
	return kind + ":" + u.Redacted()
}
