package vmlab

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
)

// endMark begins the last line of a guest's report; the exit code follows.
const endMark = "vmlab: exit "

// result is what the guest's testing package said of one test.
type result struct {
	name   string
	failed bool
}

// finished tells whether the guest's first process lived to the end.
func finished(out []byte) bool {
	return bytes.Contains(out, []byte("\n"+endMark))
}

// passed tells whether the guest's test binary ended well.
func passed(out []byte) bool {
	return bytes.Contains(out, []byte("\n"+endMark+"0\n"))
}

// results finds the verdicts in the output of a test binary run with -test.v, in
// the order in which the tests ended.
func results(out []byte) []result {
	verdict := regexp.MustCompile(`^ *--- (PASS|FAIL): (\S+) \(`)
	var all []result
	for line := range strings.Lines(string(out)) {
		if m := verdict.FindStringSubmatch(line); m != nil {
			all = append(all, result{name: m[2], failed: m[1] == "FAIL"})
		}
	}
	return all
}

// report shows the guest's subtests as subtests of t and fails t when the guest
// failed, or ended without a verdict on t itself.
func report(t *testing.T, out []byte, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
	judged := false
	for _, r := range results(out) {
		judged = judged || r.name == t.Name()
		sub, ok := strings.CutPrefix(r.name, t.Name()+"/")
		if !ok {
			continue
		}
		t.Run(sub, func(t *testing.T) {
			if r.failed {
				t.Error("failed in the guest; its words are in the log of the parent test")
			}
		})
	}
	if !judged || !passed(out) {
		t.Errorf("%s did not pass in the guest", t.Name())
	}
}
