package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/berth-plugin/berth/integration/lab"
)

// models has hosts that are off, whose engines have the image of the lab and managed
// plugins that were created and never enabled. The hosts of scenarios begin as copies:
// to pack a plugin takes an engine longer than to start. They are safe for concurrent
// use.
type models struct {
	mu    sync.Mutex
	made  map[string]func() (*lab.Host, error) // by engine and plugins
	hosts []*lab.Host                          // for close
}

// model is of all scenarios of this process; TestMain closes it.
var model = models{made: map[string]func() (*lab.Host, error){}}

// like returns the host to copy for a run with these plugins, which is made when it is
// first asked for.
func (m *models) like(r run, plugins []string) (*lab.Host, error) {
	if r.mode != lab.Managed {
		plugins = nil
	}
	key := strings.Join(append([]string{r.engine}, plugins...), " ")
	m.mu.Lock()
	get := m.made[key]
	if get == nil {
		get = sync.OnceValues(func() (*lab.Host, error) { return m.build(r.engine, plugins) })
		m.made[key] = get
	}
	m.mu.Unlock()
	return get()
}

func (m *models) build(engine string, plugins []string) (*lab.Host, error) {
	ctx, cancel := context.WithTimeout(context.Background(), scenarioStart)
	defer cancel()
	h, err := lab.New(ctx, lab.Options{Name: fmt.Sprintf("%s%d-m", lab.TestPrefix(), numbered.Add(1)), Engine: engine})
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.hosts = append(m.hosts, h)
	m.mu.Unlock()
	if err := h.ImportBusybox(ctx); err != nil {
		return nil, err
	}
	for _, p := range plugins {
		if err := h.CreatePlugin(ctx, p); err != nil {
			return nil, err
		}
	}
	if err := h.StopEngine(ctx); err != nil {
		return nil, err
	}
	return h, h.CloseKeepDisk()
}

// close removes the hosts.
func (m *models) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, h := range m.hosts {
		errs = append(errs, h.Close())
	}
	m.hosts = nil
	return errors.Join(errs...)
}
