package archive

import (
	"context"
	"io"

	"golang.org/x/time/rate"
)

// burst is how many bytes pass at once.
const burst = 64 << 10

// limiter lets KiB/s pass; nil for 0 is no limit.
func limiter(kib int) *rate.Limiter {
	if kib <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(kib)*1024, burst)
}

// slowed reads r no faster than the limit, and ends with ctx.
func slowed(ctx context.Context, r io.Reader, limit *rate.Limiter) io.Reader {
	return &slowReader{ctx, r, limit}
}

type slowReader struct {
	ctx   context.Context //nolint:containedctx // of one call of the engine
	r     io.Reader
	limit *rate.Limiter
}

// Read implements io.Reader.
func (s *slowReader) Read(buf []byte) (int, error) {
	if s.limit != nil {
		buf = buf[:min(len(buf), burst)]
	}
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.r.Read(buf)
	if s.limit != nil && n > 0 {
		if err := s.limit.WaitN(s.ctx, n); err != nil {
			return n, err
		}
	}
	return n, err
}

// limited writes to w no faster than the limit.
func limited(ctx context.Context, w io.Writer, limit *rate.Limiter) io.Writer {
	if limit == nil {
		return w
	}
	return &slowWriter{ctx, w, limit}
}

type slowWriter struct {
	ctx   context.Context //nolint:containedctx // of one call of the engine
	w     io.Writer
	limit *rate.Limiter
}

// Write implements io.Writer.
func (s *slowWriter) Write(data []byte) (done int, err error) {
	for len(data) > 0 {
		piece := data[:min(len(data), burst)]
		if err := s.limit.WaitN(s.ctx, len(piece)); err != nil {
			return done, err
		}
		n, err := s.w.Write(piece)
		done += n
		if err != nil {
			return done, err
		}
		data = data[n:]
	}
	return done, nil
}
