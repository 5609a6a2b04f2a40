package volplugin

// flushEvery is how many bytes are written to a volume before they are sent to the disk.
// The kernel alone would keep gigabytes in memory until the end, and the disk idle.
const flushEvery = 64 << 20

// A flusher writes what is in memory to the disk while more comes.
type flusher struct {
	due  chan struct{}
	done chan struct{}
	last uint64
	err  error
}

// startFlusher calls flush, as syncfs(2), in the background. The caller stops it.
func startFlusher(flush func() error) *flusher {
	f := &flusher{due: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(f.done)
		for range f.due {
			// The kernel tells of a write that failed once to each that has the file
			// system open: the first error is all that comes.
			if err := flush(); err != nil && f.err == nil {
				f.err = err
			}
		}
	}()
	return f
}

// wrote is told how many bytes have come in all, by one goroutine at a time. It does not
// wait.
func (f *flusher) wrote(bytes uint64) {
	if bytes < f.last+flushEvery {
		return
	}
	select {
	case f.due <- struct{}{}:
		f.last = bytes
	default: // it is still at it, and asked to go on
	}
}

// stop waits for the flush that is under way, and returns what was wrong with any.
func (f *flusher) stop() error {
	close(f.due)
	<-f.done
	return f.err
}
