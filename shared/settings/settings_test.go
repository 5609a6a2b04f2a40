package settings

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
)

func env(kv map[string]string) func(string) string {
	return func(name string) string { return kv[name] }
}

func TestDefaults(t *testing.T) {
	got, err := Read(env(nil))
	assert.NilError(t, err)
	assert.DeepEqual(t, got, Settings{LogLevel: logrus.InfoLevel, IPAMKey: "name", Scope: "local", SysctlDir: "/proc/sys/net"})
}

func TestValuesAreTaken(t *testing.T) {
	got, err := Read(env(map[string]string{
		EnvLogLevel: "debug", EnvPools: "10.9.0.0/16:26", EnvIPAMKey: "MAC", EnvScope: "GLOBAL", EnvRoots: "fast=/data/fast",
		EnvThinPool: "data=/dev/sdb metadata=/dev/sdc", EnvMetricsAddr: "127.0.0.1:9323", EnvSysctlDir: "/host/sysctl/net",
	}))
	assert.NilError(t, err)
	assert.DeepEqual(t, got, Settings{
		LogLevel: logrus.DebugLevel, Pools: "10.9.0.0/16:26", IPAMKey: IPAMKeyMAC, Scope: "global", Roots: "fast=/data/fast",
		ThinPool: "data=/dev/sdb metadata=/dev/sdc", MetricsAddr: "127.0.0.1:9323", SysctlDir: "/host/sysctl/net",
	})
}

func TestEveryWrongVariableIsNamedWithItsValue(t *testing.T) {
	_, err := Read(env(map[string]string{
		EnvLogLevel: "loud", EnvIPAMKey: "door", EnvScope: "planet", EnvMetricsAddr: "nine", EnvSysctlDir: "proc",
	}))
	assert.Assert(t, errdefs.IsInvalidArgument(err))
	for _, want := range []string{
		`BERTH_LOG_LEVEL="loud"`, `BERTH_IPAM_KEY="door": want name or mac`, `BERTH_SCOPE="planet": want local or global`,
		`BERTH_METRICS_ADDR="nine": want HOST:PORT`, `BERTH_SYSCTL_DIR="proc": want an absolute path`,
	} {
		assert.ErrorContains(t, err, want)
	}
}
