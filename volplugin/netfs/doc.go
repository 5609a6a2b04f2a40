// Package netfs mounts directories of file servers, NFS and CIFS, in private
// directories of this host: it reads what users write in the words of Docker's
// local driver, finds the server within a deadline, and calls mount(2). It needs no
// mount.nfs or mount.cifs.
//
// A mount(2) whose server stops answering cannot be ended. Servers are therefore
// spoken to before it, and callers bound what they wait.
package netfs
