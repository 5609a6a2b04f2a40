package journal

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// A process that is killed again and again, on one log. What it was told is durable
// is there, and each key counts without a gap (see counters.replay).
func TestKilledWhileAppending(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	told := map[string]int{}
	for round := range 12 {
		cmd := child(t, "append", path)
		out := new(strings.Builder)
		cmd.Stdout = out
		assert.NilError(t, cmd.Start())
		time.Sleep(100*time.Millisecond + rand.N(150*time.Millisecond))
		assert.NilError(t, cmd.Process.Kill())
		_ = cmd.Wait() // killed
		acks := acknowledged(t, out.String())
		for key, value := range acks {
			told[key] = max(told[key], value)
		}
		c, rec := openCounters(t, path)
		assert.Assert(t, !rec.Lossy(), "%s", rec)
		for key, value := range told {
			assert.Assert(t, c.values[key] >= value, "round %d: %s is %d, acknowledged was %d", round, key, c.values[key], value)
		}
		assert.NilError(t, c.log.Close())
	}
	assert.Assert(t, told["k0"] > 12, "%v", told)
}

// script does everything once, and prints what is durable.
func script(path string) error {
	for range 2 {
		c, err := openChild(path)
		if err != nil {
			return err
		}
		for range 3 {
			if err := c.add("a").Wait(context.Background()); err != nil {
				return err
			}
			fmt.Println("a", c.values["a"])
		}
		if err := c.compact(); err != nil {
			return err
		}
		if err := c.add("b").Wait(context.Background()); err != nil {
			return err
		}
		fmt.Println("b", c.values["b"])
		if err := c.log.Close(); err != nil {
			return err
		}
	}
	return nil
}
