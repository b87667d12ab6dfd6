// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_blk.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include "devices/blk_engine.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { QUEUE_SIZE = 256 };

// 5.2.3, 5.2.6
#define F_SEG_MAX      (1ull << 2)
#define F_RO           (1ull << 5)
#define F_BLK_SIZE     (1ull << 6)
#define F_FLUSH        (1ull << 9)
#define F_MQ           (1ull << 12)
#define F_DISCARD      (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
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

struct __attribute__((packed)) blk_space { // config space, 5.2.4
    uint64_t capacity;                     // sectors
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_exp, alignment_offset;
    uint16_t min_io;
    uint32_t opt_io;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_alignment;
    uint32_t max_zeroes_sectors, max_zeroes_seg;
    uint8_t zeroes_may_unmap, unused1[3];
};
_Static_assert(sizeof(struct blk_space) == 60, "5.2.4");

// Sectors of a discard or zeroes segment: what one request of zeroes can write.
enum { RANGE_MAX = BLK_ZEROES / BLK_SECTOR * VQ_SEGMENTS_MAX };

struct virtio_blk {
    struct virtio v; // first
    struct virtio_blk_config config;
    struct blk_image image;
    struct blk_overlay overlay; // where config.overlay names one; then `image` is its base
    struct blk_engine engine;
    uint64_t capacity; // bytes, a multiple of BLK_SECTOR
    struct virtio_bell *completion, *timer;
    struct blk_request *pool, *free;
    size_t fresh; // pool entries never used so far
    struct rate_limit limit;
    struct blk_request *waiting, **waiting_tail; // for tokens, in order; one of a queue at most
    uint32_t waiting_queues;                     // a bit each
    bool lost;                                   // the image belongs to somebody else
    uint8_t flush_failed;                        // the engine's, in saved state
    uint32_t touched; // queues with answers not yet signalled, a bit each
    uint8_t serial[BLK_SERIAL_MAX];
    struct {
        uint64_t reads, writes, flushes, discards, read_bytes, written_bytes, errors;
    } count;
};

static struct virtio_blk *blk_of(struct virtio *v)
{
    return container_of(v, struct virtio_blk, v);
}

static struct virtio_blk *blk_of_device(struct device *dev)
{
    return container_of(dev, struct virtio_blk, v.dev);
}

static bool has_overlay(const struct virtio_blk *b)
{
    return *b->config.overlay;
}

static struct blk_image *written_image(struct virtio_blk *b)
{
    return has_overlay(b) ? &b->overlay.file : &b->image;
}

// --- ends of a request

static void request_free(struct virtio_blk *b, struct blk_request *r)
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
    request_free(b, r);
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

static void request_done(struct blk_engine *e, struct blk_request *r, int error)
{
    struct virtio_blk *b = container_of(e, struct virtio_blk, engine);
    bool unsupported = r->type == T_DISCARD && error == -EOPNOTSUPP;
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

static void submit(struct virtio_blk *b)
{
    blk_submit(&b->engine);
    signal_touched(b);
}

static void completed(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_blk *b = blk_of(v);
    uint64_t count;
    if (read(bell->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    blk_reap(&b->engine);
    submit(b);
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
    submit(b);
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
        if (s->sectors > RANGE_MAX || !range_add(b, r, s->sector, s->sectors))
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
    else
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

static void waiting_clear(struct virtio_blk *b)
{
    b->waiting = NULL;
    b->waiting_tail = &b->waiting;
    b->waiting_queues = 0;
}

static void waiting_run(struct virtio_blk *b)
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
    submit(b);
}

static void timer_fired(struct virtio *v, struct virtio_bell *bell)
{
    uint64_t ticks;
    if (read(bell->fd, &ticks, sizeof(ticks)) == sizeof(ticks))
        waiting_run(blk_of(v));
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
        request_free(b, r);
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
    while (all && virtio_next(v, queue, &request_next_free(b)->chain)) {
        struct blk_request *r = b->free;
        b->free = r->next;
        r->queue = queue;
        all = request_run(b, r);
    }
    submit(b);
    return all;
}

static void blk_reset(struct virtio *v)
{
    struct virtio_blk *b = blk_of(v);
    for (struct blk_request *next, *r = b->waiting; r; r = next) {
        next = r->next;
        request_free(b, r);
    }
    waiting_clear(b);
}

static const struct virtio_ops blk_ops = {
    .id = VIRTIO_ID_BLK, .run = blk_run, .drain = blk_drain, .idle = blk_idle, .reset = blk_reset};

// --- the image

static int image_take(struct virtio_blk *b, struct error *err)
{
    int ret = blk_image_lock(&b->image, err);
    if (!ret && has_overlay(b))
        ret = blk_image_lock(&b->overlay.file, err);
    return ret;
}

static void image_give_up(struct virtio_blk *b)
{
    blk_image_unlock(&b->image);
    if (*b->overlay.file.path)
        blk_image_unlock(&b->overlay.file);
}

static int image_free(struct virtio_blk *b, struct error *err)
{
    int ret = blk_image_lockable(&b->image, err);
    if (!ret && has_overlay(b))
        ret = blk_image_lockable(&b->overlay.file, err);
    return ret;
}

static int image_size(struct virtio_blk *b, struct error *err)
{
    if (!has_overlay(b))
        return blk_image_disk_size(&b->image, &b->capacity, err);
    b->capacity = b->overlay.size;
    return 0;
}

static int image_open(struct virtio_blk *b, struct error *err)
{
    const struct virtio_blk_config *c = &b->config;
    const struct virtio_attach *attach = &c->attach;
    struct blk_image_mode mode = {.read_only = c->read_only || has_overlay(b), .cached = c->cached};
    int ret = blk_image_open(&b->image, c->path, &mode, err);
    // Locked before the overlay looks at it: a base that somebody writes is no base.
    if (!ret && !attach->arrives)
        ret = blk_image_lock(&b->image, err);
    mode.read_only = c->read_only;
    mode.create = !c->read_only && !attach->arrives;
    if (!ret && has_overlay(b))
        ret = blk_overlay_open(&b->overlay, c->overlay, &mode, &b->image, true, err);
    if (!ret && !attach->arrives)
        ret = image_take(b, err);
    if (!ret && has_overlay(b) && !attach->arrives) // whoever had it has let it go
        ret = blk_overlay_load(&b->overlay, err);
    return ret ? ret : image_size(b, err);
}

static int bells_create(struct virtio_blk *b, struct error *err)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "eventfd");
    b->completion = virtio_bell_new(&b->v, fd, 0, completed, err); // closes fd from here on
    if (!b->completion)
        return -ENOMEM;
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "timerfd_create");
    b->timer = virtio_bell_new(&b->v, fd, 0, timer_fired, err);
    return b->timer ? 0 : -ENOMEM;
}

static int pool_create(struct virtio_blk *b, struct error *err)
{
    size_t n = (size_t)b->config.queues * QUEUE_SIZE + 1; // one to look with
    b->pool = calloc(n, sizeof(*b->pool)); // memory is used as far as request_next_free goes
    if (!b->pool)
        return error_set(err, -ENOMEM, "no memory for %zu requests", n);
    return 0;
}

static void space_capacity(struct virtio_blk *b)
{
    uint64_t sectors = b->capacity / BLK_SECTOR;
    memcpy(b->v.config + offsetof(struct blk_space, capacity), &sectors, sizeof(sectors));
}

static uint64_t space_fill(struct virtio_blk *b)
{
    struct blk_space s = {.seg_max = VQ_SEGMENTS_MAX / 2,
                          .blk_size = BLK_SECTOR,
                          .num_queues = (uint16_t)b->config.queues};
    uint64_t features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ;
    if (b->config.read_only) {
        features |= F_RO;
    } else {
        features |= F_DISCARD | F_WRITE_ZEROES;
        s.max_discard_sectors = s.max_zeroes_sectors = RANGE_MAX;
        s.max_discard_seg = s.max_zeroes_seg = BLK_RANGES_MAX;
        s.discard_alignment = PAGE_SIZE / BLK_SECTOR;
        s.zeroes_may_unmap = 1;
    }
    memcpy(b->v.config, &s, sizeof(s));
    space_capacity(b);
    return features;
}

// --- life

static void blk_close(struct virtio_blk *b)
{
    struct error err;
    bool idle = !b->engine.in_flight;
    virtio_bell_close(b->completion);
    virtio_bell_close(b->timer);
    // What was written without a flush is not promised, but an overlay is worth little without its
    // table.
    if (idle && b->engine.ring_up && !b->lost && has_overlay(b) && b->overlay.present &&
        blk_engine_sync(&b->engine, &err))
        log_write(&b->v.dev.vm->log, LOG_WARN, "%s", err.text);
    // The kernel's own references to the files outlive our close. The lock goes at once, unless I/O
    // is still under way: then it stays as long as that.
    if (idle)
        image_give_up(b);
    blk_engine_destroy(&b->engine);
    blk_overlay_close(&b->overlay);
    blk_image_close(&b->image);
    if (idle)
        free(b->pool); // else the kernel may still look at it: nothing but our end frees it
}

static int blk_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    b->config = *(const struct virtio_blk_config *)config;
    if (!b->config.queues)
        b->config.queues = 1;
    memcpy(b->serial, b->config.serial, strnlen(b->config.serial, BLK_SERIAL_MAX));
    waiting_clear(b);
    rate_limit_init(&b->limit, &b->config.limit, time_ns());
    b->engine.done = request_done;
    int ret = image_open(b, err);
    if (!ret)
        ret = pool_create(b, err);
    if (!ret)
        ret = bells_create(b, err);
    if (!ret)
        ret = blk_engine_create(&b->engine, written_image(b), has_overlay(b) ? &b->overlay : NULL,
                                b->config.queues * QUEUE_SIZE, b->completion->fd, err);
    const struct virtio_setup setup = {.ops = &blk_ops,
                                       .attach = &b->config.attach,
                                       .features = ret ? 0 : space_fill(b),
                                       .nr_queues = b->config.queues,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(struct blk_space)};
    if (!ret)
        ret = virtio_realize(&b->v, &setup, err);
    if (ret)
        blk_close(b);
    return ret;
}

static void blk_unrealize(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    virtio_unrealize(&b->v);
    blk_close(b);
}

static void blk_resume(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    struct error err = {0};
    pthread_mutex_lock(&dev->lock);
    // Ours already, unless it was given up to save.
    b->lost = image_take(b, &err) || (has_overlay(b) && !b->overlay.present);
    if (b->lost)
        log_write(&dev->vm->log, LOG_ERROR, "%s; the guest gets errors from now on", err.text);
    pthread_mutex_unlock(&dev->lock);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    waiting_run(b);
    pthread_mutex_unlock(&dev->lock);
}

// --- saved state

static const struct state_field blk_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_blk),
    STATE_FIELD_INT(struct virtio_blk, capacity, 1),
    STATE_FIELD_BYTES(struct virtio_blk, serial, 1),
    STATE_FIELD_INT(struct virtio_blk, flush_failed, 1),
};

// A destination may be another host, whose flush does not reach what is in the page cache here; and
// the table of an overlay must be in the file.
static int durable(struct virtio_blk *b, struct error *err)
{
    submit(b);
    if (b->engine.in_flight)
        return error_set(err, -EBUSY,
                         "%s: %u requests without an answer: a disk that may still read or write "
                         "cannot be saved",
                         written_image(b)->path, b->engine.in_flight);
    b->flush_failed = b->engine.flush_failed;
    return b->flush_failed && !has_overlay(b) ? 0 : blk_engine_sync(&b->engine, err);
}

static int blk_save(void *object, struct error *err)
{
    struct virtio_blk *b = object;
    pthread_mutex_lock(&b->v.dev.lock);
    int ret = durable(b, err);
    pthread_mutex_unlock(&b->v.dev.lock);
    if (!ret)
        ret = virtio_save(&b->v, err);
    if (!ret)
        image_give_up(b); // see the header
    return ret;
}

static int image_reload(struct virtio_blk *b, struct error *err)
{
    uint64_t saved = b->capacity;
    int ret = 0;
    if (has_overlay(b))
        ret = blk_overlay_load(&b->overlay, err); // the source has written its table
    if (!ret)
        ret = image_size(b, err);
    if (!ret && saved != b->capacity)
        ret = error_set(err, -EINVAL, "%s has %llu bytes, the disk that was saved had %llu",
                        written_image(b)->path, (unsigned long long)b->capacity,
                        (unsigned long long)saved);
    if (!ret)
        ret = image_free(b, err); // a migration's source has given it up; it is taken on resume
    if (ret)
        return ret;
    b->engine.shift = has_overlay(b) ? b->overlay.data_offset : 0;
    b->engine.flush_failed = b->flush_failed != 0;
    space_capacity(b);
    return 0;
}

static int blk_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_blk *b = object;
    pthread_mutex_lock(&b->v.dev.lock);
    int ret = image_reload(b, err);
    pthread_mutex_unlock(&b->v.dev.lock);
    return ret ? ret : virtio_load(&b->v, version, err);
}

static const struct state_table blk_state = {
    .name = "virtio-blk",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(blk_fields),
    .fields = blk_fields,
    .save = blk_save,
    .load = blk_load,
};

// --- for the person outside

static void blk_show(struct device *dev, json_t *out)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    unsigned waiting = 0;
    for (const struct blk_request *r = b->waiting; r; r = r->next)
        waiting++;
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {
        {"size", b->capacity},         {"queues", b->config.queues},
        {"reads", b->count.reads},     {"read-bytes", b->count.read_bytes},
        {"writes", b->count.writes},   {"written-bytes", b->count.written_bytes},
        {"flushes", b->count.flushes}, {"discards", b->count.discards},
        {"errors", b->count.errors},   {"in-flight", b->engine.in_flight},
        {"waiting", waiting},
    };
    json_object_set_new(out, "path", json_string(b->config.path));
    if (has_overlay(b))
        json_object_set_new(out, "overlay", json_string(b->config.overlay));
    json_object_set_new(out, "read-only", json_boolean(b->config.read_only));
    for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
        json_object_set_new(out, numbers[i].name, json_integer((json_int_t)numbers[i].value));
    rate_limit_show(&b->limit.config, out);
    pthread_mutex_unlock(&dev->lock);
}

static int file_resize(struct virtio_blk *b, uint64_t size, bool shrink, struct error *err)
{
    uint64_t now;
    struct blk_image *i = written_image(b);
    if (b->lost)
        return error_set(err, -EBUSY, "%s: another VM uses it", i->path);
    if (has_overlay(b)) {
        if (i->read_only)
            return error_set(err, -EROFS, "%s: read-only", i->path);
        // The table may move: no flush of it may be under way.
        if (!blk_wait(&b->engine, BLK_PATIENCE_MS))
            return error_set(err, -EBUSY, "%s: %u requests without an answer", i->path,
                             b->engine.in_flight);
        return blk_overlay_grow(&b->overlay, size, err);
    }
    int ret = blk_image_bytes(i, &now, err);
    if (ret || now == size || (now > size && !shrink))
        return ret; // grown outside
    if (i->read_only)
        return error_set(err, -EROFS, "%s: read-only, and has %llu bytes", i->path,
                         (unsigned long long)now);
    return blk_image_truncate(i, size, err);
}

static int size_set(struct virtio_blk *b, const char *value, bool shrink, struct error *err)
{
    uint64_t size;
    if (!strcmp(value, "host") && !shrink && !has_overlay(b)) {
        int ret = blk_image_disk_size(&b->image, &size, err);
        if (ret)
            return ret;
    } else if (size_parse(value, 1, &size) || !size || size % BLK_SECTOR || size > INT64_MAX) {
        return error_set(err, -EINVAL, "'%.40s': expected bytes, a multiple of %d, e.g. 2G%s",
                         value, BLK_SECTOR, shrink || has_overlay(b) ? "" : ", or host");
    }
    if (!shrink && size < b->capacity)
        return error_set(err, -EINVAL,
                         "%llu bytes: it has %llu, and what lies behind would be cut off; if you "
                         "mean it: shrink=%llu",
                         (unsigned long long)size, (unsigned long long)b->capacity,
                         (unsigned long long)size);
    if (shrink && size > b->capacity)
        return error_set(err, -EINVAL, "%llu bytes: it has %llu: expected less",
                         (unsigned long long)size, (unsigned long long)b->capacity);
    int ret = file_resize(b, size, shrink, err);
    if (ret || size == b->capacity)
        return ret;
    b->capacity = size;
    space_capacity(b);
    virtio_config_changed(&b->v); // 5.2.4
    return 0;
}

static int limit_set(struct virtio_blk *b, const char *key, const char *value, struct error *err)
{
    struct rate_limit_config config = b->limit.config;
    int ret = rate_limit_key(&config, key, value, err);
    if (!ret)
        ret = rate_limit_check(&config, err);
    if (!ret) {
        rate_limit_change(&b->limit, &config, time_ns());
        waiting_run(b);
    }
    return ret;
}

static int blk_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    bool size = !strcmp(key, "size"), shrink = !strcmp(key, "shrink");
    pthread_mutex_lock(&dev->lock);
    int ret = size || shrink ? size_set(b, value, shrink, err) : limit_set(b, key, value, err);
    signal_touched(b);
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

const struct device_class virtio_blk_class = {
    .name = "virtio-blk",
    .size = sizeof(struct virtio_blk),
    .realize = blk_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = blk_resume,
    .unrealize = blk_unrealize,
    .state = &blk_state,
    .show = blk_show,
    .set = blk_set,
};
