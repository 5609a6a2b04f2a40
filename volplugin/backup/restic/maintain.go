package restic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/volplugin/backup"
)

// maxManifest is how much of a manifest is read, in bytes: more than package backup takes.
const maxManifest = 1 << 20

// Manifest implements backup.Engine.
func (e *Engine) Manifest(ctx context.Context, id string) (backup.Manifest, error) {
	m, err := e.manifest(ctx, id)
	return m, fail(fmt.Sprintf("manifest of backup %.8s", id), err)
}

func (e *Engine) manifest(ctx context.Context, id string) (m backup.Manifest, err error) {
	if !fullID.MatchString(id) {
		return m, fmt.Errorf("%w: %.80q is not the ID of one", backup.ErrNoBackup, id)
	}
	var text []byte
	err = e.run(ctx, call{
		args:  []string{"--json", "dump", id, "/" + backup.ManifestName},
		whole: maxManifest,
		out:   func(all []byte) error { text = slices.Clone(all); return nil },
	})
	if err != nil {
		return m, e.missing(ctx, id, err)
	}
	return backup.DecodeManifest(text)
}

// forgetAtOnce is how many IDs one call of restic is given.
const forgetAtOnce = 1000

// Forget implements backup.Engine.
func (e *Engine) Forget(ctx context.Context, ids []string) error {
	ids = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !fullID.MatchString(id) })
	for some := range slices.Chunk(ids, forgetAtOnce) {
		if err := e.forget(ctx, some); err != nil {
			return fail("forget", err)
		}
	}
	return nil
}

func (e *Engine) forget(ctx context.Context, ids []string) error {
	// restic calls unknown ones an error in words only, and one that it cannot load now too.
	err := e.run(ctx, call{args: slices.Concat([]string{"--json", "forget"}, ids), alone: true})
	if err != nil {
		return err
	}
	left, err := e.snapshots(ctx, e.notice, ids...)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%d of %d backups are still there, %.8s for one", len(left), len(ids), left[0].ID)
	}
	return nil
}

// maxUnused is the share of a repository that may be unused after a Prune: less means that more is
// downloaded and uploaded again.
const maxUnused = "10%"

// Prune implements backup.Engine.
func (e *Engine) Prune(ctx context.Context, progress func(backup.Progress)) error {
	tell := told(progress)
	return fail("prune", e.run(ctx, call{
		args:  []string{"prune", "--max-unused", maxUnused}, // has no JSON
		alone: true,
		out: func(line []byte) error {
			if step, ok := pruneStep(string(line)); ok {
				tell(backup.Progress{Step: step})
			}
			return nil
		},
	}))
}

// pruneStep makes a step of a line that tells what is done: "[0:05] 10.00%  1 / 10 packs repacked", or
// "loading all snapshots...".
func pruneStep(line string) (string, bool) {
	if _, rest, ok := strings.Cut(line, "]"); ok && strings.HasPrefix(line, "[") {
		return cut(strings.Join(strings.Fields(rest), " "), 100), true
	}
	if step, ok := strings.CutSuffix(line, "..."); ok {
		return cut(step, 100), true
	}
	return "", false
}

// Check implements backup.Engine.
func (e *Engine) Check(ctx context.Context, depth float64, progress func(backup.Progress)) (backup.Report, error) {
	report, err := e.check(ctx, depth, told(progress))
	return report, fail("check", err)
}

func (e *Engine) check(ctx context.Context, depth float64, progress func(backup.Progress)) (backup.Report, error) {
	args := []string{"--json", "check"}
	switch {
	case depth >= 1:
		args = append(args, "--read-data")
	case depth > 0:
		args = append(args, fmt.Sprintf("--read-data-subset=%.4f%%", max(depth*100, 0.0001)))
	}
	progress(backup.Progress{Step: "checking"}) // restic tells no more
	var summary checkSummary
	var report backup.Report
	done := false
	err := e.run(ctx, call{
		args: args, alone: true,
		out: func(line []byte) error {
			kind, err := readMessage(line, map[string]any{"summary": &summary})
			done = done || kind == "summary"
			return err
		},
		err: func(line []byte) error {
			m, ok, err := readError(line)
			if ok && len(report.Errors) < maxMissing {
				report.Errors = append(report.Errors, cut(e.redact.Replace(m.text()), maxTailLine))
			}
			return err
		},
	})
	var exit *exitError
	damaged := errors.As(err, &exit) && exit.code == 1 && isDamage(exit.text)
	if err != nil && !damaged {
		return backup.Report{}, err
	}
	if !done {
		return backup.Report{}, errors.New("restic ended without a summary")
	}
	if !damaged && summary.Errors == 0 {
		report.Errors = nil // of the network, and retried
	} else if len(report.Errors) == 0 {
		report.Errors = []string{fmt.Sprintf("%d errors, of which restic does not say more", max(summary.Errors, 1))}
	}
	if damaged && !slices.Contains(report.Errors, exit.text) && !strings.Contains(exit.text, "repository contains errors") {
		report.Errors = append(report.Errors, exit.text)
	}
	report.Hint = summary.hint()
	return report, nil
}

// isDamage tells the words for damage from those for a network that is away.
func isDamage(text string) bool {
	for _, words := range []string{"repository contains errors", "ciphertext verification failed", "invalid data returned", "hash does not match"} {
		if strings.Contains(text, words) {
			return true
		}
	}
	return false
}

func (s checkSummary) hint() string {
	switch {
	case len(s.BrokenPacks) > 0:
		return "with restic and the target's password: restic repair packs " + strings.Join(s.BrokenPacks, " ") + ", then restic repair snapshots --forget"
	case s.RepairIndex:
		return "with restic and the target's password: restic repair index"
	case s.Prune:
		return "there is data that no backup needs: a prune frees it"
	}
	return ""
}
