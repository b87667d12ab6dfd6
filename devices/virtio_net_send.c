// SPDX-License-Identifier: Apache-2.0
// Frames of the guest, their headers judged.
#include <errno.h>
#include <string.h>

#include "devices/virtio_net_parts.h"

// The guest's header, judged before the host's kernel sees it (5.1.6.2.1).
static bool header_good(const struct virtio_net *n, const struct net_header *h, uint64_t frame)
{
    uint64_t accepted = n->v.accepted;
    bool checksum = h->flags & HDR_NEEDS_CSUM;
    uint64_t segments = 0;
    if (h->flags & ~(HDR_NEEDS_CSUM | HDR_DATA_VALID) || (checksum && !(accepted & F_CSUM)))
        return false;
    if (checksum && (uint64_t)h->csum_start + h->csum_offset + 2 > frame)
        return false;
    switch (h->gso_type & ~GSO_ECN) {
    case GSO_NONE:
        return h->gso_type == GSO_NONE;
    case GSO_TCPV4:
        segments = F_HOST_TSO4;
        break;
    case GSO_TCPV6:
        segments = F_HOST_TSO6;
        break;
    default:
        return false;
    }
    if (h->gso_type & GSO_ECN)
        segments |= F_HOST_ECN;
    return (accepted & segments) == segments && checksum && h->gso_size && h->hdr_len <= frame;
}

// Looks at the chain in p->out. False: it is not to be sent.
static bool frame_accept(struct virtio_net *n, struct net_pair *p)
{
    struct net_header *h = &p->out_header;
    size_t got = chain_read(&p->out, 0, h, HEADER);
    uint64_t frame = p->out.out_len - got;
    if (got < HEADER || frame < NET_FRAME_MIN || frame > NET_FRAME_MAX ||
        !header_good(n, h, frame)) {
        if (!n->bad_headers++)
            log_write(&n->v.dev.vm->log, LOG_WARN,
                      "%s[%u]: frame of %llu bytes with flags 0x%x, gso 0x%x, size %u, header %u, "
                      "checksum %u+%u: dropped, and so are others like it",
                      n->v.dev.class->name, n->v.dev.instance, (unsigned long long)frame, h->flags,
                      h->gso_type, h->gso_size, h->hdr_len, h->csum_start, h->csum_offset);
        return false;
    }
    h->flags &= HDR_NEEDS_CSUM;
    h->num_buffers = 0;
    if (h->gso_type == GSO_NONE) // what says nothing is not handed on
        h->gso_size = h->hdr_len = 0;
    if (!(h->flags & HDR_NEEDS_CSUM))
        h->csum_start = h->csum_offset = 0;
    return true;
}

// > 0: it is done with; 0: not now; < 0: the host's side has ended.
static int frame_send(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    struct iovec iov[NET_IOV_MAX];
    uint64_t frame = p->out.out_len - HEADER;
    if (!n->link_wanted || !n->open) {
        n->sent.dropped++;
        return 1;
    }
    if (!p->out_paid && !net_limit_take(n, &n->send_limit, frame))
        return 0;
    p->out_paid = true;
    iov[0] = (struct iovec) {&p->out_header, HEADER};
    unsigned nr = 1 + chain_slice(&p->out, false, HEADER, frame, iov + 1);
    ssize_t ret = n->backend->ops->send(n->backend, pair, iov, nr);
    if (ret == -EAGAIN || ret == -EINTR) {
        net_poll_arm(p->writable, n->backend->fds[pair]);
        return 0;
    }
    if (net_lost(ret))
        return (int)ret;
    if (ret < 0) { // the interface is down, no memory ...: as on a wire, it is lost
        n->sent.dropped++;
        return 1;
    }
    n->sent.packets++;
    n->sent.bytes += frame;
    return 1;
}

static int blocked_flush(struct virtio_net *n, unsigned pair)
{
    struct net_backend *b = n->backend;
    int ret = b->blocked && n->open ? b->ops->flush(b) : 0;
    if (ret == -EAGAIN)
        net_poll_arm(n->pairs[pair].writable, b->fds[pair]);
    return ret;
}

static void out_done(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    virtio_push(&n->v, 2 * pair + 1, &p->out, 0);
    p->out_held = p->out_paid = false;
}

static bool send_turn(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    for (unsigned frames = 0; frames < BATCH; frames++) {
        int ret = blocked_flush(n, pair);
        if (!ret && !p->out_held) {
            if (!virtio_next(&n->v, 2 * pair + 1, &p->out))
                return true;
            if (!frame_accept(n, p)) {
                n->sent.dropped++;
                out_done(n, pair);
                continue;
            }
            p->out_held = true;
        }
        if (!ret)
            ret = frame_send(n, pair);
        if (ret < 0 && ret != -EAGAIN) {
            net_backend_lost(n, ret);
            continue; // and drops the frame
        }
        if (ret <= 0)
            return false;
        out_done(n, pair);
    }
    virtio_ring(&n->v, 2 * pair + 1);
    return false;
}

bool net_send(struct virtio_net *n, unsigned pair)
{
    if (n->attach_tries)
        return false; // soon
    bool done = send_turn(n, pair);
    virtio_signal(&n->v, 2 * pair + 1);
    return done;
}
