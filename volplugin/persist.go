package volplugin

import (
	"errors"
	"os"
	"strings"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// What this host keeps in its state file. Buckets are names; they hold no data.
var (
	hostBucket   = state.NewBucket[string]("volume-host")
	rootBucket   = state.NewBucket[rootState]("volume-root")
	cacheBucket  = state.NewBucket[seenVolume]("volumes")
	mountsBucket = state.NewBucket[volumeMounts]("volume-mounts")
)

// onlyKey is the key in buckets of one record.
const onlyKey = "this"

// rootState is the root this host has used.
type rootState struct {
	// ID of the root's marker.
	ID string
	// Complete is set when all of the root's volumes have been seen once, so that
	// a name that is not in the cache was never known to this host's dockerd.
	Complete bool
}

// seenVolume is a volume as this host saw it last.
type seenVolume struct {
	Record volume.Record
	// Broken says why the record cannot be used; Record is empty then.
	Broken string `json:",omitempty"`
	Stamp  rooted.Stamp
	// Asked are the options of the last Create for the existing volume, when they
	// were not those it was made with.
	Asked map[string]string `json:",omitempty"`
	// Differs is set with Asked, which may be empty.
	Differs bool `json:",omitempty"`
}

// volumeMounts are the mounts that dockerd has asked for on this host.
type volumeMounts struct {
	// UUID of the volume that was mounted.
	UUID string
	// Boot of the host in which it was.
	Boot string
	IDs  mount.References
}

// load reads what an earlier process has kept.
func (d *Driver) load() error {
	return d.cfg.DB.Update(func(tx *state.Tx) error {
		if d.cfg.HostID == "" {
			id, ok, err := hostBucket.Get(tx, onlyKey)
			if err != nil {
				return err
			}
			if !ok {
				// The name is for people; the rest tells hosts of one name apart.
				name, _ := os.Hostname() // an empty name is as good
				id = strings.TrimPrefix(name+"/"+uuid.NewString(), "/")
				if err := hostBucket.Put(tx, onlyKey, id); err != nil {
					return err
				}
			}
			d.cfg.HostID = id
		}
		var err error
		if d.root, _, err = rootBucket.Get(tx, onlyKey); err != nil {
			return err
		}
		return errors.Join(
			cacheBucket.Each(tx, func(name string, v seenVolume) error {
				d.seen[name] = v
				return nil
			}),
			mountsBucket.Each(tx, func(name string, m volumeMounts) error {
				d.mounts[name] = m
				return nil
			}),
		)
	})
}

// setMounts stores the mounts of one volume; none removes the entry. Memory
// changes only when the state file has.
func (d *Driver) setMounts(name string, m volumeMounts) error {
	err := d.cfg.DB.Update(func(tx *state.Tx) error {
		if m.IDs.Total() == 0 {
			return mountsBucket.Delete(tx, name)
		}
		return mountsBucket.Put(tx, name, m)
	})
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.IDs.Total() == 0 {
		delete(d.mounts, name)
	} else {
		d.mounts[name] = m
	}
	return nil
}

func (d *Driver) mountsOf(name string) volumeMounts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mounts[name]
}
