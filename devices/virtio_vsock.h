// SPDX-License-Identifier: Apache-2.0
// Vsock (virtio 1.2, 5.10): stream sockets between the guest and programs of this host, without
// vhost. On the host every end is a Unix socket, in the way other microVM monitors have it:
//
//   host to guest   connect to PATH, write "CONNECT PORT\n", read "OK LOCAL_PORT\n" once somebody
//                   in the guest has accepted. Refused, no such listener, or no answer in time: the
//                   connection is closed without a word.
//   guest to host   a guest that connects to cid 2, port P, reaches whoever listens on PATH_P;
//                   nobody: reset.
//
// PATH is made with mode 0600 and goes with the VM. A stale one (nobody listens) is replaced, one
// in use is an error. Files PATH_P belong to whoever makes them.
//
// Connections live in this process only: they end when saved state is loaded, and the guest is
// told so (transport reset); its cid may be another one then. Listening goes on, on both sides. A
// VM that is saved gives PATH up until it resumes, so that a destination on the same host can take
// it.
//
// Bounds, whatever guest and host programs do: VSOCK_CONNECTIONS_MAX connections and
// VSOCK_BUFFERS_MAX bytes of guest data that host programs have not taken yet. Realizing a device
// raises the process's soft limit of open files so far that the connections fit, if the hard limit
// allows it.
#pragma once

#include "devices/virtio.h"

enum {
    VSOCK_CONNECTIONS_MAX = 2048,
    VSOCK_BUFFERS_MAX = 128 * 1024 * 1024,
    VSOCK_WINDOW = 256 * 1024,      // bytes a connection may have buffered; while that fits
    VSOCK_WINDOW_SMALL = 32 * 1024, // the other connections; all of them always fit
    VSOCK_TIMEOUT_MS = 10000, // for a CONNECT line, the guest's answer, a place in a full backlog
    VSOCK_PATH_MAX = 96,      // bytes; leaves room for "_4294967295"
};

#define VSOCK_CID_HOST 2u
#define VSOCK_CID_MIN  3u
#define VSOCK_CID_MAX  0xfffffffeu // all ones is "any"

struct virtio_vsock_config {
    struct virtio_attach attach; // first
    uint64_t cid;
    char path[VSOCK_PATH_MAX + 1];
};

// "cid=N,path=FILE[,packed]"
int virtio_vsock_parse(const char *text, struct virtio_vsock_config *config, struct error *err);

extern const struct device_class virtio_vsock_class; // its config: struct virtio_vsock_config
