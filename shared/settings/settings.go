// Package settings reads the daemon's environment, the only way by which
// `docker plugin set` reaches it. The defaults live here, because a plugin that
// is upgraded keeps its old settings and gets none of the new ones.
//
// No other package reads the environment.
package settings

import (
	"errors"
	"net"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

// Names of the environment variables.
const (
	EnvLogLevel    = "BERTH_LOG_LEVEL"
	EnvPools       = "BERTH_POOLS"
	EnvIPAMKey     = "BERTH_IPAM_KEY"
	EnvScope       = "BERTH_SCOPE"
	EnvRoots       = "BERTH_ROOTS"
	EnvThinPool    = "BERTH_THIN_POOL"
	EnvMetricsAddr = "BERTH_METRICS_ADDR"
	EnvSysctlDir   = "BERTH_SYSCTL_DIR"
)

// The values of EnvIPAMKey.
const (
	// IPAMKeyName keeps addresses for names of containers, which Docker tells
	// from Engine 29 on.
	IPAMKeyName = "name"
	// IPAMKeyMAC keeps addresses for MAC addresses. Docker then asks for an address
	// with a MAC, one of its own making where the user gave none.
	IPAMKeyMAC = "mac"
)

// Settings are the validated environment.
type Settings struct {
	// LogLevel is one of logrus' levels; the default is info.
	LogLevel logrus.Level
	// Pools lists the supernets that automatic subnets are taken from, in the
	// form of netplugin/ipam; "" is the default list.
	Pools string
	// IPAMKey is what an address is kept for when its container is gone,
	// IPAMKeyName (default) or IPAMKeyMAC.
	IPAMKey string
	// Scope is what volumes report to swarm, "local" (default) or "global".
	Scope string
	// Roots lists further volume roots, in the form of volplugin.ParseRoots; "" is
	// none, the default.
	Roots string
	// ThinPool says what pools of engine thin are made of, in the form of
	// thin.ParseSettings; "" is files in the root, the default.
	ThinPool string
	// MetricsAddr is the HOST:PORT where Prometheus metrics are served; "" is
	// nowhere, the default.
	MetricsAddr string
	// SysctlDir is where the host's /proc/sys/net can be written. A managed
	// plugin's own /proc/sys is read-only.
	SysctlDir string
}

// Read takes the settings from getenv. The error names every wrong variable, its
// value and what is allowed.
func Read(getenv func(string) string) (Settings, error) {
	s := Settings{
		LogLevel:    logrus.InfoLevel,
		Pools:       getenv(EnvPools),
		IPAMKey:     IPAMKeyName,
		Scope:       "local",
		Roots:       getenv(EnvRoots),
		ThinPool:    getenv(EnvThinPool),
		MetricsAddr: getenv(EnvMetricsAddr),
		SysctlDir:   "/proc/sys/net",
	}
	var errs []error
	if v := getenv(EnvLogLevel); v != "" {
		level, err := logrus.ParseLevel(v)
		if err != nil {
			errs = append(errs, fault.Invalid("%s=%q: want one of trace, debug, info, warn, error", EnvLogLevel, v))
		}
		s.LogLevel = level
	}
	if v := getenv(EnvIPAMKey); v != "" {
		s.IPAMKey = strings.ToLower(v)
		if s.IPAMKey != IPAMKeyName && s.IPAMKey != IPAMKeyMAC {
			errs = append(errs, fault.Invalid("%s=%q: want name or mac", EnvIPAMKey, v))
		}
	}
	if v := getenv(EnvScope); v != "" {
		s.Scope = strings.ToLower(v)
		if s.Scope != "local" && s.Scope != "global" {
			errs = append(errs, fault.Invalid("%s=%q: want local or global", EnvScope, v))
		}
	}
	if v := s.MetricsAddr; v != "" {
		if _, _, err := net.SplitHostPort(v); err != nil {
			errs = append(errs, fault.Invalid("%s=%q: want HOST:PORT, as 127.0.0.1:9323", EnvMetricsAddr, v))
		}
	}
	if v := getenv(EnvSysctlDir); v != "" {
		s.SysctlDir = v
		if !filepath.IsAbs(v) {
			errs = append(errs, fault.Invalid("%s=%q: want an absolute path", EnvSysctlDir, v))
		}
	}
	return s, errors.Join(errs...)
}
