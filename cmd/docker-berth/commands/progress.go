package commands

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
)

// barWidth is how many columns the bar itself has.
const barWidth = 30

// progress returns what shows the progress of a call on a terminal, and what ends that.
// Without a terminal nothing is shown. The daemon tells a few times a second, so every
// time is drawn.
func (a *app) progress(what string) (show func(control.Progress), end func()) {
	out := a.Docker.Err()
	if !isTerminal(out) {
		return nil, func() {}
	}
	var bar *progressbar.ProgressBar
	var kind struct{ inBytes, known bool }
	var step string
	end = func() {
		if bar != nil {
			_ = bar.Clear() // a bar that cannot be shown hinders nobody
		}
		bar = nil
	}
	show = func(p control.Progress) {
		done, total, inBytes := amount(p)
		now := kind
		now.inBytes, now.known = inBytes, total > 0
		if bar == nil || now != kind {
			// A bar cannot change what it counts.
			end()
			kind, step = now, p.Step
			bar = newBar(out, title(what, step), inBytes, total)
		}
		if p.Step != step {
			step = p.Step
			bar.Describe(title(what, step))
		}
		if total > 0 && bar.GetMax64() != total {
			bar.ChangeMax64(total)
		}
		_ = bar.Set64(done)
	}
	return show, end
}

func title(what, step string) string {
	if step == "" {
		return what
	}
	return what + ": " + step
}

func newBar(out io.Writer, title string, inBytes bool, total int64) *progressbar.ProgressBar {
	if total == 0 {
		total = -1 // it spins
	}
	return progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(out), progressbar.OptionSetWidth(barWidth), progressbar.OptionSetDescription(title),
		progressbar.OptionShowBytes(inBytes), progressbar.OptionUseIECUnits(true),
		// Without this it draws from a goroutine of its own.
		progressbar.OptionSetSpinnerChangeInterval(0),
		progressbar.OptionShowCount(), progressbar.OptionShowTotalBytes(true), progressbar.OptionSetPredictTime(true))
}

// amount is what a bar counts: bytes where they are known, else files. The total is 0
// when it is not known, and never less than what is done.
func amount(p control.Progress) (done, total int64, inBytes bool) {
	d, t, inBytes := p.Bytes, p.TotalBytes, true
	if d == 0 && t == 0 {
		d, t, inBytes = p.Files, p.TotalFiles, false
	}
	if t > 0 && t < d {
		t = d
	}
	return clamp(d), clamp(t), inBytes
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }

// percent is how far something is, as "40%"; "" when that is not known.
func percent(p *control.Progress) string {
	if p == nil {
		return ""
	}
	done, total, _ := amount(*p)
	if total == 0 {
		return ""
	}
	return fmt.Sprintf("%d%%", int64(float64(done)/float64(total)*100))
}

// errInterrupted is what a user made of a call.
var errInterrupted = errors.New("interrupted: what was begun is undone, or completed where it cannot be")

// interruptible returns a context that ends when the user interrupts the command. The
// daemon undoes then what it began; done makes words of that.
func interruptible(cmd *cobra.Command) (ctx context.Context, done func(error) error) {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), signals...)
	return ctx, func(err error) error {
		interrupted := ctx.Err() != nil
		stop()
		if err != nil && interrupted && errors.Is(err, context.Canceled) {
			return errInterrupted
		}
		return err
	}
}
