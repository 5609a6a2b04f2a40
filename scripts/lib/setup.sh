# shellcheck shell=bash
# Read by the scripts in the directory above: where the repository is, which
# Debian packages are needed for what, and how they are installed.

repo=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

# A private engine of the lab is a Debian root of its own.
packages_lab=(debootstrap ca-certificates)
# The tests also want a C compiler (race detector), the programs that rules and
# flows are compared with, and the emulator of the VM lab.
packages_test=("${packages_lab[@]}" gcc libc6-dev iptables nftables iproute2 procps conntrack dnsmasq-base busybox-static
  e2fsprogs btrfs-progs xfsprogs rsync attr acl openssh-client openssh-server qemu-system-x86)

say() { printf '%s\n' "$*"; }

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

need_root() {
  [ "$(id -u)" -eq 0 ] || die "needs root (namespaces, mounts, Docker): run it with sudo"
}

# need_go finds Go also where its installation guide puts it, which sudo leaves
# out of PATH. An older Go than go.mod asks for fetches the right one by itself.
need_go() {
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin:/usr/lib/go/bin
  command -v go >/dev/null || die "needs Go 1.26 or newer: https://go.dev/doc/install"
}

# install_packages NAME... installs what is missing, says so first, and starts no
# service: a package's daemon must not come up on this machine by surprise.
install_packages() {
  local missing=() package guard=/usr/sbin/policy-rc.d guarded=
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "please install: ${missing[*]} (there is no apt-get here)"
  say "Installing with apt-get: ${missing[*]}"
  if [ ! -e "$guard" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$guard"
    chmod 755 "$guard"
    guarded=yes
  fi
  local status=0
  apt_install "${missing[@]}" >/tmp/berth-apt.$$ 2>&1 || {
    apt-get update >>/tmp/berth-apt.$$ 2>&1 && apt_install "${missing[@]}" >>/tmp/berth-apt.$$ 2>&1
  } || status=$?
  [ -z "$guarded" ] || rm -f "$guard"
  [ "$status" -eq 0 ] || tail -n 20 /tmp/berth-apt.$$ >&2
  rm -f /tmp/berth-apt.$$
  [ "$status" -eq 0 ] || die "apt-get could not install: ${missing[*]}"
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# docker_answers tells whether a Docker Engine answers to this user.
docker_answers() {
  command -v docker >/dev/null && timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1
}

# build_lab makes the lab's command and puts its path into $lab.
build_lab() {
  need_root
  need_go
  lab=$repo/build/bin/berth-lab
  (cd "$repo" && go build -o "$lab" ./integration/cmd/berth-lab)
}

# lab_fetch ENGINE... fills the lab's cache, which is quick when it is full.
lab_fetch() {
  local log
  log=$(mktemp)
  "$lab" fetch "$@" 2>&1 | tee "$log" |
    sed -u -n 's/^debootstrap .*/fetching the Debian packages of an engine, about a minute/p' || {
    tail -n 20 "$log" >&2
    die "berth-lab fetch $* failed"
  }
  rm -f "$log"
}

# lab_quietly ARGS... runs a command of the lab and shows what it said only if it
# fails.
lab_quietly() {
  local said
  said=$("$lab" "$@" 2>&1) || die "berth-lab $*: $(printf '%s\n' "$said" | tail -n 20)"
}
