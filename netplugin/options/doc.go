// Package options turns what dockerd sends as maps of strings into the typed,
// checked Network and Endpoint. Nothing below it sees an option map, and
// everything it returns can be built.
//
// The names that Docker's own drivers use are accepted beside Berth's short
// ones, so that changing the driver of a Compose file is enough. An option that
// asks for something Berth does not do is refused, never ignored: a user who
// wrote enable_icc=false must not get a network where containers reach each
// other. Only names below com.docker.network. that Berth has never heard of pass,
// with a warning, because newer engines add some for themselves.
//
// It makes nothing and knows nothing of the host: whether a bridge name is taken
// or a subnet overlaps another network's is for the driver to say.
package options
