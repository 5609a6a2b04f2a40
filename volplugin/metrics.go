package volplugin

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/berth-plugin/berth/volplugin/volume"
)

// What the driver measures, beside the calls that shared/pluginapi counts.
var (
	volumesDesc = prometheus.NewDesc("berth_volumes",
		"Volumes that this host knows, by root and engine; those whose record cannot be used have the engine \"\".", []string{"root", "engine"}, nil)
	mountedDesc = prometheus.NewDesc("berth_volumes_mounted",
		"Volumes and snapshots that containers of this host have.", nil, nil)
	awayDesc = prometheus.NewDesc("berth_volume_root_away",
		"1 while the root does not answer or is not configured any more, else 0.", []string{"root"}, nil)
	leaseDesc = prometheus.NewDesc("berth_volume_lease_trouble",
		"1 of an exclusive volume whose lease is in doubt (state doubtful) or lost (state lost) on this host, as long as it is.", []string{"volume", "state"}, nil)
	poolUsedDesc = prometheus.NewDesc("berth_volume_pool_used_bytes",
		"What is used of the pool of engine thin, of its data and metadata, when it was last looked at.", []string{"root", "part"}, nil)
	poolSizeDesc = prometheus.NewDesc("berth_volume_pool_size_bytes",
		"Size of the pool of engine thin, of its data and metadata.", []string{"root", "part"}, nil)
	snapshotLastDesc = prometheus.NewDesc("berth_volume_snapshot_last_success_timestamp_seconds",
		"When the last scheduled snapshot that did not fail was made, of volumes with a schedule; 0 is never.", []string{"volume"}, nil)
	snapshotNextDesc = prometheus.NewDesc("berth_volume_snapshot_next_timestamp_seconds",
		"When the next scheduled snapshot is due, of volumes with a schedule.", []string{"volume"}, nil)
	snapshotFailuresDesc = prometheus.NewDesc("berth_volume_snapshot_failures",
		"Scheduled snapshots that have failed in a row, of volumes with a schedule.", []string{"volume"}, nil)
	backupGoodDesc = prometheus.NewDesc("berth_volume_backup_last_success_timestamp_seconds",
		"When a volume last had the data in the last complete backup that this host made, of volumes with a schedule or a backup; 0 is never.", []string{"volume"}, nil)
	backupFailuresDesc = prometheus.NewDesc("berth_volume_backup_failures",
		"Backups that have failed or were incomplete in a row, of volumes with a schedule or a backup.", []string{"volume"}, nil)
	backupNextDesc = prometheus.NewDesc("berth_volume_backup_next_timestamp_seconds",
		"When the next scheduled backup is due, of volumes with a schedule.", []string{"volume"}, nil)
	backupTookDesc = prometheus.NewDesc("berth_volume_backup_last_duration_seconds",
		"How long the last complete backup took.", []string{"volume"}, nil)
	backupSizeDesc = prometheus.NewDesc("berth_volume_backup_last_size_bytes",
		"The size of the files in the last complete backup.", []string{"volume"}, nil)
	backupAddedDesc = prometheus.NewDesc("berth_volume_backup_last_added_bytes",
		"What the repository has grown by for the last complete backup.", []string{"volume"}, nil)
	targetFailuresDesc = prometheus.NewDesc("berth_backup_target_failures",
		"Scheduled prunings and checks of a target that have failed in a row.", []string{"target", "work"}, nil)
)

// Metrics returns what the driver measures. It asks no root, and may be collected at
// any time.
func (d *Driver) Metrics() prometheus.Collector { return collector{d} }

type collector struct{ d *Driver }

// Describe sends all descriptions.
func (c collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		volumesDesc, mountedDesc, awayDesc, leaseDesc, poolUsedDesc, poolSizeDesc, snapshotLastDesc, snapshotNextDesc, snapshotFailuresDesc,
		backupGoodDesc, backupFailuresDesc, backupNextDesc, backupTookDesc, backupSizeDesc, backupAddedDesc, targetFailuresDesc,
	} {
		descs <- desc
	}
}

// Collect sends all values.
func (c collector) Collect(metrics chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	for _, s := range c.d.all() {
		engines := map[string]int{}
		for name, v := range c.d.ledger.seen(s.key) {
			engines[v.Record.Engine]++
			if c.d.ledger.owner(name) == s.key {
				c.backups(gauge, name, v.Record)
			}
			if v.Record.Schedule == "" || c.d.ledger.owner(name) != s.key {
				continue
			}
			st, _ := c.d.schedules.State(v.Record.UUID)
			gauge(snapshotLastDesc, seconds(st.Success), name)
			gauge(snapshotNextDesc, seconds(st.Next), name)
			gauge(snapshotFailuresDesc, float64(st.Failures), name)
		}
		for engine, n := range engines {
			gauge(volumesDesc, float64(n), s.label(), engine)
		}
		for uuid, t := range s.allTroubles() {
			gauge(leaseDesc, 1, s.nameOf(uuid), string(t.state))
		}
		if pool := s.pool.Load(); pool != nil {
			gauge(poolUsedDesc, float64(pool.DataUsed), s.label(), "data")
			gauge(poolSizeDesc, float64(pool.DataTotal), s.label(), "data")
			gauge(poolUsedDesc, float64(pool.MetadataUsed), s.label(), "metadata")
			gauge(poolSizeDesc, float64(pool.MetadataTotal), s.label(), "metadata")
		}
		away := 0.0
		if s.missing != nil || s.hung.Load() {
			away = 1
		}
		gauge(awayDesc, away, s.label())
	}
	mounted := 0
	for _, m := range c.d.ledger.allMounts() {
		if m.IDs.Total() > 0 {
			mounted++
		}
	}
	gauge(mountedDesc, float64(mounted))
	c.targets(gauge)
}

// backups sends what is known of the backups of one volume.
func (c collector) backups(gauge func(*prometheus.Desc, float64, ...string), name string, rec volume.Record) {
	if c.d.backups == nil {
		return
	}
	st := c.d.backups.state(rec.UUID)
	if rec.BackupSchedule == "" && st.Last.IsZero() {
		return
	}
	run, _ := c.d.backupRuns.State(rec.UUID)
	gauge(backupGoodDesc, seconds(st.GoodTime), name)
	gauge(backupFailuresDesc, float64(max(st.Failures, run.Failures)), name)
	if rec.BackupSchedule != "" {
		gauge(backupNextDesc, seconds(run.Next), name)
	}
	if st.Good != "" {
		gauge(backupTookDesc, st.Took.Seconds(), name)
		gauge(backupSizeDesc, float64(st.Bytes), name)
		gauge(backupAddedDesc, float64(st.Added), name)
	}
}

// targets sends how the care for targets goes.
func (c collector) targets(gauge func(*prometheus.Desc, float64, ...string)) {
	if c.d.backups == nil {
		return
	}
	names, err := c.d.backups.targets.Names()
	if err != nil {
		return
	}
	for _, name := range names {
		for _, prefix := range []string{pruneJob, checkJob, verifyJob} {
			if run, ok := c.d.backupRuns.State(prefix + name); ok {
				gauge(targetFailuresDesc, float64(run.Failures), name, strings.TrimSuffix(prefix, "/"))
			}
		}
	}
}

// label names the root; String would show where a share is.
func (s *store) label() string {
	if s.name == "" {
		return homeKey
	}
	return s.name
}

// seconds since 1970, 0 for the zero time.
func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
