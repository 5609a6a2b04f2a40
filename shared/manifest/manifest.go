// Package manifest reads the config.json of a managed plugin as strictly as
// dockerd reads it loosely. dockerd ignores unknown keys, checks no value and
// accepts a file whose mistakes show only when the plugin is enabled, or when
// the first container starts. What Berth ships passes here first.
//
// It does not look at the rootfs beside the file.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/docker/docker/api/types"
)

// Load reads and checks the config.json at path. Every finding is one line of
// the error.
func Load(path string) (*types.PluginConfig, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	config, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return config, nil
}

// Parse decodes one config.json and checks it. A key that dockerd does not know,
// in any object, is an error.
func Parse(raw []byte) (*types.PluginConfig, error) {
	// types.PluginInterfaceType slices beyond its input when a type has no
	// slash, so the types are judged as plain strings before they reach it.
	var head struct {
		Interface struct{ Types []string }
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fmt.Errorf("not a plugin config: %w", err)
	}
	if err := checkTypes(head.Interface.Types); err != nil {
		return nil, err
	}

	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	var config types.PluginConfig
	if err := decoder.Decode(&config); err != nil {
		return nil, fmt.Errorf("not a plugin config: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("not a plugin config: more than one JSON value")
	}
	return &config, Check(&config)
}

// typePattern has no capital letters: dockerd compares the types bytewise.
var typePattern = regexp.MustCompile(`^docker\.(networkdriver|ipamdriver|volumedriver)/1\.0$`)

func checkTypes(names []string) error {
	if len(names) == 0 {
		return errors.New("interface.types: empty, dockerd would never call the plugin")
	}
	seen := make(map[string]bool, len(names))
	var faults []error
	for _, name := range names {
		if !typePattern.MatchString(name) {
			faults = append(faults, fmt.Errorf("interface.types: %q is none of docker.networkdriver/1.0, docker.ipamdriver/1.0, docker.volumedriver/1.0", name))
		}
		if seen[name] {
			faults = append(faults, fmt.Errorf("interface.types: %q is listed twice", name))
		}
		seen[name] = true
	}
	return errors.Join(faults...)
}

// implements tells whether the plugin announces the driver kind, such as
// "volumedriver".
func implements(config *types.PluginConfig, kind string) bool {
	for _, t := range config.Interface.Types {
		if strings.EqualFold(t.Capability, kind) {
			return true
		}
	}
	return false
}
