package fault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestTextIsOnlyWhatWasWritten(t *testing.T) {
	err := Invalid("option mtu=%q: want a number from 68 to 65535", "big")
	assert.Equal(t, err.Error(), `option mtu="big": want a number from 68 to 65535`)
}

func TestKindSurvivesWrapping(t *testing.T) {
	for kind, err := range map[string]error{
		"ok": nil, "invalid": Invalid("x"), "notfound": NotFound("x"), "conflict": Conflict("x"),
		"exhausted": Exhausted("x"), "unavailable": Unavailable("x"), "internal": errors.New("x"),
		"timeout": context.DeadlineExceeded,
	} {
		assert.Equal(t, Kind(err), kind)
		if err != nil {
			assert.Equal(t, Kind(fmt.Errorf("create network: %w", err)), kind)
		}
	}
	assert.Assert(t, errdefs.IsNotFound(NotFound("x")))
}

func TestCauseIsKept(t *testing.T) {
	err := Unavailable("read record: %w", fs.ErrPermission)
	assert.ErrorIs(t, err, fs.ErrPermission)
	assert.Equal(t, Kind(err), "unavailable")
}
