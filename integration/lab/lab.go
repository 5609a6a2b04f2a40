// Package lab runs real Docker Engines on one machine as if each had a host of
// its own: a Host is an init process in new PID, mount, network, cgroup, IPC and
// UTS namespaces over a Debian root, and can be rebooted or lose its power. A
// LAN joins several hosts with a router and a neighbour. Nothing in here knows
// what Berth does; scenarios live in the integration package.
//
// Everything needs root. A program that uses the package calls Reexec first in
// main, because hosts run the same binary as their init.
package lab

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/reexec"
)

// Names under which the binary is started again; see Reexec.
const (
	bootName  = "berth-lab-boot"
	initName  = "berth-lab-init"
	echoName  = "berth-lab-echo"
	proxyName = "berth-lab-proxy"
	rpcName   = "rpc"
)

// Reexec runs the part of a host that this process was started for and reports
// whether it did. Programs and TestMain call it before anything else and return
// when it says true.
func Reexec() bool {
	reexec.Register(bootName, bootMain)
	reexec.Register(initName, initMain)
	reexec.Register(echoName, echoMain)
	reexec.Register(proxyName, proxyMain)
	reexec.Register(rpcName, rpcMain)
	return reexec.Init()
}

// CacheDir is where engine roots and images are kept between runs:
// $BERTH_LAB_CACHE or /var/cache/berth-lab.
func CacheDir() string {
	if dir := os.Getenv("BERTH_LAB_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/berth-lab"
}

// Dir is where the disks, sockets and logs of running hosts are:
// $BERTH_LAB_DIR or /var/tmp/berth-lab. It must not be on an overlay or a tmpfs,
// and be short, because unix sockets live below it.
func Dir() string {
	if dir := os.Getenv("BERTH_LAB_DIR"); dir != "" {
		return dir
	}
	return "/var/tmp/berth-lab"
}

// BuildDir is the directory that holds bin/ and plugin/: $BERTH_LAB_BUILD, or
// build/ of the module that the working directory belongs to.
func BuildDir() (string, error) {
	if dir := os.Getenv("BERTH_LAB_BUILD"); dir != "" {
		return filepath.Abs(dir)
	}
	root, err := moduleRoot()
	if err != nil {
		return "", fmt.Errorf("find build directory: %w (set BERTH_LAB_BUILD)", err)
	}
	return filepath.Join(root, "build"), nil
}

// moduleRoot is the nearest directory upwards with a go.mod.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod above the working directory")
		}
		dir = up
	}
}
