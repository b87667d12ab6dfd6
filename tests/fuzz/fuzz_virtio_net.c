// SPDX-License-Identifier: Apache-2.0
// Frames and commands, with two pairs of queues; what comes from the host goes to either pair,
// with the header that the input says.
#include "devices/virtio_net.h"

#include <sys/socket.h>

#include "tests/fuzz/fuzz_virtio.h"

static int peers[2][2]; // the host's ends, of each transport's device

static void *config(void)
{
    struct virtio_net_config *c = calloc(1, sizeof(*c));
    if (!c)
        abort();
    c->kind = NET_PACKETS;
    c->pairs = 2;
    for (unsigned i = 0; i < 2; i++) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends))
            abort();
        c->fds[i] = ends[0];
        peers[fuzz_transport][i] = ends[1];
    }
    return c;
}

// The first byte chooses the pair, and whether to take what the guest sent or to leave the socket
// full; and how many zeroes follow, so that a frame can be long.
static void outside(const uint8_t *data, size_t size)
{
    static uint8_t frame[64 * 1024 + 256], taken[sizeof(frame)];
    if (size < 2)
        return;
    int peer = peers[fuzz_transport][data[0] & 1];
    while (data[0] & 2 && recv(peer, taken, sizeof(taken), 0) > 0)
        ;
    memcpy(frame, data + 1, size - 1);
    memset(frame + size - 1, 0, sizeof(frame) - (size - 1));
    size_t len = size - 1 + (size_t)(data[0] >> 2) * 1024;
    if (send(peer, frame, len, 0) < 0)
        return; // full
}

FUZZ_VIRTIO(&virtio_net_class, config, outside)
