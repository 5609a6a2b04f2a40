package volplugin

import (
	"errors"
	"testing"

	"gotest.tools/v3/assert"
)

func TestWhatIsWrittenIsFlushedPieceByPiece(t *testing.T) {
	flushes := make(chan struct{})
	f := startFlusher(func() error {
		flushes <- struct{}{}
		return nil
	})
	ended := make(chan error, 1)
	f.wrote(0)
	f.wrote(flushEvery - 1)
	select {
	case <-flushes:
		t.Fatal("it flushes nothing")
	default:
	}
	f.wrote(flushEvery)
	<-flushes
	f.wrote(2*flushEvery - 1)
	f.wrote(2 * flushEvery)
	<-flushes
	go func() { ended <- f.stop() }()
	select {
	case <-flushes:
		t.Fatal("it flushes once more than it was told")
	case err := <-ended:
		assert.NilError(t, err)
	}
}

func TestASlowDiskKeepsNobodyFromWriting(t *testing.T) {
	begun, goOn := make(chan struct{}, 3), make(chan struct{})
	f := startFlusher(func() error {
		begun <- struct{}{}
		<-goOn
		return nil
	})
	f.wrote(flushEvery)
	<-begun
	for i := range uint64(20) {
		f.wrote((i + 2) * flushEvery)
	}
	close(goOn)
	assert.NilError(t, f.stop())
	assert.Equal(t, len(begun), 1, "one flush is enough for all that came meanwhile")
}

func TestAFlushThatFailsIsTold(t *testing.T) {
	lost := errors.New("input/output error")
	f := startFlusher(func() error {
		err := lost
		lost = nil
		return err
	})
	want := lost
	f.wrote(flushEvery)
	f.wrote(2 * flushEvery)
	assert.ErrorIs(t, f.stop(), want)
}
