// Package integration runs Berth in real Docker Engines. The scenarios in
// testdata/scenario read like a shell history; docs/lab.md lists their commands.
package integration
