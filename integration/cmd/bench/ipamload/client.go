// Package ipamload asks a plugin for addresses and gives them back, as an engine that
// starts and ends many containers would.
package ipamload

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
)

// A Client is one connection to a plugin. It speaks as much HTTP as is needed, so that
// the plugin is what is measured. It is for one goroutine.
type Client struct {
	conn net.Conn
	r    *bufio.Reader
	out  []byte
}

// Find returns the socket of the plugin below dir that manages addresses.
func Find(ctx context.Context, dir string) (string, error) {
	return FindPlugin(ctx, dir, "IpamDriver")
}

// FindPlugin returns the socket of the plugin below dir that implements an interface
// of Docker's, as "VolumeDriver".
func FindPlugin(ctx context.Context, dir, implements string) (string, error) {
	var sockets []string
	for _, pattern := range []string{"*.sock", "*/*.sock"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		sockets = append(sockets, found...)
	}
	for _, socket := range sockets {
		c, err := Dial(ctx, socket)
		if err != nil {
			continue
		}
		var manifest struct{ Implements []string }
		err = c.Call("Plugin.Activate", nil, &manifest)
		_ = c.Close()
		if err == nil && slices.Contains(manifest.Implements, implements) {
			return socket, nil
		}
	}
	return "", fmt.Errorf("no plugin implements %s: asked %s", implements, strings.Join(sockets, ", "))
}

// Dial connects to a plugin's socket. The caller closes the client.
func Dial(ctx context.Context, socket string) (*Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	return &Client{conn: conn, r: bufio.NewReader(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// RequestPool asks for a pool and returns its ID.
func (c *Client) RequestPool(subnet string) (string, error) {
	var got struct{ PoolID string }
	space := struct{ LocalDefaultAddressSpace string }{}
	if err := c.Call("IpamDriver.GetDefaultAddressSpaces", nil, &space); err != nil {
		return "", err
	}
	err := c.Call("IpamDriver.RequestPool", map[string]any{"AddressSpace": space.LocalDefaultAddressSpace, "Pool": subnet}, &got)
	return got.PoolID, err
}

// ReleasePool gives a pool back with all its addresses.
func (c *Client) ReleasePool(pool string) error {
	return c.Call("IpamDriver.ReleasePool", map[string]string{"PoolID": pool}, nil)
}

// RequestAddress asks for any address and returns it without its prefix length.
func (c *Client) RequestAddress(pool string) (string, error) {
	var got struct{ Address string }
	err := c.Call("IpamDriver.RequestAddress", map[string]string{"PoolID": pool}, &got)
	addr, _, _ := strings.Cut(got.Address, "/")
	return addr, err
}

// ReleaseAddress gives an address back.
func (c *Client) ReleaseAddress(pool, addr string) error {
	return c.Call("IpamDriver.ReleaseAddress", map[string]string{"PoolID": pool, "Address": addr}, nil)
}

// Call makes one call. An answer other than 200 is an error with what it says.
func (c *Client) Call(method string, body, answer any) error {
	text := []byte("{}")
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	c.out = fmt.Appendf(c.out[:0], "POST /%s HTTP/1.1\r\nHost: plugin\r\nContent-Length: %d\r\n\r\n%s", method, len(text), text)
	if _, err := c.conn.Write(c.out); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return err
	}
	said, err := io.ReadAll(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %s", method, resp.StatusCode, bytes.TrimSpace(said))
	}
	if err != nil || answer == nil {
		return err
	}
	return json.Unmarshal(said, answer)
}
