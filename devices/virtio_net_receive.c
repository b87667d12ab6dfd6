// SPDX-License-Identifier: Apache-2.0
// Frames from the host into the guest's buffers.
#include <errno.h>
#include <string.h>

#include "devices/virtio_net_parts.h"

static struct virtqueue_chain *chain_at(struct net_pair *p, unsigned i)
{
    return &p->chains[(p->first + i) % (QUEUE_SIZE + 1)];
}

void net_chains_forget(struct net_pair *p)
{
    p->first = p->nr = p->segments = 0;
    p->room = 0;
    net_frame_forget(p);
}

// All that is taken goes into one read, and into saved state when the VM is.
static bool segments_left(const struct net_pair *p)
{
    return p->segments + VQ_SEGMENTS_MAX <= NET_IOV_MAX - 2; // the header, `spill`
}

// Takes buffers until there is room for `wanted` bytes. False: the driver has offered fewer so far.
static bool room_make(struct virtio_net *n, unsigned pair, uint64_t wanted)
{
    struct net_pair *p = &n->pairs[pair];
    bool several = n->v.accepted & F_MRG_RXBUF;
    while (p->room < wanted && (several || !p->nr) && segments_left(p)) {
        struct virtqueue_chain *c = chain_at(p, p->nr);
        if (!virtio_next(&n->v, 2 * pair, c))
            return false;
        if (c->in_len <= HEADER) {
            virtio_push(&n->v, 2 * pair, c, 0);
            virtio_break(&n->v, 2 * pair, "receive buffer of %llu bytes, expected more than %d",
                         (unsigned long long)c->in_len, HEADER);
            return false;
        }
        p->nr++;
        p->room += c->in_len;
        p->segments += c->nr_in;
    }
    return p->room >= wanted;
}

// The largest frame to expect, with its header.
static uint64_t frame_most(const struct virtio_net *n)
{
    if (n->guest_takes & GUEST_SEGMENTS && n->backend->ops->offloads)
        return HEADER + NET_FRAME_MAX;
    return HEADER + SLACK + (n->mtu > 1500 ? n->mtu : 1500u);
}

// The header goes elsewhere first, so that the guest never sees it half written.
static unsigned frame_iov(struct net_pair *p, struct iovec iov[NET_IOV_MAX])
{
    unsigned nr = 0;
    size_t bytes = HEADER;
    iov[nr++] = (struct iovec) {&p->header, HEADER};
    for (unsigned i = 0; i < p->nr; i++) {
        const struct virtqueue_chain *c = chain_at(p, i);
        uint64_t from = i ? 0 : HEADER;
        nr += chain_slice(c, true, from, c->in_len - from, iov + nr);
        bytes += c->in_len - from;
    }
    p->placed = bytes;
    iov[nr++] = (struct iovec) {p->spill, NET_FRAME_MAX};
    return nr;
}

// Whether the driver may be shown this: it was cut to what it takes, unless the host's side had it
// already when that changed.
static bool header_suits(const struct virtio_net *n, struct net_header *h)
{
    uint64_t takes = n->guest_takes;
    if (!(takes & F_GUEST_CSUM)) {
        h->flags &= (uint8_t)~HDR_DATA_VALID;
        if (h->flags & HDR_NEEDS_CSUM)
            return false;
    }
    switch (h->gso_type & ~GSO_ECN) {
    case GSO_NONE:
        return true;
    case GSO_TCPV4:
        return takes & F_GUEST_TSO4 && (!(h->gso_type & GSO_ECN) || takes & F_GUEST_ECN);
    case GSO_TCPV6:
        return takes & F_GUEST_TSO6 && (!(h->gso_type & GSO_ECN) || takes & F_GUEST_ECN);
    default:
        return false;
    }
}

// Reads the next frame. 0, -EAGAIN (the host has none) or what ended the host's side.
static int frame_read(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    struct iovec iov[NET_IOV_MAX];
    unsigned nr = frame_iov(p, iov);
    ssize_t len = n->backend->ops->receive(n->backend, pair, iov, nr);
    if (len < 0)
        return len == -EINTR ? -EAGAIN : (int)len;
    bool good = len >= HEADER + NET_FRAME_MIN && len <= HEADER + NET_FRAME_MAX;
    if (!good || !header_suits(n, &p->header)) {
        n->received.dropped++;
        return 0; // the buffers serve the next one
    }
    p->frame = (size_t)len;
    p->paid = false;
    return 0;
}

// Moves what lies in `spill` to its place in chains that came later.
static void spill_place(struct virtio_net *n, struct net_pair *p)
{
    uint64_t at = 0; // where the chain begins in the frame
    for (unsigned i = 0; i < p->nr && at < p->frame; i++) {
        const struct virtqueue_chain *c = chain_at(p, i);
        uint64_t end = at + c->in_len < p->frame ? at + c->in_len : p->frame;
        uint64_t from = at > p->placed ? at : p->placed;
        if (from < end)
            chain_write(&n->v.dev.vm->ram, c, from - at, p->spill + (from - p->placed),
                        (size_t)(end - from));
        at += c->in_len;
    }
}

static void frame_give(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    struct virtqueue_used used[QUEUE_SIZE];
    size_t left = p->frame;
    unsigned nr = 0;
    if (p->frame > p->placed)
        spill_place(n, p);
    for (; left; nr++) {
        struct virtqueue_chain *c = chain_at(p, nr);
        uint32_t take = (uint32_t)(c->in_len < left ? c->in_len : left);
        used[nr] = (struct virtqueue_used) {c, take};
        p->room -= c->in_len;
        p->segments -= c->nr_in;
        left -= take;
    }
    p->header.num_buffers = (uint16_t)nr; // also without F_MRG_RXBUF (5.1.6.1)
    chain_write(&n->v.dev.vm->ram, used[0].chain, 0, &p->header, HEADER);
    virtqueue_push_group(&n->v.queues[2 * pair], used, nr);
    p->first = (p->first + nr) % (QUEUE_SIZE + 1);
    p->nr -= nr;
    n->received.packets++;
    n->received.bytes += p->frame - HEADER;
    net_frame_forget(p);
}

// Gives the frame that was read to the guest: 1; 0: not now, since the limit says so; -EAGAIN: the
// driver must offer more first.
static int frame_deliver(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    struct virtqueue *vq = &n->v.queues[2 * pair];
    if (!p->paid && !net_limit_take(n, &n->receive_limit, p->frame - HEADER))
        return 0;
    p->paid = true;
    if (p->frame > p->room && !room_make(n, pair, p->frame)) {
        bool all = !(n->v.accepted & F_MRG_RXBUF) || vq->in_flight >= vq->size || !segments_left(p);
        if (!all || vq->broken)
            return -EAGAIN;
        n->received.dropped++; // larger than all that a driver can offer
        net_frame_forget(p);
        return 1;
    }
    frame_give(n, pair);
    return 1;
}

// Whether the driver's doorbell is needed for more; see virtio_ops.run.
static bool receive_turn(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    for (unsigned frames = 0; frames < BATCH; frames++) {
        if (!p->frame) {
            room_make(n, pair, frame_most(n));
            if (!p->nr)
                return true;
            int ret = frame_read(n, pair);
            if (ret == -EAGAIN) {
                net_poll_arm(p->readable, n->backend->fds[pair]);
                return false;
            }
            if (ret) {
                net_backend_lost(n, ret);
                return false;
            }
        }
        int ret = p->frame ? frame_deliver(n, pair) : 1; // one that was read may have been bad
        if (ret <= 0)
            return ret == -EAGAIN;
    }
    virtio_ring(&n->v, 2 * pair); // the others' turn first
    return false;
}

bool net_receive(struct virtio_net *n, unsigned pair)
{
    if (!n->open || !n->link_wanted || !n->pairs[pair].enabled)
        return false; // all_ring when that changes
    bool done = receive_turn(n, pair);
    virtio_signal(&n->v, 2 * pair);
    return done;
}
