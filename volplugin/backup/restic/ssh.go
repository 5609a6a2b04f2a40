package restic

import (
	"errors"
	"os"
	"strings"

	"github.com/berth-plugin/berth/volplugin/backup"
)

const (
	// sshLog is what ssh writes to instead of its error output: restic often ends before it
	// has read that, and then nothing says that a server has another key.
	sshLog = "ssh.log"
	// sshWords is how many of the last lines of that are told.
	sshWords = 2
)

// ssh gives the arguments for the program ssh. It never asks, and never trusts a server whose key
// it does not know.
func (e *Engine) ssh(p *private) string {
	args := "-oBatchMode=yes -oStrictHostKeyChecking=yes -oServerAliveInterval=30 -oServerAliveCountMax=4 -E " + p.path(sshLog)
	if _, ok := e.Target.Files[backup.SSHKey]; ok {
		args += " -oIdentitiesOnly=yes -oIdentityFile=" + p.path(backup.SSHKey)
	}
	if _, ok := e.Target.Files[backup.KnownHosts]; ok {
		args += " -oGlobalKnownHostsFile=none -oUserKnownHostsFile=" + p.path(backup.KnownHosts)
	}
	return args
}

// sshSaid puts what ssh has said before the words of a restic that failed.
func (e *Engine) sshSaid(p *private, err error) error {
	var exit *exitError
	if e.Target.Kind() != "sftp" || !errors.As(err, &exit) {
		return err
	}
	text, _ := os.ReadFile(p.path(sshLog)) // there is none when ssh was not started
	var said []string
	for line := range strings.Lines(strings.ReplaceAll(string(text), p.path("")+"/", "")) {
		line = cut(strings.TrimSpace(line), maxTailLine)
		if line = strings.TrimPrefix(line, "ssh: "); line != "" && !strings.HasPrefix(line, "@") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return err
	}
	said = said[max(0, len(said)-sshWords):]
	for _, name := range []string{backup.SSHKey, backup.KnownHosts} {
		if _, ok := e.Target.Files[name]; !ok {
			said = append(said, "the target has no --"+name)
		}
	}
	exit.text = e.redact.Replace("ssh: "+strings.Join(said, "; ")) + "; " + exit.text
	return err
}
