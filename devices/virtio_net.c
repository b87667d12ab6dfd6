// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/timerfd.h>

#include "vmm/util.h"
#include "vmm/vm.h"

enum {
    QUEUE_SIZE = 256,
    CONTROL_QUEUE_SIZE = 64,
    BATCH = 64,                    // frames a turn of the loop
    ANNOUNCE_ROUNDS = 5,           // after an arrival ...
    ANNOUNCE_MS = 50,              // ... after 50, 100, 150 ... ms
    ATTACH_MS = 20,                // between tries to take what the source still has
    ATTACH_TRIES = 1500,           // 30 s
    MTU_MIN = 68,                  // RFC 791
    SLACK = NET_FRAME_MAX - 65535, // Ethernet and VLAN headers
};

// 5.1.3
#define F_CSUM           (1ull << 0)
#define F_GUEST_CSUM     (1ull << 1)
#define F_GUEST_OFFLOADS (1ull << 2)
#define F_MTU            (1ull << 3)
#define F_MAC            (1ull << 5)
#define F_GUEST_TSO4     (1ull << 7)
#define F_GUEST_TSO6     (1ull << 8)
#define F_GUEST_ECN      (1ull << 9)
#define F_HOST_TSO4      (1ull << 11)
#define F_HOST_TSO6      (1ull << 12)
#define F_HOST_ECN       (1ull << 13)
#define F_MRG_RXBUF      (1ull << 15)
#define F_STATUS         (1ull << 16)
#define F_CTRL_VQ        (1ull << 17)
#define F_CTRL_RX        (1ull << 18)
#define F_CTRL_RX_EXTRA  (1ull << 20)
#define F_GUEST_ANNOUNCE (1ull << 21)
#define F_MQ             (1ull << 22)
#define F_CTRL_MAC       (1ull << 23)
#define GUEST_SEGMENTS   (F_GUEST_TSO4 | F_GUEST_TSO6)
#define GUEST_TAKES      (F_GUEST_CSUM | GUEST_SEGMENTS | F_GUEST_ECN)

enum { HDR_NEEDS_CSUM = 1, HDR_DATA_VALID = 2 };                     // 5.1.6, flags
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 }; // gso_type
enum { HEADER = sizeof(struct net_header) };
enum { S_LINK_UP = 1, S_ANNOUNCE = 2 }; // 5.1.4, status

struct __attribute__((packed)) net_space { // config space, 5.1.4
    uint8_t mac[6];
    uint16_t status, max_pairs, mtu;
};
_Static_assert(sizeof(struct net_space) == 12, "5.1.4");

// Watches the host's side once for each time it is armed: while we do not want frames, the kernel
// does not tell of them. On the heap, as a virtio_bell is.
struct net_poll {
    struct loop_op op, cancelled;
    struct virtio *v; // NULL once closed
    unsigned queue;   // that runs when `events` show
    uint32_t events;
    bool armed, cancelling;
};

struct net_pair { // of a receive queue (2 * index) and a send queue (2 * index + 1)
    bool enabled;
    struct net_poll *readable, *writable;
    // Receive: buffers taken from the queue and not yet given back, oldest first:
    // chains[(first + i) % (QUEUE_SIZE + 1)]. One element is always free, to look with.
    struct virtqueue_chain *chains;
    unsigned first, nr;
    uint64_t room;     // bytes in them
    unsigned segments; // that they consist of
    // A frame that was read and not yet given to the guest; 0 bytes: none. Its first `placed` bytes
    // lie in the chains (the header apart), the others in `spill`.
    size_t frame, placed;
    bool paid; // its limit
    struct net_header header;
    uint8_t *spill;
    // Send: a chain that was taken and not yet sent.
    struct virtqueue_chain out;
    struct net_header out_header;
    bool out_held, out_paid;
};

struct net_counters {
    uint64_t packets, bytes, dropped;
};

struct virtio_net {
    struct virtio v; // first
    struct virtio_net_config config;
    struct net_backend *backend;
    struct virtio_bell *timer, *limit_timer;
    unsigned nr_pairs;
    struct net_pair pairs[NET_PAIRS_MAX];
    struct net_counters received, sent;
    struct rate_limit receive_limit, send_limit;
    uint64_t bad_headers;
    bool link_wanted;      // by the person outside
    bool open;             // the backend is
    unsigned attach_tries; // left; 0: nobody waits
    bool settled;          // offloads and pairs are as the driver wants them
    bool arrived;          // state was loaded
    unsigned announces;    // left
    uint8_t mac[6];
    uint16_t mtu, active_pairs;
    uint8_t announcing;   // the guest was asked, and did not answer yet
    uint8_t started;      // guest_takes follows from the features
    uint64_t guest_takes; // of GUEST_TAKES, what the driver wants now (5.1.6.5.6)
    // The same, on their way out or in: only a load that is good changes those above.
    struct net_saved {
        uint8_t mac[6], announcing, started;
        uint16_t mtu, active_pairs;
        uint64_t guest_takes;
    } saved;
};

static struct virtio_net *net_of(struct virtio *v)
{
    return container_of(v, struct virtio_net, v);
}

static struct virtio_net *net_of_device(struct device *dev)
{
    return container_of(dev, struct virtio_net, v.dev);
}

// 5.1.2: the control queue follows the pairs that the driver knows of.
static unsigned control_queue(const struct virtio_net *n)
{
    return n->v.accepted & F_MQ ? 2 * n->nr_pairs : 2;
}

// --- watching the host's side

static bool net_run(struct virtio *v, unsigned queue);

static void poll_free(struct net_poll *p)
{
    if (!p->armed && !p->cancelling)
        free(p);
}

static void poll_done(struct loop_op *op, int res, uint32_t flags)
{
    struct net_poll *p = container_of(op, struct net_poll, op);
    struct virtio *v = p->v;
    p->armed = false;
    if (!v) {
        poll_free(p);
        return;
    }
    pthread_mutex_lock(&v->dev.lock);
    struct virtqueue *vq = &v->queues[p->queue];
    if (v->active && v->status & VIRTIO_DRIVER_OK && vq->enabled && !vq->broken &&
        net_run(v, p->queue) && virtqueue_kicks(vq, true))
        virtio_ring(v, p->queue);
    pthread_mutex_unlock(&v->dev.lock);
}

static void poll_cancelled(struct loop_op *op, int res, uint32_t flags)
{
    struct net_poll *p = container_of(op, struct net_poll, cancelled);
    p->cancelling = false;
    if (!p->v)
        poll_free(p);
}

static struct net_poll *poll_new(struct virtio *v, unsigned queue, uint32_t events)
{
    struct net_poll *p = calloc(1, sizeof(*p));
    if (p)
        *p = (struct net_poll) {.op = {poll_done},
                                .cancelled = {poll_cancelled},
                                .v = v,
                                .queue = queue,
                                .events = events};
    return p;
}

// Loop's thread.
static void poll_arm(struct net_poll *p, int fd)
{
    struct io_uring_sqe *sqe = p->armed ? NULL : loop_sqe(p->v->dev.vm->loop, &p->op);
    if (!sqe)
        return;
    io_uring_prep_poll_add(sqe, fd, p->events);
    io_uring_sqe_set_data(sqe, &p->op);
    p->armed = true;
}

// The kernel forgets the fd at once. Where the loop runs.
static void poll_disarm(struct net_poll *p)
{
    struct loop *loop = p && p->v ? p->v->dev.vm->loop : NULL;
    struct io_uring_sqe *sqe =
        loop && p->armed && !p->cancelling ? loop_sqe(loop, &p->cancelled) : NULL;
    if (!sqe)
        return;
    io_uring_prep_cancel(sqe, &p->op, 0);
    io_uring_sqe_set_data(sqe, &p->cancelled);
    p->cancelling = true;
    io_uring_submit(&loop->ring);
}

static void poll_close(struct net_poll *p)
{
    if (!p)
        return;
    poll_disarm(p);
    p->v = NULL;
    poll_free(p);
}

static void timer_set(struct virtio_bell *timer, uint64_t ns)
{
    struct itimerspec when = {.it_value = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)}};
    if (!ns)
        when.it_value.tv_nsec = 1; // 0 would mean "off"
    timerfd_settime(timer->fd, 0, &when, NULL);
}

static void all_ring(struct virtio_net *n)
{
    if (n->v.active && n->v.status & VIRTIO_DRIVER_OK)
        for (unsigned i = 0; i < n->v.nr_queues; i++)
            virtio_ring(&n->v, i);
}

// --- the link

static bool link_up(const struct virtio_net *n)
{
    return n->link_wanted && (n->open || n->attach_tries);
}

static void status_show(struct virtio_net *n)
{
    uint16_t status = (uint16_t)((link_up(n) ? S_LINK_UP : 0) | (n->announcing ? S_ANNOUNCE : 0));
    uint16_t *shown = (uint16_t *)(void *)(n->v.config + offsetof(struct net_space, status));
    if (*shown == status)
        return;
    *shown = status;
    virtio_config_changed(&n->v);
}

static void frames_forget(struct net_pair *p)
{
    p->frame = 0;
    p->paid = false;
}

static void backend_close(struct virtio_net *n)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        poll_disarm(n->pairs[i].readable);
        poll_disarm(n->pairs[i].writable);
        frames_forget(&n->pairs[i]);
    }
    n->backend->ops->close(n->backend);
    n->open = n->settled = false;
}

static void backend_lost(struct virtio_net *n, ssize_t error)
{
    backend_close(n);
    log_write(&n->v.dev.vm->log, LOG_WARN,
              "%s[%u]: the host's side is gone (%s%s%s); the guest's link is down",
              n->v.dev.class->name, n->v.dev.instance, strerror((int)-error),
              *n->backend->why ? ": " : "", n->backend->why);
    status_show(n);
    all_ring(n); // senders drop from now on
}

static int backend_open(struct virtio_net *n, struct error *err)
{
    memcpy(n->backend->mac, n->mac, sizeof(n->mac));
    int ret = n->open ? 0 : n->backend->ops->open(n->backend, err);
    if (ret)
        return ret;
    n->open = true;
    n->attach_tries = 0;
    n->settled = false;
    return 0;
}

static unsigned backend_takes(const struct virtio_net *n)
{
    uint64_t t = n->guest_takes;
    return (t & F_GUEST_CSUM ? NET_TAKES_CSUM : 0u) | (t & F_GUEST_TSO4 ? NET_TAKES_TSO4 : 0u) |
           (t & F_GUEST_TSO6 ? NET_TAKES_TSO6 : 0u) | (t & F_GUEST_ECN ? NET_TAKES_ECN : 0u);
}

// Tells the host's side what the driver takes, and by which queues.
static void settle(struct virtio_net *n)
{
    const struct net_backend_ops *ops = n->backend->ops;
    n->settled = true;
    int ret = ops->offload ? ops->offload(n->backend, backend_takes(n)) : 0;
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        n->pairs[i].enabled = i < n->active_pairs;
        if (ops->enable && n->nr_pairs > 1 && !ret)
            ret = ops->enable(n->backend, i, n->pairs[i].enabled);
    }
    if (net_lost(ret))
        backend_lost(n, ret);
    else if (ret)
        log_limited(&n->v.dev.vm->log, &n->v.limit, LOG_WARN, "%s[%u]: offloads and queues: %s",
                    n->v.dev.class->name, n->v.dev.instance, strerror(-ret));
}

// --- receive

static struct virtqueue_chain *chain_at(struct net_pair *p, unsigned i)
{
    return &p->chains[(p->first + i) % (QUEUE_SIZE + 1)];
}

static void chains_forget(struct net_pair *p)
{
    p->first = p->nr = p->segments = 0;
    p->room = 0;
    frames_forget(p);
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
    frames_forget(p);
}

static bool limit_take(struct virtio_net *n, struct rate_limit *limit, uint64_t bytes)
{
    if (!rate_limited(limit))
        return true;
    uint64_t now = time_ns();
    if (rate_limit_take(limit, bytes, 1, now))
        return true;
    // Either direction's time to wait may be the shorter one: a timer that comes too early is set
    // again.
    struct itimerspec running;
    uint64_t wait = rate_limit_wait(limit, bytes, 1, now), left = 0;
    if (!timerfd_gettime(n->limit_timer->fd, &running))
        left = (uint64_t)running.it_value.tv_sec * 1000000000u + (uint64_t)running.it_value.tv_nsec;
    if (!left || wait < left)
        timer_set(n->limit_timer, wait);
    return false;
}

// Gives the frame that was read to the guest: 1; 0: not now, since the limit says so; -EAGAIN: the
// driver must offer more first.
static int frame_deliver(struct virtio_net *n, unsigned pair)
{
    struct net_pair *p = &n->pairs[pair];
    struct virtqueue *vq = &n->v.queues[2 * pair];
    if (!p->paid && !limit_take(n, &n->receive_limit, p->frame - HEADER))
        return 0;
    p->paid = true;
    if (p->frame > p->room && !room_make(n, pair, p->frame)) {
        bool all = !(n->v.accepted & F_MRG_RXBUF) || vq->in_flight >= vq->size || !segments_left(p);
        if (!all || vq->broken)
            return -EAGAIN;
        n->received.dropped++; // larger than all that a driver can offer
        frames_forget(p);
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
                poll_arm(p->readable, n->backend->fds[pair]);
                return false;
            }
            if (ret) {
                backend_lost(n, ret);
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

static bool receive_run(struct virtio_net *n, unsigned pair)
{
    if (!n->open || !n->link_wanted || !n->pairs[pair].enabled)
        return false; // all_ring when that changes
    bool done = receive_turn(n, pair);
    virtio_signal(&n->v, 2 * pair);
    return done;
}

// --- send

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
    if (!p->out_paid && !limit_take(n, &n->send_limit, frame))
        return 0;
    p->out_paid = true;
    iov[0] = (struct iovec) {&p->out_header, HEADER};
    unsigned nr = 1 + chain_slice(&p->out, false, HEADER, frame, iov + 1);
    ssize_t ret = n->backend->ops->send(n->backend, pair, iov, nr);
    if (ret == -EAGAIN || ret == -EINTR) {
        poll_arm(p->writable, n->backend->fds[pair]);
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
        poll_arm(n->pairs[pair].writable, b->fds[pair]);
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
            backend_lost(n, ret);
            continue; // and drops the frame
        }
        if (ret <= 0)
            return false;
        out_done(n, pair);
    }
    virtio_ring(&n->v, 2 * pair + 1);
    return false;
}

static bool send_run(struct virtio_net *n, unsigned pair)
{
    if (n->attach_tries)
        return false; // soon
    bool done = send_turn(n, pair);
    virtio_signal(&n->v, 2 * pair + 1);
    return done;
}

// --- control queue, 5.1.6.5

enum { CTRL_RX = 0, CTRL_MAC = 1, CTRL_ANNOUNCE = 3, CTRL_MQ = 4, CTRL_OFFLOADS = 5 };
enum { CTRL_OK, CTRL_ERR };

static bool mac_good(const uint8_t mac[6])
{
    static const uint8_t none[6];
    return !(mac[0] & 1) && memcmp(mac, none, 6);
}

static uint8_t control_rx(const struct virtio_net *n, uint8_t command, size_t bytes)
{
    // We give the guest all there is; it may filter for itself.
    uint64_t needed = command <= 1 ? F_CTRL_RX : F_CTRL_RX_EXTRA;
    return command <= 5 && bytes == 1 && n->v.accepted & needed ? CTRL_OK : CTRL_ERR;
}

static uint8_t control_mac(struct virtio_net *n, uint8_t command, const uint8_t *data,
                           uint64_t bytes)
{
    if (command == 0) // a table to filter by, which we do not use
        return n->v.accepted & F_CTRL_RX && bytes >= 8 ? CTRL_OK : CTRL_ERR;
    if (command != 1 || bytes != 6 || !(n->v.accepted & F_CTRL_MAC) || !mac_good(data))
        return CTRL_ERR;
    memcpy(n->mac, data, 6);
    memcpy(n->v.config, data, 6);
    n->v.generation++;
    return CTRL_OK;
}

static uint8_t control_pairs(struct virtio_net *n, uint8_t command, const uint8_t *data,
                             uint64_t bytes)
{
    uint16_t pairs = (uint16_t)(data[0] | data[1] << 8);
    if (command != 0 || bytes != 2 || !(n->v.accepted & F_MQ) || !pairs || pairs > n->nr_pairs)
        return CTRL_ERR;
    n->active_pairs = pairs;
    n->settled = false;
    all_ring(n);
    return CTRL_OK;
}

static uint8_t control_offloads(struct virtio_net *n, uint8_t command, const uint8_t *data,
                                uint64_t bytes)
{
    uint64_t takes;
    memcpy(&takes, data, sizeof(takes));
    if (command != 0 || bytes != sizeof(takes) || !(n->v.accepted & F_GUEST_OFFLOADS) ||
        takes & ~(n->v.accepted & GUEST_TAKES))
        return CTRL_ERR;
    n->guest_takes = takes;
    n->settled = false;
    return CTRL_OK;
}

static uint8_t control(struct virtio_net *n, const struct virtqueue_chain *c)
{
    uint8_t head[2] = {0xff, 0xff}, data[8] = {0};
    if (chain_read(c, 0, head, 2) < 2)
        return CTRL_ERR;
    chain_read(c, 2, data, sizeof(data));
    uint64_t bytes = c->out_len - 2;
    switch (head[0]) {
    case CTRL_RX:
        return control_rx(n, head[1], bytes);
    case CTRL_MAC:
        return control_mac(n, head[1], data, bytes);
    case CTRL_ANNOUNCE:
        if (head[1] != 0 || !(n->v.accepted & F_GUEST_ANNOUNCE))
            return CTRL_ERR;
        n->announcing = false;
        status_show(n);
        return CTRL_OK;
    case CTRL_MQ:
        return control_pairs(n, head[1], data, bytes);
    case CTRL_OFFLOADS:
        return control_offloads(n, head[1], data, bytes);
    default:
        return CTRL_ERR;
    }
}

static bool control_run(struct virtio_net *n, unsigned queue)
{
    struct virtqueue_chain c;
    for (unsigned commands = 0; commands < BATCH; commands++) {
        if (!virtio_next(&n->v, queue, &c)) {
            virtio_signal(&n->v, queue);
            return true;
        }
        if (!c.in_len) {
            virtio_push(&n->v, queue, &c, 0);
            virtio_break(&n->v, queue, "command without a byte for its answer");
            return false;
        }
        uint8_t answer = n->v.accepted & F_CTRL_VQ ? control(n, &c) : CTRL_ERR;
        chain_write(&n->v.dev.vm->ram, &c, 0, &answer, 1);
        virtio_push(&n->v, queue, &c, 1);
    }
    virtio_signal(&n->v, queue);
    virtio_ring(&n->v, queue);
    return false;
}

static bool net_run(struct virtio *v, unsigned queue)
{
    struct virtio_net *n = net_of(v);
    if (!n->started) {
        n->started = true;
        n->guest_takes = v->accepted & GUEST_TAKES;
    }
    if (n->open && !n->settled)
        settle(n);
    if (queue == control_queue(n))
        return control_run(n, queue);
    if (queue > control_queue(n))
        return false; // of no meaning to a driver without F_MQ
    return queue % 2 ? send_run(n, queue / 2) : receive_run(n, queue / 2);
}

static void queues_forget(struct virtio_net *n)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        chains_forget(&n->pairs[i]);
        n->pairs[i].out_held = n->pairs[i].out_paid = false;
        n->pairs[i].enabled = false;
    }
}

static void net_reset(struct virtio *v)
{
    struct virtio_net *n = net_of(v);
    queues_forget(n);
    n->active_pairs = 1;
    n->guest_takes = 0;
    n->started = false;
    n->announcing = false;
    n->settled = false;
}

static const struct virtio_ops net_ops = {.id = VIRTIO_ID_NET, .run = net_run, .reset = net_reset};

// --- arrival

// Ethernet broadcast, RARP (RFC 903) reverse request for the guest's own address: switches learn
// where it is now. Padded to the least length of a frame.
static void announce_send(struct virtio_net *n)
{
    struct net_header header = {0};
    uint8_t frame[60] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    static const uint8_t rarp[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
    memcpy(frame + 6, n->mac, 6);
    memcpy(frame + 12, rarp, sizeof(rarp));
    memcpy(frame + 22, n->mac, 6);
    memcpy(frame + 32, n->mac, 6);
    const struct iovec iov[] = {{&header, HEADER}, {frame, sizeof(frame)}};
    ssize_t ret = n->backend->ops->send(n->backend, 0, iov, ARRAY_SIZE(iov));
    if (net_lost(ret))
        backend_lost(n, ret);
}

static void guest_ask(struct virtio_net *n)
{
    if (!(n->v.accepted & F_GUEST_ANNOUNCE) || !(n->v.status & VIRTIO_DRIVER_OK))
        return;
    n->announcing = true;
    status_show(n);
}

static void attach_try(struct virtio_net *n)
{
    struct error err;
    int ret = backend_open(n, &err);
    if (ret == -EBUSY && n->attach_tries > 1) {
        n->attach_tries--;
        timer_set(n->timer, ATTACH_MS * 1000000ull);
        return;
    }
    n->attach_tries = 0;
    if (ret)
        log_write(&n->v.dev.vm->log, LOG_ERROR, "%s[%u]: %s; the guest's link is down",
                  n->v.dev.class->name, n->v.dev.instance, err.text);
    status_show(n);
    all_ring(n);
}

static void timer_fired(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_net *n = net_of(v);
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) != sizeof(ticks) || !v->active)
        return;
    if (n->attach_tries)
        attach_try(n);
    if (n->attach_tries || !n->announces)
        return;
    if (n->open && n->link_wanted)
        announce_send(n);
    if (n->announces == ANNOUNCE_ROUNDS)
        guest_ask(n);
    if (--n->announces)
        timer_set(n->timer, (ANNOUNCE_ROUNDS + 1 - n->announces) * ANNOUNCE_MS * 1000000ull);
}

static void limit_over(struct virtio *v, struct virtio_bell *bell)
{
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) == sizeof(ticks))
        all_ring(net_of(v));
}

static void net_resume(struct device *dev)
{
    struct virtio_net *n = net_of_device(dev);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    if (n->arrived)
        n->announces = ANNOUNCE_ROUNDS;
    n->arrived = false;
    if (n->attach_tries)
        attach_try(n);
    // Also one that fired while we were paused, and did nothing.
    if (!n->attach_tries && n->announces)
        timer_set(n->timer, 0);
    pthread_mutex_unlock(&dev->lock);
}

// --- life

static uint64_t space_fill(struct virtio_net *n)
{
    struct net_space s = {
        .status = link_up(n) ? S_LINK_UP : 0, .max_pairs = (uint16_t)n->nr_pairs, .mtu = n->mtu};
    memcpy(s.mac, n->mac, sizeof(s.mac));
    memcpy(n->v.config, &s, sizeof(s));
    uint64_t features = F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX |
                        F_CTRL_RX_EXTRA | F_GUEST_ANNOUNCE | F_CTRL_MAC;
    if (n->nr_pairs > 1)
        features |= F_MQ;
    if (n->backend->ops->offloads && !n->config.no_offload)
        features |=
            F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | GUEST_TAKES | F_GUEST_OFFLOADS;
    return features;
}

static int backend_create(struct virtio_net *n, struct error *err)
{
    const struct virtio_net_config *c = &n->config;
    switch (c->kind) {
    case NET_TAP:
        return net_tap_new(&n->backend, *c->tap ? c->tap : NULL, c->fds[0], n->nr_pairs, err);
    case NET_USER:
        return net_user_new(&n->backend, &c->user, err);
    case NET_PACKETS:
        return net_packets_new(&n->backend, c->fds, n->nr_pairs, err);
    }
    return error_set(err, -EINVAL, "no such kind of network");
}

// One that arrives finds things that its source still uses; see net_resume.
static int backend_begin(struct virtio_net *n, struct error *err)
{
    int ret = backend_create(n, err);
    if (ret)
        return ret;
    bool wait = n->config.attach.arrives;
    if (!wait || n->backend->ops->early)
        ret = backend_open(n, err);
    else
        ret = *n->config.tap && !if_nametoindex(n->config.tap) ? backend_open(n, err) : -EBUSY;
    if (ret == -EBUSY && wait) {
        n->attach_tries = ATTACH_TRIES;
        ret = 0;
    }
    return ret;
}

static int pairs_create(struct virtio_net *n, struct error *err)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        struct net_pair *p = &n->pairs[i];
        p->readable = poll_new(&n->v, 2 * i, POLLIN);
        p->writable = poll_new(&n->v, 2 * i + 1, POLLOUT);
        p->chains = calloc(QUEUE_SIZE + 1, sizeof(*p->chains)); // used as far as chain_at goes
        p->spill = malloc(NET_FRAME_MAX);
        if (!p->readable || !p->writable || !p->chains || !p->spill)
            return error_set(err, -ENOMEM, "no memory for a pair of queues");
    }
    return 0;
}

static struct virtio_bell *timer_create_bell(struct virtio_net *n,
                                             void (*fn)(struct virtio *, struct virtio_bell *),
                                             struct error *err)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        error_errno(err, "timerfd_create");
    return fd < 0 ? NULL : virtio_bell_new(&n->v, fd, 0, fn, err);
}

static int timers_create(struct virtio_net *n, struct error *err)
{
    n->timer = timer_create_bell(n, timer_fired, err);
    n->limit_timer = n->timer ? timer_create_bell(n, limit_over, err) : NULL;
    return n->limit_timer ? 0 : err ? err->code : -ENOMEM;
}

static void net_close(struct virtio_net *n)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        poll_close(n->pairs[i].readable);
        poll_close(n->pairs[i].writable);
        free(n->pairs[i].chains);
        free(n->pairs[i].spill);
    }
    if (n->backend) {
        n->backend->ops->close(n->backend);
        n->backend->ops->free(n->backend);
    }
    virtio_bell_close(n->timer);
    virtio_bell_close(n->limit_timer);
}

static int mac_choose(struct virtio_net *n, struct error *err)
{
    if (mac_good(n->config.mac)) {
        memcpy(n->mac, n->config.mac, 6);
        return 0;
    }
    if (getrandom(n->mac, 6, 0) != 6)
        return error_errno(err, "getrandom");
    n->mac[0] = (uint8_t)((n->mac[0] & ~1) | 2); // one address, administered locally
    return 0;
}

static int net_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_net *n = net_of_device(dev);
    n->config = *(const struct virtio_net_config *)config;
    n->nr_pairs = n->config.pairs ? n->config.pairs : 1;
    n->link_wanted = true;
    n->active_pairs = 1;
    rate_limit_init(&n->receive_limit, &n->config.receive, time_ns());
    rate_limit_init(&n->send_limit, &n->config.send, time_ns());
    int ret = mac_choose(n, err);
    if (!ret)
        ret = timers_create(n, err);
    if (!ret)
        ret = pairs_create(n, err);
    if (!ret)
        ret = backend_begin(n, err);
    if (!ret)
        n->mtu = n->config.mtu ? n->config.mtu : n->backend->mtu ? n->backend->mtu : 1500;
    const struct virtio_setup setup = {.ops = &net_ops,
                                       .attach = &n->config.attach,
                                       .features = ret ? 0 : space_fill(n),
                                       .nr_queues = 2 * n->nr_pairs + 1,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(struct net_space)};
    if (!ret)
        ret = virtio_realize(&n->v, &setup, err);
    if (ret)
        net_close(n);
    return ret;
}

static void net_unrealize(struct device *dev)
{
    struct virtio_net *n = net_of_device(dev);
    virtio_unrealize(&n->v);
    net_close(n);
}

// --- saved state

static const struct state_field net_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_net),
    STATE_FIELD_BYTES(struct virtio_net, saved.mac, 1),
    STATE_FIELD_INT(struct virtio_net, saved.mtu, 1),
    STATE_FIELD_INT(struct virtio_net, saved.active_pairs, 1),
    STATE_FIELD_INT(struct virtio_net, saved.announcing, 1),
    STATE_FIELD_INT(struct virtio_net, saved.started, 1),
    STATE_FIELD_INT(struct virtio_net, saved.guest_takes, 1),
};

static int net_save(void *object, struct error *err)
{
    struct virtio_net *n = object;
    pthread_mutex_lock(&n->v.dev.lock);
    n->saved = (struct net_saved) {.announcing = n->announcing,
                                   .started = n->started,
                                   .mtu = n->mtu,
                                   .active_pairs = n->active_pairs,
                                   .guest_takes = n->guest_takes};
    memcpy(n->saved.mac, n->mac, sizeof(n->mac));
    pthread_mutex_unlock(&n->v.dev.lock);
    return virtio_save(&n->v, err);
}

static int saved_check(const struct virtio_net *n, struct error *err)
{
    const struct net_saved *s = &n->saved;
    if (!mac_good(s->mac) || s->mtu < MTU_MIN || s->announcing > 1 || s->started > 1)
        return error_set(err, -EBADMSG, "saved address, MTU %u or announcement %u", s->mtu,
                         s->announcing);
    if (!s->active_pairs || s->active_pairs > n->nr_pairs ||
        (s->active_pairs > 1 && !(n->v.accepted & F_MQ)))
        return error_set(err, -EBADMSG, "saved with %u pairs of queues, here it has %u",
                         s->active_pairs, n->nr_pairs);
    if (s->guest_takes & ~(n->v.accepted & GUEST_TAKES))
        return error_set(err, -EBADMSG, "saved offloads 0x%llx with features 0x%llx",
                         (unsigned long long)s->guest_takes, (unsigned long long)n->v.accepted);
    return 0;
}

static void saved_apply(struct virtio_net *n)
{
    const struct net_saved *s = &n->saved;
    struct net_space *space = (struct net_space *)(void *)n->v.config;
    memcpy(n->mac, s->mac, sizeof(n->mac));
    n->mtu = s->mtu;
    n->active_pairs = s->active_pairs;
    n->announcing = s->announcing;
    n->started = s->started;
    n->guest_takes = s->guest_takes;
    memcpy(space->mac, n->mac, sizeof(n->mac));
    space->mtu = n->mtu;
    space->status = (uint16_t)((link_up(n) ? S_LINK_UP : 0) | (n->announcing ? S_ANNOUNCE : 0));
    n->arrived = true;
}

static int net_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_net *n = object;
    pthread_mutex_lock(&n->v.dev.lock);
    queues_forget(n);
    n->settled = false;
    pthread_mutex_unlock(&n->v.dev.lock);
    int ret = saved_check(n, err);
    if (!ret)
        ret = virtio_load(&n->v, version, err);
    if (ret) { // what stays behind is safe to touch
        n->v.offered = n->v.features;
        virtio_device_reset(&n->v.dev);
        return ret;
    }
    pthread_mutex_lock(&n->v.dev.lock);
    saved_apply(n);
    pthread_mutex_unlock(&n->v.dev.lock);
    return 0;
}

static const struct state_table net_state = {
    .name = "virtio-net",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(net_fields),
    .fields = net_fields,
    .save = net_save,
    .load = net_load,
};

// --- for the person outside

static json_t *counters_show(const struct net_counters *c)
{
    return json_pack("{s:I, s:I, s:I}", "packets", (json_int_t)c->packets, "bytes",
                     (json_int_t)c->bytes, "dropped", (json_int_t)c->dropped);
}

static void limit_show(const struct rate_limit *limit, const char *prefix, json_t *out)
{
    json_t *own = json_object();
    const char *key;
    json_t *value;
    rate_limit_show(&limit->config, own);
    json_object_foreach(own, key, value)
    {
        char name[32];
        snprintf(name, sizeof(name), "%s-%s", prefix, key);
        json_object_set(out, name, value);
    }
    json_decref(own);
}

static void net_show(struct device *dev, json_t *out)
{
    struct virtio_net *n = net_of_device(dev);
    char mac[18];
    pthread_mutex_lock(&dev->lock);
    snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", n->mac[0], n->mac[1], n->mac[2],
             n->mac[3], n->mac[4], n->mac[5]);
    json_object_set_new(out, "backend", json_string(n->backend->ops->name));
    if (*n->config.tap)
        json_object_set_new(out, "tap", json_string(n->config.tap));
    json_object_set_new(out, "mac", json_string(mac));
    json_object_set_new(out, "mtu", json_integer(n->mtu));
    json_object_set_new(out, "link", json_string(link_up(n) ? "up" : "down"));
    json_object_set_new(out, "queues", json_integer(n->active_pairs));
    json_object_set_new(out, "received", counters_show(&n->received));
    json_object_set_new(out, "sent", counters_show(&n->sent));
    limit_show(&n->receive_limit, "rx", out);
    limit_show(&n->send_limit, "tx", out);
    pthread_mutex_unlock(&dev->lock);
}

static int link_set(struct virtio_net *n, const char *value, struct error *err)
{
    bool up = !strcmp(value, "up");
    if (!up && strcmp(value, "down"))
        return error_set(err, -EINVAL, "'%.20s': expected up or down", value);
    if (up && !n->open && !n->attach_tries) {
        int ret = backend_open(n, err);
        if (ret)
            return ret;
    }
    n->link_wanted = up;
    for (unsigned i = 0; i < n->nr_pairs && !up; i++) {
        poll_disarm(n->pairs[i].readable);
        frames_forget(&n->pairs[i]);
    }
    status_show(n);
    all_ring(n);
    return 0;
}

// "rx-bps", "tx-iops" ..., or without a prefix for both. As rate_limit_key.
static int limit_key(struct rate_limit_config *receive, struct rate_limit_config *send,
                     const char *key, const char *value, struct error *err)
{
    bool rx = !strncmp(key, "rx-", 3), tx = !strncmp(key, "tx-", 3);
    const char *own = rx || tx ? key + 3 : key;
    int ret = tx ? 0 : rate_limit_key(receive, own, value, err);
    return ret || rx ? ret : rate_limit_key(send, own, value, err);
}

static int limits_set(struct virtio_net *n, const char *key, const char *value, struct error *err)
{
    struct rate_limit_config receive = n->receive_limit.config, send = n->send_limit.config;
    int ret = limit_key(&receive, &send, key, value, err);
    if (!ret)
        ret = rate_limit_check(&receive, err);
    if (!ret)
        ret = rate_limit_check(&send, err);
    if (ret)
        return ret;
    uint64_t now = time_ns();
    rate_limit_change(&n->receive_limit, &receive, now);
    rate_limit_change(&n->send_limit, &send, now);
    all_ring(n);
    return 0;
}

static int net_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    struct virtio_net *n = net_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    int ret = strcmp(key, "link") ? limits_set(n, key, value, err) : link_set(n, value, err);
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

const struct device_class virtio_net_class = {
    .name = "virtio-net",
    .size = sizeof(struct virtio_net),
    .realize = net_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = net_resume,
    .unrealize = net_unrealize,
    .state = &net_state,
    .show = net_show,
    .set = net_set,
};

// --- the option's text

static int number_parse(const char *key, const char *value, unsigned long min, unsigned long max,
                        unsigned long *out, struct error *err)
{
    char *end;
    *out = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || *out < min || *out > max)
        return error_set(err, -EINVAL, "%s=%.40s: expected %lu to %lu", key, value, min, max);
    return 0;
}

static int switch_parse(const char *key, const char *value, bool *on, struct error *err)
{
    *on = !strcmp(value, "on");
    if (!*on && strcmp(value, "off"))
        return error_set(err, -EINVAL, "%s=%.40s: expected on or off", key, value);
    return 0;
}

static int mac_parse(const char *value, uint8_t mac[6], struct error *err)
{
    char end;
    int n = sscanf(value, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%c", &mac[0], &mac[1], &mac[2],
                   &mac[3], &mac[4], &mac[5], &end);
    if (n != 6 || strlen(value) != 17 || strspn(value, "0123456789abcdefABCDEF:") != 17)
        return error_set(err, -EINVAL, "mac=%.40s: expected six bytes, e.g. 02:00:00:00:00:01",
                         value);
    if (!mac_good(mac))
        return error_set(err, -EINVAL, "mac=%.40s: expected the address of one station", value);
    return 0;
}

// tcp:[ADDRESS/]HOSTPORT:GUESTPORT
static int forward_parse(const char *value, struct virtio_net_config *c, struct error *err)
{
    struct net_user_config *u = &c->user;
    struct net_forward f = {.udp = !strncmp(value, "udp:", 4)};
    if (u->nr_forwards == NET_FORWARDS_MAX)
        return error_set(err, -E2BIG, "forward=%.40s: at most %d", value, NET_FORWARDS_MAX);
    const char *ports = value + 4, *slash = strchr(value, '/');
    struct in_addr address;
    char end;
    unsigned host, guest;
    bool good = f.udp || !strncmp(value, "tcp:", 4);
    if (good && slash) {
        size_t len = (size_t)(slash - ports);
        good = slash > ports && len < sizeof(f.address);
        memcpy(f.address, ports, good ? len : 0);
        good = good && inet_pton(AF_INET, f.address, &address) == 1;
        ports = slash + 1;
    }
    good = good && *ports >= '0' && *ports <= '9' &&
           sscanf(ports, "%5u:%5u%c", &host, &guest, &end) == 2 && host && guest && host <= 65535 &&
           guest <= 65535;
    if (!good)
        return error_set(err, -EINVAL,
                         "forward=%.60s: expected tcp:HOSTPORT:GUESTPORT or "
                         "udp:ADDRESS/HOSTPORT:GUESTPORT",
                         value);
    f.host_port = (uint16_t)host;
    f.guest_port = (uint16_t)guest;
    u->forwards[u->nr_forwards++] = f;
    return 0;
}

static int tap_parse(const char *value, struct virtio_net_config *c, struct error *err)
{
    size_t len = strlen(value);
    if (!len || len >= sizeof(c->tap) || strchr(value, '/') || strchr(value, '%'))
        return error_set(err, -EINVAL, "tap=%.40s: expected the name of an interface", value);
    c->kind = NET_TAP;
    memcpy(c->tap, value, len + 1);
    return 0;
}

static int pair_word_parse(const char *key, const char *value, struct virtio_net_config *c,
                           struct error *err)
{
    unsigned long number;
    bool on;
    int ret;
    if (!strcmp(key, "mac"))
        return mac_parse(value, c->mac, err);
    if (!strcmp(key, "mtu")) {
        ret = number_parse(key, value, MTU_MIN, 65535, &number, err);
        c->mtu = c->user.mtu = (uint16_t)number;
        return ret;
    }
    if (!strcmp(key, "queues")) {
        ret = number_parse(key, value, 1, NET_PAIRS_MAX, &number, err);
        c->pairs = (unsigned)number;
        return ret;
    }
    if (!strcmp(key, "offload")) {
        ret = switch_parse(key, value, &on, err);
        c->no_offload = !on;
        return ret;
    }
    if (!strcmp(key, "host")) {
        ret = switch_parse(key, value, &on, err);
        c->user.no_host = !on;
        return ret;
    }
    if (!strcmp(key, "forward"))
        return forward_parse(value, c, err);
    return limit_key(&c->receive, &c->send, key, value, err);
}

static int first_word_parse(char *word, struct virtio_net_config *c, struct error *err)
{
    unsigned long fd;
    if (!strcmp(word, "user")) {
        c->kind = NET_USER;
        return 0;
    }
    if (!strncmp(word, "tap=", 4))
        return tap_parse(word + 4, c, err);
    if (strncmp(word, "tap-fd=", 7))
        return error_set(err, -EINVAL, "'%.40s': expected tap=NAME, tap-fd=N or user first", word);
    int ret = number_parse("tap-fd", word + 7, 3, 65535, &fd, err);
    c->kind = NET_TAP;
    c->fds[0] = (int)fd;
    return ret;
}

static int word_parse(char *word, struct virtio_net_config *c, struct error *err)
{
    char *equals = strchr(word, '=');
    int ret = -ENOENT;
    if (!strcmp(word, "packed")) {
        c->attach.packed = true;
        return 0;
    }
    if (equals) {
        *equals = 0;
        ret = pair_word_parse(word, equals + 1, c, err);
    }
    if (ret != -ENOENT)
        return ret;
    return error_set(err, -EINVAL,
                     "'%.40s': expected mac=, mtu=, queues=, offload=, forward=, host=, bps=, "
                     "iops= (rx-, tx-) or packed",
                     word);
}

static int config_check(const struct virtio_net_config *c, struct error *err)
{
    if (c->pairs > 1 && (c->kind == NET_USER || !*c->tap))
        return error_set(err, -EINVAL, "queues=%u: expected a tap by its name", c->pairs);
    if (c->kind != NET_USER && (c->user.nr_forwards || c->user.no_host))
        return error_set(err, -EINVAL, "forward= and host= are for user networking");
    int ret = rate_limit_check(&c->receive, err);
    return ret ? ret : rate_limit_check(&c->send, err);
}

int virtio_net_parse(const char *text, struct virtio_net_config *c, struct error *err)
{
    *c = (struct virtio_net_config) {.pairs = 1};
    autofree char *words = strdup(text);
    if (!words)
        return error_set(err, -ENOMEM, "no memory");
    int ret = 0;
    bool first = true;
    for (char *rest = words, *word; !ret && (word = strsep(&rest, ",")); first = false)
        ret = first ? first_word_parse(word, c, err) : word_parse(word, c, err);
    return ret ? ret : config_check(c, err);
}
