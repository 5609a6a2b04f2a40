package restic

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// Config of an engine.
type Config struct {
	// Target is the repository. It must have passed its Check.
	Target backup.Target
	// Binary is the path of restic 0.17 or newer; "" looks for it as Find does.
	Binary string
	// Dir is a directory of Berth's own on this host, the same for all targets and
	// always the same: leases, restic's cache and temporary files are kept in it. It is
	// made when it is missing.
	Dir string
	// Host is the name of this host, for the locks in the repository.
	Host string
	// Nice is the niceness of restic from 0 to 19, which the kernel's priority of
	// reading and writing follows.
	Nice int
	// Processors is how many restic keeps busy at most, 0 for its own choice.
	Processors int
	// LockWait is how long a call waits for a repository that is locked; 0 is a minute.
	LockWait time.Duration
	// ListWait is for how long List asks a repository again that does not answer; 0 is
	// twenty seconds. Somebody may wait for a list, where restic goes on for a quarter of
	// an hour.
	ListWait time.Duration
	// Log is told what is removed and retried.
	Log *logrus.Entry
}

const (
	defaultLockWait = time.Minute
	defaultListWait = 20 * time.Second
	// grace is how long an interrupted restic may take to remove its lock.
	grace = 15 * time.Second
)

// An Engine keeps backups in one restic repository.
type Engine struct {
	Config
	redact  *strings.Replacer
	version func() error // says what is wrong with the binary
}

var _ backup.Engine = (*Engine)(nil)

// dirName is what may be in Config.Dir: ssh takes other characters in a path for its own.
var dirName = regexp.MustCompile(`^/[A-Za-z0-9/._+-]*$`)

// New makes an engine. It does not look at the repository; the program must call Child first
// of all in main.
func New(c Config) (*Engine, error) {
	if c.Target.EngineName() != backup.Restic {
		return nil, fault.Invalid("target %s: engine %.40q: want %s", c.Target.Name, c.Target.Engine, backup.Restic)
	}
	if !dirName.MatchString(c.Dir) {
		return nil, fault.Invalid("directory %.200q: want an absolute path of letters, digits and . _ + -", c.Dir)
	}
	if c.Nice < 0 || c.Nice > 19 {
		return nil, fault.Invalid("niceness %d: want 0 to 19", c.Nice)
	}
	if c.LockWait == 0 {
		c.LockWait = defaultLockWait
	}
	if c.ListWait == 0 {
		c.ListWait = defaultListWait
	}
	if c.Binary == "" {
		path, err := Find()
		if err != nil {
			return nil, err
		}
		c.Binary = path
	}
	for _, dir := range []string{c.Dir, filepath.Join(c.Dir, leasesDir), filepath.Join(c.Dir, runsDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fault.Unavailable("backups: %w", err)
		}
	}
	e := &Engine{Config: c, redact: redactor(c.Target)}
	e.version = sync.OnceValue(e.checkVersion)
	return e, nil
}

// Find looks for restic beside this program, where the plugins have it, and in PATH.
func Find() (string, error) {
	var tried []string
	if self, err := os.Executable(); err == nil {
		tried = append(tried, filepath.Join(filepath.Dir(self), "restic"))
	}
	for _, path := range append(tried, "restic", "/usr/bin/restic", "/usr/local/bin/restic") {
		if found, err := exec.LookPath(path); err == nil && filepath.IsAbs(found) {
			return found, nil
		}
	}
	return "", fault.Unavailable("the program restic is not installed where berthd runs: put it beside berthd")
}

var versionLine = regexp.MustCompile(`^restic (\d+)\.(\d+)\.(\d+)`)

// checkVersion refuses what does not tell its errors apart. It runs no namespace: nothing
// secret and no lock is involved.
func (e *Engine) checkVersion() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // of no single call
	defer cancel()
	cmd := exec.CommandContext(ctx, e.Binary, "version")
	cmd.Env = []string{"PATH=" + path, "HOME=/nonexistent"}
	out, err := cmd.Output()
	if err != nil {
		return fault.Unavailable("run %s version: %w", e.Binary, err)
	}
	return tooOld(e.Binary, string(out))
}

func tooOld(binary, line string) error {
	m := versionLine.FindStringSubmatch(line)
	if m == nil {
		return fault.Unavailable("%s does not say which version of restic it is: %.80q", binary, line)
	}
	if m[1] == "0" && len(m[2]) <= 2 && (len(m[2]) < 2 || m[2] < "17") {
		return fault.Unavailable("%s is restic %s.%s.%s: 0.17 or newer is needed, which tells its errors apart", binary, m[1], m[2], m[3])
	}
	return nil
}

// redactor replaces what must not be shown.
func redactor(t backup.Target) *strings.Replacer {
	var pairs []string
	for _, secret := range t.Secrets() {
		pairs = append(pairs, secret, "***")
		// A program may quote one line of a file.
		for line := range strings.Lines(secret) {
			if line = strings.TrimSpace(line); line != secret && len(line) >= 16 {
				pairs = append(pairs, line, "***")
			}
		}
	}
	if shown := backup.Redact(t.Repository); shown != t.Repository {
		pairs = append(pairs, t.Repository, shown)
	}
	return strings.NewReplacer(pairs...)
}

// repositoryKey stands for the repository in names of files.
func (e *Engine) repositoryKey() string {
	sum := sha256.Sum256([]byte(e.Target.Repository))
	return hex.EncodeToString(sum[:8])
}

// fail says what failed. Callers know the target, and name it.
func fail(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
