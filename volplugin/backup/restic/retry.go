package restic

import (
	"bytes"
	"regexp"

	"github.com/berth-plugin/berth/shared/fault"
)

// retrying is in what restic says before it tries something again, for a quarter of an hour.
var retrying = []byte(" returned error, retrying after ")

// hopeless is what does not get better by that: a certificate that nobody trusts, keys that a store
// refuses, a bucket that is gone.
var hopeless = regexp.MustCompile(`x509: |does not match the signature you provided|SignatureDoesNotMatch|InvalidAccessKeyId|` +
	`Access Key Id you provided does not exist|Access ?Denied|specified bucket does not exist|NoSuchBucket`)

// delay is what restic says of the time until then.
var delay = regexp.MustCompile(` returned error, retrying after [0-9a-z.]+:`)

// hopeful ends restic at what is hopeless; other lines go to next, which may be nil.
func (e *Engine) hopeful(next func(line []byte) error) func(line []byte) error {
	return func(line []byte) error {
		if bytes.Contains(line, retrying) && hopeless.Match(line) {
			return fault.Unavailable("%.600s", delay.ReplaceAllString(e.redact.Replace(string(line)), ":"))
		}
		if next == nil {
			return nil
		}
		return next(line)
	}
}
