// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_vsock.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include "devices/vsock_internal.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { QUEUE_SIZE = 256 };
// What one turn moves before the loop's other work gets its turn.
enum { PACKETS_A_TURN = 256, BYTES_A_TURN = 1024 * 1024 };
enum { EVENT_TRANSPORT_RESET = 0 }; // 5.10.6.7

#define F_STREAM (1ull << 0)

static struct virtio_vsock *vsock_of(struct virtio *v)
{
    return container_of(v, struct virtio_vsock, v);
}

// --- to the guest

// The next buffer of the driver in s->rx.
static bool rx_take(struct virtio_vsock *s)
{
    if (s->rx_held)
        return true;
    if (!virtio_next(&s->v, VSOCK_RX, &s->rx))
        return false;
    if (s->rx.in_len <= sizeof(struct vsock_header)) {
        virtio_break(&s->v, VSOCK_RX, "a buffer of %llu bytes: expected more than a header's %zu",
                     (unsigned long long)s->rx.in_len, sizeof(struct vsock_header));
        return false;
    }
    s->rx_held = true;
    return true;
}

static void rx_send(struct virtio_vsock *s, const struct vsock_header *h)
{
    chain_write(&s->v.dev.vm->ram, &s->rx, 0, h, sizeof(*h));
    virtio_push(&s->v, VSOCK_RX, &s->rx, (uint32_t)sizeof(*h) + h->len);
    s->rx_held = false;
    s->resets_sent += h->op == VSOCK_OP_RST;
}

static void reset_send(struct virtio_vsock *s)
{
    const struct vsock_reset *r = &s->resets[s->resets_head];
    const struct vsock_header h = {.src_cid = r->cid,
                                   .dst_cid = s->cid,
                                   .src_port = r->host_port,
                                   .dst_port = r->guest_port,
                                   .type = r->type,
                                   .op = VSOCK_OP_RST};
    s->resets_head = (s->resets_head + 1) % VSOCK_RESETS;
    s->resets_nr--;
    rx_send(s, &h);
    if (s->tx_stalled)
        virtio_ring(&s->v, VSOCK_TX);
    s->tx_stalled = false;
}

// Straight from the socket into the driver's buffer.
static uint32_t data_read(struct virtio_vsock *s, struct vsock_connection *c)
{
    struct iovec iov[VQ_SEGMENTS_MAX];
    uint64_t len = s->rx.in_len - sizeof(struct vsock_header);
    uint32_t credit = flow_credit(&c->flow);
    if (len > credit)
        len = credit;
    if (len > BYTES_A_TURN)
        len = BYTES_A_TURN;
    unsigned n = chain_slice(&s->rx, true, sizeof(struct vsock_header), len, iov);
    return vsock_host_read(s, c, iov, n);
}

// What the connection sends now: one packet, or none when its socket turns out to be empty.
static enum vsock_op op_next(struct virtio_vsock *s, struct vsock_connection *c, uint32_t *len)
{
    static const struct {
        uint8_t owed, op;
    } first[] = {{OWES_RST, VSOCK_OP_RST},
                 {OWES_REQUEST, VSOCK_OP_REQUEST},
                 {OWES_RESPONSE, VSOCK_OP_RESPONSE},
                 {OWES_SHUTDOWN, VSOCK_OP_SHUTDOWN},
                 {OWES_CREDIT_REQUEST, VSOCK_OP_CREDIT_REQUEST}};
    for (size_t i = 0; i < ARRAY_SIZE(first); i++)
        if (c->owed & first[i].owed) {
            c->owed &= (uint8_t)~first[i].owed;
            return first[i].op;
        }
    if (c->state == VSOCK_OPEN && c->readable && flow_credit(&c->flow)) {
        *len = data_read(s, c);
        return *len ? VSOCK_OP_RW : VSOCK_OP_INVALID;
    }
    return c->owed ? VSOCK_OP_CREDIT_UPDATE : VSOCK_OP_INVALID;
}

static void turn(struct virtio_vsock *s, struct vsock_connection *c)
{
    uint32_t len = 0;
    TAILQ_REMOVE(&s->ready, c, by_turn);
    c->in_ready = false;
    enum vsock_op op = op_next(s, c, &len);
    if (op == VSOCK_OP_INVALID) {
        vsock_schedule(s, c);
        return;
    }
    const struct vsock_header h = {.src_cid = VSOCK_CID_HOST,
                                   .dst_cid = s->cid,
                                   .src_port = c->host_port,
                                   .dst_port = c->guest_port,
                                   .len = len,
                                   .type = VSOCK_TYPE_STREAM,
                                   .op = (uint16_t)op,
                                   .flags = op == VSOCK_OP_SHUTDOWN ? c->host_shut : 0,
                                   .buf_alloc = c->flow.window,
                                   .fwd_cnt = c->flow.forwarded};
    c->flow.sent += len;
    c->flow.told = c->flow.forwarded;
    c->owed &= (uint8_t)~OWES_CREDIT; // every packet tells
    rx_send(s, &h);
    if (op == VSOCK_OP_RST)
        vsock_kill(s, c);
    else
        vsock_schedule(s, c);
}

// True: more is to be sent, and the driver has no buffer for it.
static bool rx_pump(struct virtio_vsock *s)
{
    bool starved = false;
    for (unsigned n = 0; !starved && (s->resets_nr || !TAILQ_EMPTY(&s->ready)); n++) {
        if (n == PACKETS_A_TURN) {
            virtio_ring(&s->v, VSOCK_RX);
            break;
        }
        starved = !rx_take(s);
        if (starved)
            break;
        if (s->resets_nr)
            reset_send(s);
        else
            turn(s, TAILQ_FIRST(&s->ready));
    }
    virtio_signal(&s->v, VSOCK_RX);
    return starved;
}

static void timer_set(struct virtio_vsock *s, long first_ns, long period_ns)
{
    const struct itimerspec spec = {.it_value.tv_nsec = first_ns, .it_interval.tv_nsec = period_ns};
    timerfd_settime(s->timer->fd, 0, &spec, NULL);
    s->period_ns = (uint64_t)period_ns;
}

// Lets the loop's thread do soon what this one must not.
static void loop_soon(struct virtio_vsock *s)
{
    timer_set(s, 1, 0);
}

static void tidy(struct virtio_vsock *s)
{
    vsock_reap(s);
    long period = vsock_ticking(s) ? VSOCK_TICK_NS : 0;
    if ((uint64_t)period != s->period_ns)
        timer_set(s, period, period);
}

void vsock_settle(struct virtio_vsock *s)
{
    const struct virtqueue *rx = &s->v.queues[VSOCK_RX];
    if (s->v.active && s->v.status & VIRTIO_DRIVER_OK && rx_pump(s) && !s->rx_waits && !rx->broken)
        virtio_ring(&s->v, VSOCK_RX); // asks the driver for doorbells
    tidy(s);
}

// --- from the guest

static void reset_reply(struct virtio_vsock *s, const struct vsock_header *h)
{
    if (h->op == VSOCK_OP_RST)
        return; // else two sides could go on for ever
    const struct vsock_reset r = {h->dst_cid, h->dst_port, h->src_port, h->type};
    vsock_reset_add(s, &r);
}

static void guest_connects(struct virtio_vsock *s, const struct vsock_header *h)
{
    struct vsock_connection *c = vsock_new(s, -1, VSOCK_OPEN);
    if (!c) {
        reset_reply(s, h);
        return;
    }
    c->host_port = h->dst_port;
    c->guest_port = h->src_port;
    vsock_enter(s, c);
    flow_credit_update(&c->flow, h->buf_alloc, h->fwd_cnt);
    vsock_host_connect(s, c);
}

// What the guest said it had sent goes to the host program still, all else ends.
static void guest_reset(struct virtio_vsock *s, struct vsock_connection *c)
{
    if (c->state != VSOCK_OPEN || !(c->guest_shut & VSOCK_NO_SEND) || !flow_buffered(&c->flow)) {
        vsock_kill(s, c);
        return;
    }
    c->guest_shut = VSOCK_NEITHER;
    c->owed = 0;
    c->readable = false;
    vsock_state_set(s, c, VSOCK_DRAIN);
}

static void guest_data(struct virtio_vsock *s, struct vsock_connection *c,
                       const struct vsock_header *h)
{
    struct iovec iov[VQ_SEGMENTS_MAX];
    if (c->guest_shut & VSOCK_NO_SEND || h->len > flow_room(&c->flow)) {
        vsock_abort(s, c);
        return;
    }
    unsigned n = chain_slice(&s->tx, false, sizeof(*h), h->len, iov);
    vsock_host_write(s, c, iov, n, h->len);
}

static void guest_shutdown(struct virtio_vsock *s, struct vsock_connection *c, uint32_t flags)
{
    c->guest_shut |= flags & VSOCK_NEITHER;
    if (c->guest_shut & VSOCK_NO_RECEIVE) {
        c->readable = false;
        if (c->fd >= 0)
            shutdown(c->fd, SHUT_RD);
    }
    vsock_advance(s, c);
}

static bool op_allowed(const struct vsock_connection *c, uint16_t op)
{
    switch (op) {
    case VSOCK_OP_RESPONSE:
        return c->state == VSOCK_REQUESTED && !(c->owed & OWES_REQUEST);
    case VSOCK_OP_SHUTDOWN:
    case VSOCK_OP_RW:
    case VSOCK_OP_CREDIT_UPDATE:
    case VSOCK_OP_CREDIT_REQUEST: // only once both sides know of the connection
        return (c->state == VSOCK_OPEN || c->state == VSOCK_LINGER) && !(c->owed & OWES_RESPONSE);
    default: // a second REQUEST among them
        return false;
    }
}

static void connection_packet(struct virtio_vsock *s, struct vsock_connection *c,
                              const struct vsock_header *h)
{
    if (h->op == VSOCK_OP_RST) {
        guest_reset(s, c);
        return;
    }
    if (c->owed & OWES_RST)
        return; // it will learn
    if (c->state == VSOCK_DRAIN) {
        reset_reply(s, h);
        return;
    }
    if (!op_allowed(c, h->op) || h->len > s->tx.out_len - sizeof(*h)) {
        vsock_abort(s, c);
        return;
    }
    flow_credit_update(&c->flow, h->buf_alloc, h->fwd_cnt);
    if (h->op == VSOCK_OP_RESPONSE)
        vsock_host_accepted(s, c);
    else if (h->op == VSOCK_OP_RW)
        guest_data(s, c, h);
    else if (h->op == VSOCK_OP_SHUTDOWN)
        guest_shutdown(s, c, h->flags);
    else if (h->op == VSOCK_OP_CREDIT_REQUEST)
        c->owed |= OWES_CREDIT;
    vsock_schedule(s, c);
}

// s->tx, with the copy of its header that alone is looked at.
static void packet(struct virtio_vsock *s, const struct vsock_header *h)
{
    if (h->src_cid != s->cid) { // of nobody we could answer; also from before a change of the cid
        s->dropped++;
        return;
    }
    if (h->dst_cid != VSOCK_CID_HOST || h->type != VSOCK_TYPE_STREAM) {
        reset_reply(s, h);
        return;
    }
    struct vsock_connection *c = vsock_find(s, h->dst_port, h->src_port);
    if (c)
        connection_packet(s, c, h);
    else if (h->op == VSOCK_OP_REQUEST && !h->len)
        guest_connects(s, h);
    else
        reset_reply(s, h);
}

static bool tx_run(struct virtio_vsock *s)
{
    struct vsock_header h;
    bool all = true;
    uint64_t bytes = 0;
    for (unsigned n = 0; all; n++) {
        s->tx_stalled = s->resets_nr == VSOCK_RESETS; // reset_send rings
        all = !s->tx_stalled && n < PACKETS_A_TURN && bytes < BYTES_A_TURN;
        if (!all && !s->tx_stalled)
            virtio_ring(&s->v, VSOCK_TX);
        if (!all || !virtio_next(&s->v, VSOCK_TX, &s->tx))
            break;
        if (chain_read(&s->tx, 0, &h, sizeof(h)) < sizeof(h)) {
            virtio_break(&s->v, VSOCK_TX, "a packet of %llu bytes: expected a header of %zu",
                         (unsigned long long)s->tx.out_len, sizeof(h));
            break;
        }
        packet(s, &h);
        bytes += s->tx.out_len;
        virtio_push(&s->v, VSOCK_TX, &s->tx, 0);
    }
    virtio_signal(&s->v, VSOCK_TX);
    return all;
}

static bool event_run(struct virtio_vsock *s)
{
    const uint32_t event = EVENT_TRANSPORT_RESET;
    if (!s->event_due)
        return false; // buffers wait until there is one
    if (!virtio_next(&s->v, VSOCK_EVENT, &s->tx))
        return true;
    if (s->tx.in_len < sizeof(event)) {
        virtio_break(&s->v, VSOCK_EVENT, "a buffer of %llu bytes: expected %zu",
                     (unsigned long long)s->tx.in_len, sizeof(event));
        return false;
    }
    chain_write(&s->v.dev.vm->ram, &s->tx, 0, &event, sizeof(event));
    virtio_push(&s->v, VSOCK_EVENT, &s->tx, sizeof(event));
    virtio_signal(&s->v, VSOCK_EVENT);
    s->event_due = false;
    return false;
}

static bool vsock_run(struct virtio *v, unsigned queue)
{
    struct virtio_vsock *s = vsock_of(v);
    if (queue == VSOCK_EVENT)
        return event_run(s);
    if (queue == VSOCK_TX) {
        bool all = tx_run(s);
        vsock_settle(s);
        return all;
    }
    s->rx_waits = rx_pump(s);
    tidy(s);
    return s->rx_waits;
}

static void vsock_reset(struct virtio *v)
{
    struct virtio_vsock *s = vsock_of(v);
    vsock_kill_all(s);
    s->rx_held = s->rx_waits = s->tx_stalled = s->event_due = false;
    s->resets_nr = 0;
    loop_soon(s); // this may be a vCPU
}

static const struct virtio_ops vsock_ops = {
    .id = VIRTIO_ID_VSOCK, .run = vsock_run, .reset = vsock_reset};

// --- life

static void timer_rang(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_vsock *s = vsock_of(v);
    struct error err;
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) != sizeof(ticks))
        return;
    if (s->given_up)
        vsock_unlisten(s);
    if (s->listen_due && vsock_listen(s, &err))
        log_write(&v->dev.vm->log, LOG_ERROR, "%s; nobody can connect to the guest from here",
                  err.text);
    s->listen_due = false;
    if (v->active) // time stands still while the guest does
        vsock_tick(s);
    vsock_settle(s);
}

static void files_allow(void)
{
    struct rlimit limit;
    const rlim_t want = VSOCK_CONNECTIONS_MAX + 1024;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= want)
        return;
    limit.rlim_cur = want < limit.rlim_max ? want : limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit); // fewer connections then
}

static int ticker_create(struct virtio_vsock *s, struct error *err)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "timerfd_create");
    s->timer = virtio_bell_new(&s->v, fd, 0, timer_rang, err);
    return s->timer ? 0 : -ENOMEM;
}

static int vsock_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_vsock *s = container_of(dev, struct virtio_vsock, v.dev);
    const struct virtio_vsock_config *c = config;
    const struct virtio_setup setup = {.ops = &vsock_ops,
                                       .attach = &c->attach,
                                       .features = F_STREAM,
                                       .nr_queues = VSOCK_QUEUES,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(s->cid)};
    vsock_table_init(s);
    s->cid = c->cid;
    memcpy(s->path, c->path, sizeof(s->path));
    memcpy(s->v.config, &s->cid, sizeof(s->cid)); // 5.10.4
    files_allow();
    int ret = ticker_create(s, err);
    if (!ret && !c->attach.arrives)
        ret = vsock_listen(s, err);
    if (!ret)
        ret = virtio_realize(&s->v, &setup, err);
    if (ret) {
        vsock_unlisten(s);
        virtio_bell_close(s->timer);
    }
    return ret;
}

static void vsock_unrealize(struct device *dev)
{
    struct virtio_vsock *s = container_of(dev, struct virtio_vsock, v.dev);
    vsock_kill_all(s);
    vsock_reap(s);
    vsock_unlisten(s);
    virtio_bell_close(s->timer);
    virtio_unrealize(&s->v);
}

static void vsock_resume(struct device *dev)
{
    struct virtio_vsock *s = container_of(dev, struct virtio_vsock, v.dev);
    pthread_mutex_lock(&dev->lock);
    if (s->listen_fd < 0 || s->given_up) {
        s->listen_due = true;
        loop_soon(s);
    }
    pthread_mutex_unlock(&dev->lock);
    virtio_resume(dev);
}

static void vsock_show(struct device *dev, json_t *out)
{
    struct virtio_vsock *s = container_of(dev, struct virtio_vsock, v.dev);
    pthread_mutex_lock(&dev->lock);
    json_object_set_new(out, "cid", json_integer((json_int_t)s->cid));
    json_object_set_new(out, "path", json_string(s->path));
    json_object_set_new(out, "listening", json_boolean(s->listen_fd >= 0 && !s->given_up));
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {{"connections", s->count},       {"connections_total", s->opened},
                   {"bytes_to_guest", s->to_guest}, {"bytes_from_guest", s->from_guest},
                   {"resets", s->resets_sent},      {"dropped", s->dropped}};
    pthread_mutex_unlock(&dev->lock);
    for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
        json_object_set_new(out, numbers[i].name, json_integer((json_int_t)numbers[i].value));
}

// --- saved state: the queues only, see the header

static const struct state_field vsock_fields[] = {VIRTIO_STATE_FIELDS(struct virtio_vsock)};

static int vsock_save(void *object, struct error *err)
{
    struct virtio_vsock *s = object;
    int ret = virtio_save(&s->v, err);
    pthread_mutex_lock(&s->v.dev.lock);
    if (!ret) {
        vsock_give_up(s);
        loop_soon(s);
    }
    pthread_mutex_unlock(&s->v.dev.lock);
    return ret;
}

static int vsock_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_vsock *s = object;
    pthread_mutex_lock(&s->v.dev.lock);
    vsock_reset(&s->v);
    pthread_mutex_unlock(&s->v.dev.lock);
    int ret = virtio_load(&s->v, version, err);
    pthread_mutex_lock(&s->v.dev.lock);
    s->event_due = !ret && s->v.status & VIRTIO_DRIVER_OK;
    pthread_mutex_unlock(&s->v.dev.lock);
    return ret;
}

static const struct state_table vsock_state = {
    .name = "virtio-vsock",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(vsock_fields),
    .fields = vsock_fields,
    .save = vsock_save,
    .load = vsock_load,
};

const struct device_class virtio_vsock_class = {
    .name = "virtio-vsock",
    .size = sizeof(struct virtio_vsock),
    .realize = vsock_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = vsock_resume,
    .unrealize = vsock_unrealize,
    .state = &vsock_state,
    .show = vsock_show,
};

// --- the option's text

static int cid_parse(const char *digits, size_t len, uint64_t *cid, struct error *err)
{
    uint64_t value = 0;
    size_t i = 0;
    while (i < len && digits[i] >= '0' && digits[i] <= '9' && value <= VSOCK_CID_MAX)
        value = value * 10 + (unsigned)(digits[i++] - '0');
    if (!len || i < len || value < VSOCK_CID_MIN || value > VSOCK_CID_MAX)
        return error_set(err, -EINVAL, "cid '%.*s': expected %u to %u", (int)len, digits,
                         VSOCK_CID_MIN, VSOCK_CID_MAX);
    *cid = value;
    return 0;
}

static int word_parse(const char *word, size_t len, struct virtio_vsock_config *c,
                      struct error *err)
{
    static const char cid[] = "cid=", path[] = "path=";
    if (len >= strlen(cid) && !memcmp(word, cid, strlen(cid)))
        return cid_parse(word + strlen(cid), len - strlen(cid), &c->cid, err);
    if (len > strlen(path) && !memcmp(word, path, strlen(path))) {
        len -= strlen(path);
        if (len > VSOCK_PATH_MAX)
            return error_set(err, -ENAMETOOLONG, "path of %zu bytes: expected at most %d", len,
                             VSOCK_PATH_MAX);
        memcpy(c->path, word + strlen(path), len);
        c->path[len] = 0;
        return 0;
    }
    if (len == strlen("packed") && !memcmp(word, "packed", len)) {
        c->attach.packed = true;
        return 0;
    }
    return error_set(err, -EINVAL, "'%.*s': expected cid=N, path=FILE or packed", (int)len, word);
}

int virtio_vsock_parse(const char *text, struct virtio_vsock_config *c, struct error *err)
{
    *c = (struct virtio_vsock_config) {0};
    for (;;) {
        size_t len = strcspn(text, ",");
        int ret = word_parse(text, len, c, err);
        if (ret)
            return ret;
        text += len;
        if (!*text++)
            break;
    }
    if (!c->cid || !*c->path)
        return error_set(err, -EINVAL, "%s is missing: expected cid=N,path=FILE",
                         c->cid ? "path" : "cid");
    return 0;
}
