package integration

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/berth-plugin/berth/integration/lab"
)

func TestMain(m *testing.M) {
	if lab.Reexec() {
		return
	}
	flag.Parse()
	code := m.Run()
	left, err := lab.LeftBehind(hostPrefix())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "left behind on the machine:", l)
		code = 1
	}
	os.Exit(code)
}

// hostPrefix begins the names of all hosts of this process.
func hostPrefix() string { return fmt.Sprintf("t%d-", os.Getpid()) }
