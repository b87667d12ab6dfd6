// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_blk.h"

#include <errno.h>
#include <string.h>
#include <sys/timerfd.h>

#include "devices/virtio_blk_parts.h"
#include "vmm/vm.h"

// 5.2.6
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK, S_IOERR, S_UNSUPP };
enum { ZEROES_UNMAP = 1 }; // flag of a discard or write-zeroes segment

struct header { // 5.2.6
    uint32_t type, reserved;
    uint64_t sector;
};

struct range_segment {
    uint64_t sector;
    uint32_t sectors, flags;
};

// --- ends of a request

void blk_request_free(struct virtio_blk *b, struct blk_request *r)
{
    r->next = b->free;
    b->free = r;
}

// The device may not know how much of the data arrived before an error; then all of it counts as
// written for the dirty log.
static void request_answer(struct virtio_blk *b, struct blk_request *r, uint8_t status)
{
    struct virtqueue_chain *c = &r->chain;
    uint64_t data = c->in_len - 1;
    if (r->type == T_IN && status != S_OK)
        chain_mark_dirty(&b->v.dev.vm->ram, c, 0, data);
    chain_write(&b->v.dev.vm->ram, c, data, &status, 1);
    uint64_t written = (r->type == T_IN || r->type == T_GET_ID) && status == S_OK ? c->in_len : 1;
    if (data && status != S_OK)
        written = 0; // none from the start on, as 2.7.8.2 wants it counted
    virtio_push(&b->v, r->queue, c, written > UINT32_MAX ? UINT32_MAX : (uint32_t)written);
    b->touched |= 1u << r->queue;
    b->count.errors += status != S_OK;
    blk_request_free(b, r);
}

void blk_request_skip(struct virtio_blk *b, struct blk_request *r)
{
    request_answer(b, r, S_OK);
}

static void latency_count(struct virtio_blk *b, const struct blk_request *r)
{
    unsigned kind = r->op == BLK_READ    ? BLK_LATENCY_READ
                    : r->op == BLK_WRITE ? BLK_LATENCY_WRITE
                    : r->op == BLK_FLUSH ? BLK_LATENCY_FLUSH
                                         : BLK_LATENCY_DISCARD;
    histogram_add(&b->latency[kind], time_ns() - r->taken_ns);
}

static void request_count(struct virtio_blk *b, const struct blk_request *r)
{
    uint64_t bytes = r->nr_ranges ? r->ranges[0].len : 0;
    switch (r->op) {
    case BLK_READ:
        b->count.reads++;
        b->count.read_bytes += bytes;
        break;
    case BLK_WRITE:
        b->count.writes++;
        b->count.written_bytes += bytes;
        break;
    case BLK_FLUSH:
        b->count.flushes++;
        break;
    default:
        b->count.discards++;
    }
}

void blk_request_done(struct blk_engine *e, struct blk_request *r, int error)
{
    struct virtio_blk *b = container_of(e, struct virtio_blk, engine);
    bool unsupported = r->type == T_DISCARD && error == -EOPNOTSUPP;
    latency_count(b, r);
    if (r->fills)
        blk_absent_done(b->absent, r, !error);
    if ((b->written || b->since) &&
        (r->op == BLK_WRITE || r->op == BLK_DISCARD || r->op == BLK_ZERO))
        blk_written(b, r); // also after an error: part of it may be there
    if (!error)
        request_count(b, r);
    else if (!unsupported)
        log_limited(&b->v.dev.vm->log, &b->v.limit, LOG_WARN,
                    "%s[%u]: %s: request type %u at byte %llu: %s", b->v.dev.class->name,
                    b->v.dev.instance, written_image(b)->path, r->type,
                    r->nr_ranges ? (unsigned long long)r->ranges[0].offset : 0,
                    error == -ENODATA ? "the image ends before its size" : strerror(-error));
    request_answer(b, r, !error ? S_OK : unsupported ? S_UNSUPP : S_IOERR);
}

static void signal_touched(struct virtio_blk *b)
{
    uint32_t touched = b->touched;
    b->touched = 0;
    for (unsigned q = 0; touched; q++, touched >>= 1)
        if (touched & 1)
            virtio_signal(&b->v, q);
}

void blk_answer(struct virtio_blk *b)
{
    blk_submit(&b->engine);
    signal_touched(b);
}

void blk_completed(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_blk *b = blk_of(v);
    uint64_t count;
    if (read(bell->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    virtio_woken(v);
    blk_reap(&b->engine);
    blk_answer(b);
    v->slept_ns = time_ns();
}

// A deep queue needs no help: its answers come in batches, which staying awake would only split.
enum { WATCHED_MAX = 4 };

static bool blk_watch(struct virtio *v, bool on)
{
    struct virtio_blk *b = blk_of(v);
    if (on)
        io_uring_cq_eventfd_toggle(&b->engine.ring, false);
    else
        blk_answer(b); // and the event is on again
    return !b->waiting && b->engine.in_flight <= WATCHED_MAX;
}

static bool blk_poll(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    if (!io_uring_cq_ready(&b->engine.ring))
        return false;
    blk_reap(&b->engine);
    io_uring_submit(&b->engine.ring); // the next piece of one
    signal_touched(b);
    return true;
}

static void blk_drain(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    if (!blk_wait(&b->engine, BLK_PATIENCE_MS))
        log_write(&v->dev.vm->log, LOG_WARN, "%s[%u]: %s: %u requests without an answer for %d ms",
                  v->dev.class->name, v->dev.instance, written_image(b)->path, b->engine.in_flight,
                  BLK_PATIENCE_MS);
    signal_touched(b);
}

static bool blk_idle(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    blk_answer(b);
    return !b->engine.in_flight;
}

// --- beginnings of a request

enum { STARTED = -1 }; // beside the S_ values: it is good, and the answer comes later

// [sector, sector + sectors) within the disk, whatever they are.
static bool range_add(const struct virtio_blk *b, struct blk_request *r, uint64_t sector,
                      uint64_t sectors)
{
    if (!sectors || !range_within(sector, sectors, b->capacity / BLK_SECTOR))
        return false;
    r->ranges[r->nr_ranges++] =
        (struct blk_range) {.offset = sector * BLK_SECTOR, .len = sectors * BLK_SECTOR};
    return true;
}

static int transfer(struct virtio_blk *b, struct blk_request *r, uint64_t sector)
{
    bool in = r->type == T_IN;
    uint64_t len = in ? r->chain.in_len - 1 : r->chain.out_len - sizeof(struct header);
    if (len % BLK_SECTOR || !range_add(b, r, sector, len / BLK_SECTOR))
        return S_IOERR;
    if (!in && b->config.read_only)
        return S_IOERR;
    r->op = in ? BLK_READ : BLK_WRITE;
    r->from = in ? 0 : sizeof(struct header);
    return STARTED;
}

static int range_request(struct virtio_blk *b, struct blk_request *r)
{
    struct range_segment segments[BLK_RANGES_MAX];
    uint64_t len = r->chain.out_len - sizeof(struct header);
    if (b->config.read_only || !len || len % sizeof(*segments) || len > sizeof(segments))
        return S_IOERR;
    chain_read(&r->chain, sizeof(struct header), segments, len);
    r->op = r->type == T_DISCARD ? BLK_DISCARD : BLK_ZERO;
    uint32_t known = r->type == T_WRITE_ZEROES ? ZEROES_UNMAP : 0;
    for (unsigned i = 0; i < len / sizeof(*segments); i++)
        if (segments[i].flags & ~known)
            return S_UNSUPP; // 5.2.6.2
    for (unsigned i = 0; i < len / sizeof(*segments); i++) {
        const struct range_segment *s = &segments[i];
        if (s->sectors > BLK_RANGE_SECTORS || !range_add(b, r, s->sector, s->sectors))
            return S_IOERR;
        r->ranges[i].unmap = s->flags & ZEROES_UNMAP;
    }
    return STARTED;
}

static int id_request(struct virtio_blk *b, struct blk_request *r)
{
    if (r->chain.in_len - 1 != BLK_SERIAL_MAX)
        return S_IOERR;
    chain_write(&b->v.dev.vm->ram, &r->chain, 0, b->serial, BLK_SERIAL_MAX);
    return S_OK;
}

static int request_prepare(struct virtio_blk *b, struct blk_request *r, const struct header *h)
{
    r->type = h->type;
    r->nr_ranges = 0;
    r->fills = false;
    switch (h->type) {
    case T_IN:
    case T_OUT:
        return transfer(b, r, h->sector);
    case T_FLUSH:
        r->op = BLK_FLUSH;
        return STARTED;
    case T_GET_ID:
        return id_request(b, r);
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return range_request(b, r);
    default:
        return S_UNSUPP;
    }
}

static void start(struct virtio_blk *b, struct blk_request *r)
{
    if (b->lost)
        request_answer(b, r, S_IOERR);
    else if (!b->absent || blk_absent_admit(b, r))
        blk_start(&b->engine, r);
}

// --- rate limits

static uint64_t limited_bytes(const struct blk_request *r)
{
    return r->op == BLK_READ || r->op == BLK_WRITE ? r->ranges[0].len : 0;
}

static void timer_set(struct virtio_blk *b)
{
    uint64_t ns = rate_limit_wait(&b->limit, limited_bytes(b->waiting), 1, time_ns());
    struct itimerspec when = {
        .it_value = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)}};
    if (!ns)
        when.it_value.tv_nsec = 1; // 0 would disarm it
    timerfd_settime(b->timer->fd, 0, &when, NULL);
}

static bool tokens_take(struct virtio_blk *b, const struct blk_request *r)
{
    return !rate_limited(&b->limit) || rate_limit_take(&b->limit, limited_bytes(r), 1, time_ns());
}

// Starts it, or lets it wait: false.
static bool admit(struct virtio_blk *b, struct blk_request *r)
{
    if (!b->waiting && tokens_take(b, r)) {
        start(b, r);
        return true;
    }
    r->next = NULL;
    *b->waiting_tail = r;
    b->waiting_tail = &r->next;
    b->waiting_queues |= 1u << r->queue;
    if (b->waiting == r)
        timer_set(b);
    return false;
}

void blk_waiting_clear(struct virtio_blk *b)
{
    b->waiting = NULL;
    b->waiting_tail = &b->waiting;
    b->waiting_queues = 0;
}

void blk_waiting_run(struct virtio_blk *b)
{
    if (!b->v.active || b->v.resetting)
        return;
    struct blk_request *r;
    while ((r = b->waiting) && tokens_take(b, r)) {
        b->waiting = r->next;
        if (!b->waiting)
            b->waiting_tail = &b->waiting;
        b->waiting_queues &= ~(1u << r->queue);
        virtio_ring(&b->v, r->queue); // for those behind it
        start(b, r);
    }
    if (b->waiting)
        timer_set(b);
    blk_answer(b);
}

void blk_timer_fired(struct virtio *v, struct virtio_bell *bell)
{
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) == sizeof(ticks))
        blk_waiting_run(blk_of(v));
}

// --- queues

// The walker never has more in flight than the rings' entries, so the pool cannot run dry.
static struct blk_request *request_next_free(struct virtio_blk *b)
{
    if (!b->free)
        b->free = &b->pool[b->fresh++]; // its `next` is NULL
    return b->free;
}

static bool request_run(struct virtio_blk *b, struct blk_request *r)
{
    struct header h = {0};
    size_t got = chain_read(&r->chain, 0, &h, sizeof(h));
    if (got < sizeof(h) || !r->chain.in_len) {
        bool header = r->chain.in_len;
        virtio_push(&b->v, r->queue, &r->chain, 0);
        blk_request_free(b, r);
        virtio_break(&b->v, r->queue, "request without %s", header ? "header" : "status byte");
        return true;
    }
    int status = request_prepare(b, r, &h);
    if (status == STARTED)
        return admit(b, r);
    request_answer(b, r, (uint8_t)status);
    return true;
}

static bool blk_run(struct virtio *v, unsigned queue)
{
    struct virtio_blk *b = blk_of(v);
    bool all = !(b->waiting_queues >> queue & 1);
    if (b->parked)
        blk_parked_run(b, queue);
    while (all && virtio_next(v, queue, &request_next_free(b)->chain)) {
        struct blk_request *r = b->free;
        b->free = r->next;
        r->queue = queue;
        r->taken_ns = time_ns();
        all = request_run(b, r);
    }
    blk_answer(b);
    return all;
}

static void blk_reset(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    struct blk_request *lists[] = {b->waiting, b->parked};
    for (unsigned i = 0; i < ARRAY_SIZE(lists); i++)
        for (struct blk_request *next, *r = lists[i]; r; r = next) {
            next = r->next;
            blk_request_free(b, r);
        }
    blk_waiting_clear(b);
    b->parked = NULL;
}

const struct virtio_ops blk_ops = {.id = VIRTIO_ID_BLK,
                                   .run = blk_run,
                                   .drain = blk_drain,
                                   .watch = blk_watch,
                                   .poll = blk_poll,
                                   .idle = blk_idle,
                                   .reset = blk_reset};
