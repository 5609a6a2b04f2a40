# Three targets: berth-net, berth-vol and berth (both). Each is the complete root
# file system of a managed plugin; ./scripts/build-plugin unpacks it beside its
# config.json.
#
# It builds with BuildKit and with the classic builder, and without any network
# when the base images are at hand, the second one holds iptables, the tools for file
# systems and ssh, and the context holds vendor/ and packaging/restic/vendor/, or the
# finished programs named berthd and restic (then GO_IMAGE can be any).
ARG GO_IMAGE=golang:1.26-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${GO_IMAGE} AS build
ARG VERSION=dev
WORKDIR /src
COPY . .
# Go uses vendor/ by itself when it is there, and downloads the modules otherwise.
RUN mkdir -p /out/usr/bin; \
    if [ -f berthd ]; then cp berthd /out/usr/bin/berthd; else \
      CGO_ENABLED=0 GOTOOLCHAIN=local go build -buildvcs=false -trimpath \
        -ldflags "-s -w -X main.version=${VERSION}" -o /out/usr/bin/berthd ./cmd/berthd; \
    fi

# What makes backups, at the version that packaging/restic names. It is a stage of its
# own, with nothing of Berth in it, so that it is built again only when that changes.
FROM ${GO_IMAGE} AS restic
WORKDIR /src
COPY packaging/restic packaging/restic
# The second is there or not.
COPY packaging/restic/go.mod restic* /have/
RUN mkdir -p /out/usr/bin; \
    if [ -f /have/restic ]; then cp /have/restic /out/usr/bin/restic; else \
      cd packaging/restic && CGO_ENABLED=0 GOTOOLCHAIN=local go build -buildvcs=false -trimpath \
        -ldflags "-s -w" -tags disable_grpc_modules -o /out/usr/bin/restic github.com/restic/restic/cmd/restic; \
    fi

# iptables in both variants, since dockerd may use either and Berth speaks to the
# chains of dockerd. Berth's own rules go to nftables by netlink and need no
# program.
FROM ${BASE_IMAGE} AS tools
RUN if ! command -v xtables-nft-multi >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends iptables && rm -rf /var/lib/apt/lists/*; \
    fi
# The two programs, their names, every extension (the rules of others are read
# too), and the libraries that all of these are linked against.
RUN set -eu; mkdir -p /out/usr/sbin; cd /usr/sbin; \
    cp xtables-nft-multi xtables-legacy-multi /out/usr/sbin/; \
    for family in iptables ip6tables; do \
      for suffix in "" -save -restore; do \
        ln -s xtables-nft-multi "/out/usr/sbin/$family-nft$suffix"; \
        ln -s xtables-legacy-multi "/out/usr/sbin/$family-legacy$suffix"; \
        ln -s xtables-nft-multi "/out/usr/sbin/$family$suffix"; \
      done; \
    done; \
    cp --parents /usr/lib/*/xtables/lib*.so /out/; \
    for file in /out/usr/sbin/*-multi /out/usr/lib/*/xtables/*.so; do ldd "$file"; done \
      | grep -o '/[^ ]*\.so[^ ]*' | sort -u | xargs cp -L --parents -t /out; \
    mkdir -p /out/run/docker/plugins /out/state /out/host/sysctl/net; \
    mkdir -p /dirs/run/docker/plugins /dirs/state /dirs/data /dirs/backup /dirs/mnt/berth-volumes

# What makes file systems in the images of volumes, and gives a copied btrfs a UUID of
# its own. Everything else about them is done by system calls.
FROM ${BASE_IMAGE} AS volume-tools
RUN if ! command -v mkfs.btrfs >/dev/null || ! command -v mkfs.xfs >/dev/null || ! command -v mkfs.ext4 >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends btrfs-progs xfsprogs e2fsprogs && rm -rf /var/lib/apt/lists/*; \
    fi
RUN set -eu; mkdir -p /out/usr/sbin; \
    for name in mkfs.btrfs btrfstune mkfs.xfs mkfs.ext4; do cp -L "$(command -v "$name")" /out/usr/sbin/; done; \
    for file in /out/usr/sbin/*; do ldd "$file"; done \
      | grep -o '/[^ ]*\.so[^ ]*' | sort -u | xargs cp -L --parents -t /out

# What restic needs for repositories on other machines: certificates for https, and ssh with
# its libraries for sftp, which asks for the name of its user. The hosts' names come from
# the host: Docker mounts its /etc/hosts and /etc/resolv.conf into plugins.
FROM ${BASE_IMAGE} AS backup-tools
RUN if ! command -v ssh >/dev/null || ! [ -s /etc/ssl/certs/ca-certificates.crt ]; then \
      apt-get update && apt-get install -y --no-install-recommends openssh-client ca-certificates && rm -rf /var/lib/apt/lists/*; \
    fi
RUN set -eu; mkdir -p /out/usr/bin /out/etc/ssl/certs; \
    cp -L "$(command -v ssh)" /out/usr/bin/ssh; \
    cp -L /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/; \
    echo 'root:x:0:0:root:/:/bin/false' >/out/etc/passwd; \
    echo 'passwd: files' >/out/etc/nsswitch.conf; \
    ldd /out/usr/bin/ssh | grep -o '/[^ ]*\.so[^ ]*' | sort -u | xargs cp -L --parents -t /out

# The plugins run as root: dockerd ignores the user of a plugin's config, and a
# child with another uid would lose CAP_NET_ADMIN and CAP_SYS_ADMIN, which are
# what the plugins are for.
FROM scratch AS berth-net
COPY --from=tools /out/ /
COPY --from=build /out/ /
ENTRYPOINT ["/usr/bin/berthd", "network"]

FROM scratch AS berth-vol
COPY --from=tools /dirs/ /
COPY --from=volume-tools /out/ /
COPY --from=backup-tools /out/ /
COPY --from=restic /out/ /
COPY --from=build /out/ /
ENTRYPOINT ["/usr/bin/berthd", "volume"]

FROM scratch AS berth
COPY --from=tools /out/ /
COPY --from=tools /dirs/ /
COPY --from=volume-tools /out/ /
COPY --from=backup-tools /out/ /
COPY --from=restic /out/ /
COPY --from=build /out/ /
ENTRYPOINT ["/usr/bin/berthd", "all"]
