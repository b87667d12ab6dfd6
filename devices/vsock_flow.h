// SPDX-License-Identifier: Apache-2.0
// Credit of one vsock connection (virtio 1.2, 5.10.6.3), and the bytes from the guest that the
// host's socket could not take yet. Pure: no socket, no queue, no clock.
//
// All counters are those of the wire: 32 bits, free-running, compared modulo 2^32. Towards the
// guest nothing is buffered, so a guest that lies about its own window harms nobody but itself.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct vsock_flow {
    // From the guest.
    uint32_t window;    // buf_alloc that we announce: the most that is ever buffered; below 2^31
    uint32_t received;  // bytes that came
    uint32_t forwarded; // fwd_cnt: bytes of those that are no longer in the buffer
    uint32_t told;      // `forwarded` as the guest knows it
    // To the guest.
    uint32_t peer_window, peer_forwarded; // what it announced
    uint32_t sent;                        // bytes
    // received - forwarded bytes, from `head` on, in a ring of `window` bytes; NULL while empty.
    uint8_t *data;
    uint32_t head;
};

static inline uint32_t flow_buffered(const struct vsock_flow *f)
{
    return f->received - f->forwarded;
}

// Bytes that the guest may have under way now. It may use what it was told: what was freed since
// only counts once a packet has told it.
static inline uint32_t flow_room(const struct vsock_flow *f)
{
    return f->window - (f->received - f->told);
}

// Bytes that may be sent to the guest. 0 when it has shrunk its window below what is under way.
static inline uint32_t flow_credit(const struct vsock_flow *f)
{
    uint32_t under_way = f->sent - f->peer_forwarded;
    return under_way < f->peer_window ? f->peer_window - under_way : 0;
}

// What a packet's header says. Packets of two CPUs of the guest may come in the wrong order, so a
// count that goes back, and one that goes ahead of what was sent, is not believed.
static inline void flow_credit_update(struct vsock_flow *f, uint32_t buf_alloc, uint32_t fwd_cnt)
{
    f->peer_window = buf_alloc;
    if (fwd_cnt - f->peer_forwarded <= f->sent - f->peer_forwarded)
        f->peer_forwarded = fwd_cnt;
}

// The guest sees at least half of the window as taken, and part of that is free by now.
static inline bool flow_update_due(const struct vsock_flow *f)
{
    return f->forwarded != f->told && flow_room(f) <= f->window / 2;
}

// Data that came, and needs no buffer: written or thrown away.
static inline void flow_pass(struct vsock_flow *f, uint32_t len)
{
    f->received += len;
    f->forwarded += len;
}

// Copies `len` bytes of the segments behind what is buffered; they fit (flow_room). -ENOMEM.
int flow_append(struct vsock_flow *f, const struct iovec *iov, unsigned n, uint32_t len);
// The buffered bytes in order; returns the number of segments.
unsigned flow_buffer(const struct vsock_flow *f, struct iovec iov[2]);
// The first `len` of them have gone. The memory goes with the last.
void flow_forward(struct vsock_flow *f, uint32_t len);
