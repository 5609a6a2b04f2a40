// Command check-config judges plugin config.json files, before they are packed:
//
//	go run ./shared/manifest/cmd/check-config FILE…
//
// It prints every finding and exits with 1 when there is one.
package main

import (
	"fmt"
	"os"

	"github.com/berth-plugin/berth/shared/manifest"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: check-config FILE…")
		os.Exit(2)
	}
	status := 0
	for _, path := range os.Args[1:] {
		if _, err := manifest.Load(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
	}
	os.Exit(status)
}
