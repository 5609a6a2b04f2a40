package commands

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/term"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

const (
	// maxSecret bounds a file that is read for a target, in bytes.
	maxSecret = 256 << 10
	// fromInput is the file name that means standard input.
	fromInput = "-"
)

// secretOptions are the flags of a target that name files or hold secrets. No error has
// a secret in it.
type secretOptions struct {
	passwordFile, sshKey, knownHosts, caCert string
	variables                                []string
}

// read puts what the flags name into spec.
func (o *secretOptions) read(ctx context.Context, a *app, spec *control.TargetSpec) (err error) {
	spec.Environment, spec.Files = make(map[string]string), make(map[string]string)
	for i, text := range o.variables {
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			// The word may be a secret by mistake.
			return fault.Invalid("--env: word %d: want KEY=VALUE or KEY=@FILE", i+1)
		}
		if err := a.readVariable(spec, name, value); err != nil {
			return err
		}
	}
	if o.sshKey != "" {
		if spec.Files[backup.SSHKey], err = a.readSecret("--ssh-key", o.sshKey); err != nil {
			return err
		}
	}
	if o.knownHosts != "" {
		if spec.Files[backup.KnownHosts], _, err = readFile("--known-hosts", o.knownHosts); err != nil {
			return err
		}
	}
	if o.caCert != "" {
		if spec.Files[backup.CACert], _, err = readFile("--ca-cert", o.caCert); err != nil {
			return err
		}
	}
	spec.Password, err = o.password(ctx, a, spec.Engine)
	return err
}

// readVariable reads one --env: the file of a variable that holds a path, or else a
// value, which may be in a file too.
func (a *app) readVariable(spec *control.TargetSpec, name, value string) error {
	flag := "--env " + name
	_, set := spec.Environment[name]
	_, sent := spec.Files[name]
	if set || sent {
		return fault.Invalid("%s: want each variable once", flag)
	}
	path, inFile := strings.CutPrefix(value, "@")
	isPath := slices.Contains(backup.FileVariables, name)
	if isPath && !inFile {
		return fault.Invalid("%s: the daemon does not see your files: want the file itself, as %s=@FILE", flag, name)
	}
	if !inFile {
		spec.Environment[name] = value
		return nil
	}
	var text string
	var err error
	if name == backup.CABundle { // no secret
		text, _, err = readFile(flag, path)
	} else {
		text, err = a.readSecret(flag, path)
	}
	if err != nil {
		return err
	}
	if isPath {
		spec.Files[name] = text
		return nil
	}
	spec.Environment[name] = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
	return nil
}

// password returns the repository's password, which an engine may have none of.
func (o *secretOptions) password(ctx context.Context, a *app, engine string) (string, error) {
	const flag = "--password-file"
	if engine == backup.Archive {
		if o.passwordFile != "" {
			return "", fault.Invalid("%s %s: the engine %s does not encrypt and takes no password", flag, o.passwordFile, backup.Archive)
		}
		return "", nil
	}
	var text string
	var err error
	switch o.passwordFile {
	case "":
		return a.askPassword(ctx)
	case fromInput:
		text, err = readAll(flag, fromInput, a.Docker.In())
	default:
		text, err = a.readSecret(flag, o.passwordFile)
	}
	if err != nil {
		return "", err
	}
	// As restic reads such a file, so that it opens the repository with the same one.
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return "", fault.Invalid("%s %s: there is no password in it", flag, o.passwordFile)
	case strings.ContainsAny(text, "\n\r\x00"):
		return "", fault.Invalid("%s %s: want a single line", flag, o.passwordFile)
	}
	return text, nil
}

// readSecret reads a file that nobody else should be able to read.
func (a *app) readSecret(flag, path string) (string, error) {
	text, mode, err := readFile(flag, path)
	if err == nil && mode.IsRegular() && mode.Perm()&0o004 != 0 {
		fmt.Fprintf(a.Docker.Err(), "WARNING: %s %s: everybody on this machine can read the file (mode %#o)\n", flag, path, mode.Perm())
	}
	return text, err
}

func readFile(flag, path string) (text string, mode os.FileMode, _ error) {
	file, err := os.Open(path)
	if err != nil {
		return "", 0, unreadable(flag, path, err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", 0, unreadable(flag, path, err)
	}
	text, err = readAll(flag, path, file)
	return text, info.Mode(), err
}

func readAll(flag, path string, from io.Reader) (string, error) {
	var text bytes.Buffer
	n, err := text.ReadFrom(io.LimitReader(from, maxSecret+1))
	if err != nil {
		return "", unreadable(flag, path, err)
	}
	if n > maxSecret {
		return "", fault.Invalid("%s %s: want a file of at most %d bytes", flag, path, maxSecret)
	}
	return text.String(), nil
}

// unreadable has the path once.
func unreadable(flag, path string, err error) error {
	var of *os.PathError
	if errors.As(err, &of) {
		err = of.Err
	}
	return fault.Invalid("%s %s: %w", flag, path, err)
}

// askPassword asks twice on the terminal.
func (a *app) askPassword(ctx context.Context) (string, error) {
	in, ok := a.Docker.In().(interface {
		FD() uintptr
		IsTerminal() bool
	})
	if !ok || !in.IsTerminal() {
		return "", fault.Invalid("the repository needs a password, and there is no terminal to ask on: want --password-file FILE, or --password-file - to read it from standard input")
	}
	fd := int(in.FD())
	first, err := a.hidden(ctx, fd, "Password of the repository: ")
	if err != nil {
		return "", err
	}
	if first == "" {
		return "", fault.Invalid("the password is empty")
	}
	second, err := a.hidden(ctx, fd, "The same again: ")
	if err != nil {
		return "", err
	}
	if first != second {
		return "", fault.Invalid("these were two different passwords")
	}
	return first, nil
}

// hidden reads a line from a terminal that does not show it. A terminal that is left
// because ctx ends shows again what is typed.
func (a *app) hidden(ctx context.Context, fd int, prompt string) (string, error) {
	before, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("terminal: %w", err)
	}
	fmt.Fprint(a.Docker.Err(), prompt)
	defer fmt.Fprintln(a.Docker.Err())
	type line struct {
		text []byte
		err  error
	}
	read := make(chan line, 1)
	go func() {
		text, err := term.ReadPassword(fd)
		read <- line{text, err}
	}()
	select {
	case <-ctx.Done():
		return "", errors.Join(ctx.Err(), term.Restore(fd, before))
	case got := <-read:
		if got.err != nil {
			return "", fmt.Errorf("terminal: %w", got.err)
		}
		return string(got.text), nil
	}
}
