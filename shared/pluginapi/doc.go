// Package pluginapi speaks Docker's plugin protocol: HTTP and JSON over a unix
// socket, every call a POST to /INTERFACE.METHOD. It extends the wire types of
// go-plugins-helpers where those lag behind dockerd, puts the three interfaces on
// one socket, and gives drivers what the helpers lack: contexts with a deadline,
// a limit on bodies, a guard against panics, a stop that cuts no answer short.
//
// It knows nothing of networks, addresses or volumes beyond their wire form.
package pluginapi
