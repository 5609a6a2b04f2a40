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
	if err := lab.RemoveOrphans(); err != nil {
		fmt.Fprintln(os.Stderr, "remove what a killed test left:", err)
		os.Exit(1)
	}
	code := m.Run()
	if err := model.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	left, err := lab.LeftBehind(lab.TestPrefix())
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
