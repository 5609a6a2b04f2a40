package control

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// findings is the result of all checks: of the services, of the host, and of the
// networks and volumes if they run.
func (s *Server) findings(ctx context.Context) []Finding {
	s.mu.Lock()
	services, network, volume := s.info.Services, s.network, s.volume
	found := make([]Finding, 0, len(services))
	for _, service := range services {
		found = append(found, serviceFinding(service))
	}
	s.mu.Unlock()

	checks := slices.Clone(s.checks)
	if network != nil {
		checks = append(checks, network.Findings)
	}
	if volume != nil {
		checks = append(checks, volume.Findings)
	}
	results := make([][]Finding, len(checks))
	var wg sync.WaitGroup
	for i, check := range checks {
		wg.Go(func() { results[i] = s.checked(ctx, check) })
	}
	wg.Wait()
	for _, r := range results {
		found = append(found, r...)
	}
	return found
}

// checked runs one check; its panic is a finding.
func (s *Server) checked(ctx context.Context, check func(context.Context) []Finding) (found []Finding) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Errorf("panic in a check: %v", p)
			found = append(found, Finding{ID: "check", Status: StatusFail, Summary: fmt.Sprintf("a check failed: %v", p)})
		}
	}()
	return check(ctx)
}

func serviceFinding(s Service) Finding {
	f := Finding{ID: s.Name + "-service", Status: StatusOK, Summary: fmt.Sprintf("the %s service is ready", s.Name)}
	switch s.State {
	case ServiceReady:
	case ServiceStarting:
		f.Status = StatusWarn
		f.Summary = fmt.Sprintf("the %s service is still starting", s.Name)
		f.Detail = "Calls of Docker wait for it."
	case ServiceRefusing:
		f.Status = StatusFail
		f.Summary = fmt.Sprintf("the %s service cannot start: %s", s.Name, s.Reason)
		f.Detail = "Every call of Docker is answered with this reason. The start is tried again every few seconds."
	}
	return f
}
