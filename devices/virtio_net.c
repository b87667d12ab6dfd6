// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/random.h>
#include <sys/timerfd.h>

#include "devices/virtio_net_parts.h"

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
void net_poll_arm(struct net_poll *p, int fd)
{
    struct io_uring_sqe *sqe = p->armed ? NULL : loop_sqe(p->v->dev.vm->loop, &p->op);
    if (!sqe)
        return;
    io_uring_prep_poll_add(sqe, fd, p->events);
    io_uring_sqe_set_data(sqe, &p->op);
    p->armed = true;
}

// The kernel forgets the fd at once. Where the loop runs.
void net_poll_disarm(struct net_poll *p)
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
    net_poll_disarm(p);
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

void net_ring_all(struct virtio_net *n)
{
    if (n->v.active && n->v.status & VIRTIO_DRIVER_OK)
        for (unsigned i = 0; i < n->v.nr_queues; i++)
            virtio_ring(&n->v, i);
}

bool net_limit_take(struct virtio_net *n, struct rate_limit *limit, uint64_t bytes)
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

// --- the link

bool net_link_up(const struct virtio_net *n)
{
    return n->link_wanted && (n->open || n->attach_tries);
}

void net_status_show(struct virtio_net *n)
{
    uint16_t status =
        (uint16_t)((net_link_up(n) ? S_LINK_UP : 0) | (n->announcing ? S_ANNOUNCE : 0));
    uint16_t *shown = (uint16_t *)(void *)(n->v.config + offsetof(struct net_space, status));
    if (*shown == status)
        return;
    *shown = status;
    virtio_config_changed(&n->v);
}

void net_frame_forget(struct net_pair *p)
{
    p->frame = 0;
    p->paid = false;
}

static void backend_close(struct virtio_net *n)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        net_poll_disarm(n->pairs[i].readable);
        net_poll_disarm(n->pairs[i].writable);
        net_frame_forget(&n->pairs[i]);
    }
    n->backend->ops->close(n->backend);
    n->open = n->settled = false;
}

void net_backend_lost(struct virtio_net *n, ssize_t error)
{
    backend_close(n);
    log_write(&n->v.dev.vm->log, LOG_WARN,
              "%s[%u]: the host's side is gone (%s%s%s); the guest's link is down",
              n->v.dev.class->name, n->v.dev.instance, strerror((int)-error),
              *n->backend->why ? ": " : "", n->backend->why);
    net_status_show(n);
    net_ring_all(n); // senders drop from now on
}

int net_backend_open(struct virtio_net *n, struct error *err)
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
        net_backend_lost(n, ret);
    else if (ret)
        log_limited(&n->v.dev.vm->log, &n->v.limit, LOG_WARN, "%s[%u]: offloads and queues: %s",
                    n->v.dev.class->name, n->v.dev.instance, strerror(-ret));
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
        return net_control(n, queue);
    if (queue > control_queue(n))
        return false; // of no meaning to a driver without F_MQ
    return queue % 2 ? net_send(n, queue / 2) : net_receive(n, queue / 2);
}

static void queues_forget(struct virtio_net *n)
{
    for (unsigned i = 0; i < n->nr_pairs; i++) {
        net_chains_forget(&n->pairs[i]);
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
    n->renamed = false;
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
        net_backend_lost(n, ret);
}

// Its driver tells the neighbours of each address it has (gratuitous ARP, unsolicited NA), in each
// VLAN, which we cannot know, and acknowledges (5.1.6.5.4). Asked each round: what it sends may be
// lost as ours may, while a switch learns of its new port.
static void guest_ask(struct virtio_net *n)
{
    if (!(n->v.accepted & F_GUEST_ANNOUNCE) || !(n->v.status & VIRTIO_DRIVER_OK) || n->renamed)
        return;
    n->announcing = true;
    net_status_show(n);
}

static void attach_try(struct virtio_net *n)
{
    struct error err;
    int ret = net_backend_open(n, &err);
    if (ret == -EBUSY && n->attach_tries > 1) {
        n->attach_tries--;
        timer_set(n->timer, ATTACH_MS * 1000000ull);
        return;
    }
    n->attach_tries = 0;
    if (ret)
        log_write(&n->v.dev.vm->log, LOG_ERROR, "%s[%u]: %s; the guest's link is down",
                  n->v.dev.class->name, n->v.dev.instance, err.text);
    net_status_show(n);
    net_ring_all(n);
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
    unsigned round = ANNOUNCE_ROUNDS - n->announces--;
    if (n->open && n->link_wanted) {
        announce_send(n);
        guest_ask(n);
    }
    if (n->announces)
        timer_set(n->timer, (ANNOUNCE_FIRST_MS + round * ANNOUNCE_STEP_MS) * 1000000ull);
}

void net_announce(struct virtio_net *n)
{
    n->announces = ANNOUNCE_ROUNDS;
    if (!n->attach_tries)
        timer_set(n->timer, 0);
}

static void limit_over(struct virtio *v, struct virtio_bell *bell)
{
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) == sizeof(ticks))
        net_ring_all(net_of(v));
}

static void net_resume(struct device *dev)
{
    struct virtio_net *n = net_of_device(dev);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    // A snapshot that is restored may be one of several copies, none of which may claim the
    // addresses before somebody says so.
    if (n->arrived && dev->vm->moved)
        n->announces = ANNOUNCE_ROUNDS;
    if (n->arrived && n->renamed)
        virtio_config_changed(&n->v);
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
    struct net_space s = {.status = net_link_up(n) ? S_LINK_UP : 0,
                          .max_pairs = (uint16_t)n->nr_pairs,
                          .mtu = n->mtu};
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
        ret = net_backend_open(n, err);
    else
        ret = *n->config.tap && !if_nametoindex(n->config.tap) ? net_backend_open(n, err) : -EBUSY;
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

int virtio_net_draw_mac(uint8_t mac[6], struct error *err)
{
    if (getrandom(mac, 6, 0) != 6)
        return error_errno(err, "getrandom");
    mac[0] = (uint8_t)((mac[0] & ~1) | 2); // one address, administered locally
    return 0;
}

static int mac_choose(struct virtio_net *n, struct error *err)
{
    if (net_mac_good(n->config.mac)) {
        memcpy(n->mac, n->config.mac, 6);
        return 0;
    }
    return virtio_net_draw_mac(n->mac, err);
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
    if (!net_mac_good(s->mac) || s->mtu < MTU_MIN || s->announcing > 1 || s->started > 1)
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
    if (net_mac_good(n->config.new_mac)) {
        memcpy(n->mac, n->config.new_mac, sizeof(n->mac));
        memset(n->config.new_mac, 0, sizeof(n->config.new_mac));
        n->announcing = false;
        n->renamed = true;
    }
    memcpy(space->mac, n->mac, sizeof(n->mac));
    space->mtu = n->mtu;
    space->status = (uint16_t)((net_link_up(n) ? S_LINK_UP : 0) | (n->announcing ? S_ANNOUNCE : 0));
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
