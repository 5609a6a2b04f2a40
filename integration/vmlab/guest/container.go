package guest

import (
	"strconv"

	"github.com/docker/docker/api/types/network"
)

// Container is one of a node's engine.
type Container struct {
	Name     string
	Networks map[string]*network.EndpointSettings
	pid      int
	node     *Node
}

// Container asks the engine for a container, which has to run.
func (n *Node) Container(name string) *Container {
	n.t.Helper()
	c := n.engine()
	defer c.Close()
	found, err := c.ContainerInspect(n.t.Context(), name)
	if err != nil {
		n.t.Fatalf("%s: inspect container %s: %v", n.Name, name, err)
	}
	if found.State.Pid == 0 {
		n.t.Fatalf("%s: container %s does not run: %s %s", n.Name, name, found.State.Status, found.State.Error)
	}
	return &Container{Name: name, Networks: found.NetworkSettings.Networks, pid: found.State.Pid, node: n}
}

// Runs tells whether the engine has the container and it runs.
func (n *Node) Runs(name string) bool {
	n.t.Helper()
	c := n.engine()
	defer c.Close()
	found, err := c.ContainerInspect(n.t.Context(), name)
	return err == nil && found.State.Running
}

// Try runs a program of the node's in the container's network, which is a tenth of
// what `docker exec` takes.
func (c *Container) Try(argv ...string) Result {
	c.node.t.Helper()
	return c.node.Try(append([]string{"nsenter", "--target", strconv.Itoa(c.pid), "--net", "--"}, argv...)...)
}

// Must is Try for what has to succeed; it returns the output.
func (c *Container) Must(argv ...string) string {
	c.node.t.Helper()
	r := c.Try(argv...)
	if r.Err != nil {
		c.node.t.Fatalf("%s# %q: %v\n%s", c.Name, argv, r.Err, r.Out)
	}
	return r.Out
}
