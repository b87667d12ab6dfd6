# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the scripts share: where things are, messages, progress of long steps, the package list.
# Sourced, never run. Needs nothing but bash and coreutils: it is used before anything is installed.

FERRY_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FERRY_CACHE=${FERRY_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ferry}
FERRY_BUILD=${FERRY_BUILD:-$FERRY_ROOT/build}
FERRY_GUEST=$FERRY_CACHE/guest
FERRY_LOGS=$FERRY_CACHE/logs
export FERRY_ROOT FERRY_CACHE FERRY_BUILD FERRY_GUEST FERRY_LOGS

# group, package, reason. Groups: build and guest are always needed; test, bench and dev on request.
packages() {
    cat <<'LIST'
build gcc                 compiles ferry and the guests
build libc6-dev           C library headers
build linux-libc-dev      KVM, userfaultfd and boot protocol structures
build meson               describes the build
build ninja-build         runs the build
build pkg-config          finds the libraries below
build liburing-dev        the event loop stands on io_uring
build libjansson-dev      configuration files and the control socket speak JSON
build libevent-dev       serves the control API: HTTP on a Unix socket
build zlib1g-dev          unpacks gzip kernels on the host side
build liblzma-dev         unpacks xz kernels on the host side
build liblz4-dev          unpacks lz4 kernels on the host side
build libzstd-dev         unpacks zstd kernels on the host side
build libssl-dev         TLS 1.3 between the hosts of a migration
build systemtap-sdt-dev  probes for perf and bpftrace (headers only)
build check               the unit tests are part of the build
build python3             meson, the tests and the benchmarks run on it
guest linux-source-6.1    source of the small guest kernel
guest make                builds the guest kernel
guest bc                  generates the guest kernel's time constants
guest bison               parser of the guest kernel's configuration
guest flex                scanner of the guest kernel's configuration
guest patch               applies our quirk patches to the guest kernel
guest xz-utils            unpacks the kernel source
guest cpio                packs the guest's initramfs
guest e2fsprogs           makes the guest's disk image
guest musl-tools          C library of the guest's programs: baseline x86-64, no AVX
guest bzip2               unpacks the source of busybox, the guest's shell and tools
test clang                second compiler, and the fuzzers' one
test libclang-rt-14-dev   sanitizer and libFuzzer run time of clang
test lz4                  makes lz4 kernels, seeds of the fuzzers
test zstd                 makes zstd kernels, seeds of the fuzzers
test openssl             makes the certificates that migrations are tested with
test iproute2             two "hosts" are two network namespaces
test passt                user networking of guests without privileges (--net user)
test iperf3               guests exchange its traffic; part of their tools image
test qemu-system-x86      a stock kernel must get as far under Ferry as under it
test acpica-tools         disassembles the ACPI tables a guest gets
bench qemu-system-x86     the peer the benchmarks run beside Ferry
bench iperf3              network throughput; part of the guests' tools image
bench iproute2            the tap of a benchmark is in a network namespace of its own
dev clang-format          formats the C code
dev shellcheck            checks the scripts
dev librsvg2-bin          renders the drawings in docs/ to look at them
LIST
}

msg() {
    printf '%s\n' "$*"
}

warn() {
    printf '%s\n' "$*" >&2
}

die() {
    warn "${0##*/}: $*"
    exit 1
}

# The comment block under the SPDX line of the calling script is its help text.
usage() {
    sed -n '/^# SPDX/,/^[^#]/{/^# SPDX/d;s/^# \{0,1\}//p}' "$0"
}

# What a build prints last says how far it is.
log_last_line() {
    tail -c 400 "$1" 2>/dev/null | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-60
}

progress_report() { # label, log; until killed. A line every second on a terminal, else every 20 s.
    local label=$1 log=$2 start=$SECONDS shown=$SECONDS never
    exec {never}<> <(:)
    while true; do
        read -r -t 1 -u "$never" || true # a sleep that leaves no child behind
        if [ -t 1 ]; then
            printf '\r\033[K%s ... %d s  %s' "$label" $((SECONDS - start)) "$(log_last_line "$log")"
        elif ((SECONDS - shown >= 20)); then
            shown=$SECONDS
            printf '%s ... %d s  %s\n' "$label" $((SECONDS - start)) "$(log_last_line "$log")"
        fi
    done
}

# step LABEL COMMAND...: runs it with its output in a log, shows that it is alive, and how long it
# took if that was worth a word. On failure: the end of the log, and the command's status.
step() {
    local label=$1 log reporter status=0 start=$SECONDS
    shift
    mkdir -p "$FERRY_LOGS"
    log=$FERRY_LOGS/$(printf '%s' "$label" | tr -c 'a-zA-Z0-9\n' '-').log
    : >"$log"
    progress_report "$label" "$log" &
    reporter=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    kill "$reporter" 2>/dev/null || true
    wait "$reporter" 2>/dev/null || true
    [ -t 1 ] && printf '\r\033[K'
    if ((status != 0)); then
        warn "$label: failed with status $status after $((SECONDS - start)) s; the end of $log:"
        tail -n 30 "$log" >&2
    elif ((SECONDS - start > 1)); then
        msg "$label: $((SECONDS - start)) s"
    fi
    return "$status"
}

build_ferry() {
    if [ ! -f "$FERRY_BUILD/build.ninja" ]; then
        step "configure ferry" meson setup "$FERRY_BUILD" "$FERRY_ROOT" || return
    fi
    step "build ferry" ninja -C "$FERRY_BUILD"
}

build_guest() { # [TARGET]...; says itself how far it is
    "$FERRY_ROOT/guest/build" "$@" --out "$FERRY_GUEST" </dev/null
}
