// SPDX-License-Identifier: Apache-2.0
#include "devices/blk_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/probe.h"
#include "vmm/ring.h"
#include "vmm/util.h"

enum { FILE_TOP, FILE_TOP_DIRECT, FILE_BASE, FILE_BASE_DIRECT }; // registered with the ring
enum { FLUSH_DATA, FLUSH_TABLE, FLUSH_AGAIN, FLUSH_DONE };
enum { RING_ENTRIES = 256 };

static const uint8_t zeroes[BLK_ZEROES];

static void advance(struct blk_engine *e, struct blk_request *r);
static void span_begin(struct blk_engine *e, struct blk_request *r);
static void flush_begin(struct blk_engine *e, struct blk_request *r);

static bool request_reads(const struct blk_request *r)
{
    return r->op == BLK_READ;
}

// --- ends

static void request_end(struct blk_engine *e, struct blk_request *r, int error)
{
    FERRY_PROBE3(block_end, r, r->op, error);
    e->in_flight--;
    e->done(e, r, error);
}

static void group_end(struct blk_engine *e, struct blk_request *r, int error)
{
    for (struct blk_request *next; r; r = next) {
        next = r->next;
        request_end(e, r, error);
    }
}

static void flush_end(struct blk_engine *e, struct blk_request *r, int error)
{
    struct blk_request *group = r->group;
    e->unflushed |= !!error;
    // A table that could not be written can be written later; what the kernel dropped cannot.
    if (error && r->piece.kind == PIECE_SYNC)
        e->flush_failed = true;
    request_end(e, r, error);
    group_end(e, group, error);
    if (!e->overlay)
        return;
    struct blk_request *waits = e->flush_waits;
    e->flush_waits = NULL;
    e->flushing = false;
    if (e->flush_failed) {
        group_end(e, waits, -EIO);
    } else if (waits) {
        group = waits->next;
        flush_begin(e, waits);
        waits->group = group;
    }
}

// --- changes of clusters of an overlay

static struct blk_range span(const struct blk_request *r)
{
    return r->ranges[r->range];
}

static bool clusters_meet(const struct blk_request *a, const struct blk_request *b)
{
    struct blk_range x = span(a), y = span(b);
    return x.offset / BLK_CLUSTER <= (y.offset + y.len - 1) / BLK_CLUSTER &&
           y.offset / BLK_CLUSTER <= (x.offset + x.len - 1) / BLK_CLUSTER;
}

static struct blk_request *conflict(const struct blk_engine *e, const struct blk_request *r)
{
    if (!r->nr_copies && !e->copying)
        return NULL;
    for (struct blk_request *w = e->changes; w; w = w->next_change)
        if ((r->nr_copies || w->nr_copies) && clusters_meet(r, w))
            return w;
    return NULL;
}

static void change_add(struct blk_engine *e, struct blk_request *r)
{
    r->prev_change = NULL;
    r->next_change = e->changes;
    if (e->changes)
        e->changes->prev_change = r;
    e->changes = r;
    e->copying += !!r->nr_copies;
}

static void change_remove(struct blk_engine *e, struct blk_request *r)
{
    *(r->prev_change ? &r->prev_change->next_change : &e->changes) = r->next_change;
    if (r->next_change)
        r->next_change->prev_change = r->prev_change;
    e->copying -= !!r->nr_copies;
}

static void copy_add(struct blk_request *r, uint64_t from, uint64_t to)
{
    if (from < to) {
        r->copies[r->nr_copies].offset = from;
        r->copies[r->nr_copies++].len = (uint32_t)(to - from);
    }
}

// What the current span leaves of clusters that the overlay has not.
static void copies_find(const struct blk_overlay *o, struct blk_request *r)
{
    struct blk_range s = span(r);
    uint64_t end = s.offset + s.len, last = align_down(end - 1, BLK_CLUSTER);
    bool first_present, last_present;
    blk_overlay_run(o, s.offset, 1, &first_present);
    blk_overlay_run(o, end - 1, 1, &last_present);
    r->nr_copies = r->copy = 0;
    r->copy_done = 0;
    r->copy_back = false;
    if (!first_present)
        copy_add(r, align_down(s.offset, BLK_CLUSTER), s.offset);
    uint64_t cluster_end = last + BLK_CLUSTER < o->size ? last + BLK_CLUSTER : o->size;
    if (!last_present)
        copy_add(r, end, cluster_end);
}

// A discard is a hint: it is followed as far as it covers whole clusters.
static bool discard_trim(const struct blk_overlay *o, struct blk_range *s)
{
    uint64_t end = s->offset + s->len, from = align_up(s->offset, BLK_CLUSTER);
    uint64_t to = end == o->size ? end : align_down(end, BLK_CLUSTER);
    if (from >= to)
        return false;
    s->offset = from;
    s->len = to - from;
    return true;
}

static void span_end(struct blk_engine *e, struct blk_request *r, int error)
{
    if (e->overlay && !request_reads(r)) {
        struct blk_request *next, *w = r->waiters;
        change_remove(e, r);
        free(r->bounce);
        r->bounce = NULL;
        r->waiters = NULL;
        if (!error)
            blk_overlay_set(e->overlay, span(r).offset, span(r).len);
        for (; w; w = next) {
            next = w->next;
            span_begin(e, w);
        }
    }
    e->unflushed |= !request_reads(r);
    if (!error && ++r->range < r->nr_ranges)
        span_begin(e, r);
    else
        request_end(e, r, error);
}

static void span_begin(struct blk_engine *e, struct blk_request *r)
{
    r->done = 0;
    r->cautious = r->by_hand = false;
    r->nr_copies = r->copy = 0;
    if (!e->overlay || request_reads(r)) {
        advance(e, r);
        return;
    }
    while (r->op == BLK_DISCARD && !discard_trim(e->overlay, &r->ranges[r->range]))
        if (++r->range == r->nr_ranges) {
            request_end(e, r, 0);
            return;
        }
    copies_find(e->overlay, r);
    struct blk_request *other = conflict(e, r);
    if (other) {
        r->next = other->waiters;
        other->waiters = r;
        return;
    }
    change_add(e, r);
    if (e->frozen)
        blk_frozen_keep(e->frozen, span(r).offset, span(r).len);
    if (r->nr_copies && posix_memalign((void **)&r->bounce, BLK_CLUSTER, BLK_CLUSTER)) {
        r->bounce = NULL;
        span_end(e, r, -ENOMEM);
        return;
    }
    advance(e, r);
}

static void finished(struct blk_engine *e, struct blk_request *r, int error)
{
    if (r->op == BLK_FLUSH)
        flush_end(e, r, error);
    else
        span_end(e, r, error);
}

// --- the next piece; false: there is none

static bool piece_set(struct blk_request *r, int kind, unsigned file, uint64_t offset, uint64_t len,
                      void *buffer)
{
    r->piece = (struct blk_piece) {
        .kind = kind, .file = file, .offset = offset, .len = len, .buffer = buffer};
    return true;
}

static bool flush_piece(struct blk_engine *e, struct blk_request *r)
{
    uint64_t offset;
    void *data;
    size_t len;
    if (r->flush_step == FLUSH_TABLE) {
        if (blk_overlay_next(e->overlay, &offset, &data, &len))
            return piece_set(r, PIECE_WRITE, FILE_TOP, offset, len, data);
        r->flush_step = FLUSH_AGAIN;
    }
    return r->flush_step != FLUSH_DONE && piece_set(r, PIECE_SYNC, FILE_TOP, 0, 0, NULL);
}

static bool copy_piece(struct blk_engine *e, struct blk_request *r)
{
    while (r->copy < r->nr_copies) {
        uint64_t at = r->copies[r->copy].offset + r->copy_done;
        uint32_t left = r->copies[r->copy].len - r->copy_done;
        uint64_t base = at < e->overlay->base_size ? e->overlay->base_size - at : 0;
        uint8_t *buffer = r->bounce + r->copy_done;
        if (left && r->copy_back)
            return piece_set(r, PIECE_WRITE, FILE_TOP, e->shift + at, left, buffer);
        if (left && base)
            return piece_set(r, PIECE_READ, FILE_BASE, at, left < base ? left : base, buffer);
        if (left) { // the disk is longer than its base
            memset(buffer, 0, left);
            r->copy_done += left;
            continue;
        }
        r->copy_done = 0;
        r->copy += r->copy_back;
        r->copy_back = !r->copy_back;
    }
    return false;
}

static void chain_zero(struct blk_request *r, uint64_t len)
{
    unsigned n = chain_slice(&r->chain, true, r->from + r->done, len, r->iov);
    for (unsigned i = 0; i < n; i++)
        memset(r->iov[i].iov_base, 0, r->iov[i].iov_len);
    r->done += len;
}

static bool read_piece(struct blk_engine *e, struct blk_request *r)
{
    const struct blk_overlay *o = e->overlay;
    while (r->done < span(r).len) {
        bool present;
        uint64_t at = span(r).offset + r->done;
        uint64_t len = blk_overlay_run(o, at, span(r).len - r->done, &present);
        uint64_t base = at < o->base_size ? o->base_size - at : 0;
        if (present)
            return piece_set(r, PIECE_READ, FILE_TOP, e->shift + at, len, NULL);
        if (base)
            return piece_set(r, PIECE_READ, FILE_BASE, at, len < base ? len : base, NULL);
        chain_zero(r, len);
    }
    return false;
}

static bool piece_next(struct blk_engine *e, struct blk_request *r)
{
    if (r->op == BLK_FLUSH)
        return flush_piece(e, r);
    if (r->op == BLK_READ && e->overlay)
        return read_piece(e, r);
    if (copy_piece(e, r))
        return true;
    struct blk_range s = span(r);
    uint64_t at = e->shift + s.offset + r->done, left = s.len - r->done;
    if (!left)
        return false;
    if (r->op == BLK_READ)
        return piece_set(r, PIECE_READ, FILE_TOP, at, left, NULL);
    if (r->op == BLK_WRITE)
        return piece_set(r, PIECE_WRITE, FILE_TOP, at, left, NULL);
    if (r->by_hand)
        return piece_set(r, PIECE_WRITE, FILE_TOP, at, left, (void *)zeroes);
    return piece_set(r, PIECE_FALLOCATE, FILE_TOP, at, left, NULL);
}

// --- a piece and the kernel

static void piece_iov(struct blk_request *r)
{
    struct blk_piece *p = &r->piece;
    if (!p->buffer) {
        r->nr_iov =
            chain_slice(&r->chain, p->kind == PIECE_READ, r->from + r->done, p->len, r->iov);
    } else if (p->buffer != zeroes) {
        r->iov[0] = (struct iovec) {p->buffer, p->len};
        r->nr_iov = 1;
    } else {
        uint64_t left = p->len;
        for (r->nr_iov = 0; left && r->nr_iov < VQ_SEGMENTS_MAX; r->nr_iov++) {
            size_t take = left < BLK_ZEROES ? (size_t)left : BLK_ZEROES;
            r->iov[r->nr_iov] = (struct iovec) {p->buffer, take};
            left -= take;
        }
    }
}

static bool piece_aligned(const struct blk_image *i, const struct blk_request *r)
{
    uint32_t memory = i->memory_align - 1, offset = i->offset_align - 1;
    if ((r->piece.offset | r->piece.len) & offset)
        return false;
    for (unsigned n = 0; n < r->nr_iov; n++)
        if (((uintptr_t)r->iov[n].iov_base & memory) || (r->iov[n].iov_len & offset))
            return false;
    return true;
}

static struct io_uring_sqe *sqe_get(struct blk_engine *e)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&e->ring);
    while (!sqe) { // as many entries as the kernel takes make room
        io_uring_submit(&e->ring);
        sqe = io_uring_get_sqe(&e->ring);
    }
    return sqe;
}

// Punching keeps the size, and reads give zeroes afterwards. Without leave to unmap, the space
// stays.
static int fallocate_mode(const struct blk_request *r)
{
    bool unmap = r->op == BLK_DISCARD || span(r).unmap;
    return FALLOC_FL_KEEP_SIZE | (unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

static void piece_submit(struct blk_engine *e, struct blk_request *r)
{
    struct blk_piece *p = &r->piece;
    struct io_uring_sqe *sqe = sqe_get(e);
    const struct blk_image *image = p->file == FILE_TOP ? e->top : e->overlay->base;
    bool transfer = p->kind == PIECE_READ || p->kind == PIECE_WRITE;
    if (transfer)
        piece_iov(r);
    p->direct = transfer && !r->cautious && image->direct_fd >= 0 && piece_aligned(image, r);
    int file = (int)p->file + p->direct;
    if (p->kind == PIECE_READ)
        io_uring_prep_readv(sqe, file, r->iov, r->nr_iov, p->offset);
    else if (p->kind == PIECE_WRITE)
        io_uring_prep_writev(sqe, file, r->iov, r->nr_iov, p->offset);
    else if (p->kind == PIECE_SYNC)
        io_uring_prep_fsync(sqe, file, IORING_FSYNC_DATASYNC);
    else
        io_uring_prep_fallocate(sqe, file, fallocate_mode(r), (off_t)p->offset, (off_t)p->len);
    sqe->flags |= IOSQE_FIXED_FILE | (image->blocks ? IOSQE_ASYNC : 0);
    io_uring_sqe_set_data(sqe, r);
    e->unanswered++;
}

static void advance(struct blk_engine *e, struct blk_request *r)
{
    if (piece_next(e, r))
        piece_submit(e, r);
    else
        finished(e, r, 0);
}

// `n` bytes of a transfer, or the whole piece.
static void piece_count(struct blk_engine *e, struct blk_request *r, uint64_t n)
{
    if (r->op == BLK_FLUSH) {
        if (r->piece.kind == PIECE_WRITE)
            blk_overlay_written(e->overlay, r->piece.offset, (size_t)n);
        else if (r->flush_step == FLUSH_DATA && e->overlay && blk_overlay_staged(e->overlay))
            r->flush_step = FLUSH_TABLE;
        else
            r->flush_step = FLUSH_DONE;
    } else if (r->copy < r->nr_copies) {
        r->copy_done += (uint32_t)n;
    } else {
        r->done += n;
    }
}

static void piece_completed(struct blk_engine *e, struct blk_request *r, int res)
{
    const struct blk_piece *p = &r->piece;
    bool transfer = p->kind == PIECE_READ || p->kind == PIECE_WRITE;
    if (res == -EINTR || res == -EAGAIN) {
        piece_submit(e, r);
    } else if (res == -EINVAL && p->direct) { // a stricter alignment than we were told
        r->cautious = true;
        piece_submit(e, r);
    } else if (res == -EOPNOTSUPP && p->kind == PIECE_FALLOCATE && r->op == BLK_ZERO) {
        r->by_hand = true;
        advance(e, r);
    } else if (res < 0 || (transfer && !res)) {
        finished(e, r, res ? res : -ENODATA);
    } else {
        if (transfer && (uint64_t)res < p->len)
            r->cautious = true; // the rest may not be aligned
        piece_count(e, r, transfer ? (uint64_t)res : p->len);
        advance(e, r);
    }
}

// --- for the device

static void flush_begin(struct blk_engine *e, struct blk_request *r)
{
    r->group = NULL;
    r->flush_step = FLUSH_DATA;
    if (e->overlay && e->flushing) {
        r->next = e->flush_waits;
        e->flush_waits = r;
        return;
    }
    if (e->overlay) {
        e->flushing = true;
        blk_overlay_stage(e->overlay);
    }
    e->unflushed = false;
    advance(e, r);
}

void blk_start(struct blk_engine *e, struct blk_request *r)
{
    FERRY_PROBE4(block_begin, r, r->op, r->ranges[0].offset, r->nr_ranges);
    e->in_flight++;
    r->range = 0;
    r->waiters = NULL;
    r->bounce = NULL;
    if (r->op != BLK_FLUSH)
        span_begin(e, r);
    else if (e->flush_failed)
        request_end(e, r, -EIO);
    else
        flush_begin(e, r);
}

void blk_reap(struct blk_engine *e)
{
    struct io_uring_cqe *cqe;
    while (!io_uring_peek_cqe(&e->ring, &cqe)) {
        struct blk_request *r = io_uring_cqe_get_data(cqe);
        int res = cqe->res;
        io_uring_cqe_seen(&e->ring, cqe);
        e->unanswered--;
        piece_completed(e, r, res);
    }
}

// Takes what was there at once (the page cache had it). The event that announces completions is off
// meanwhile: it would only wake the loop for what is already done.
void blk_submit(struct blk_engine *e)
{
    bool stuck = false;
    do {
        io_uring_cq_eventfd_toggle(&e->ring, false);
        while (io_uring_sq_ready(&e->ring) && !stuck) {
            stuck = io_uring_submit(&e->ring) <= 0;
            blk_reap(e); // which may prepare the next pieces
        }
        io_uring_cq_eventfd_toggle(&e->ring, true);
        blk_reap(e); // what came before the event was on again
    } while (io_uring_sq_ready(&e->ring) && !stuck);
    uint64_t one = 1;
    if (stuck && write(e->event_fd, &one, sizeof(one)) < 0) // the kernel lacked memory: again soon
        return; // the counter is full, so the event is there already
}

bool blk_wait(struct blk_engine *e, unsigned ms)
{
    uint64_t now, end = time_ns() + ms * 1000000ull;
    while (e->in_flight && (now = time_ns()) < end) {
        struct io_uring_cqe *cqe;
        struct __kernel_timespec left = {.tv_sec = (int64_t)((end - now) / 1000000000),
                                         .tv_nsec = (int64_t)((end - now) % 1000000000)};
        io_uring_submit_and_wait_timeout(&e->ring, &cqe, 1, &left, NULL);
        blk_reap(e);
    }
    if (e->ring_up)
        blk_submit(e);
    return !e->in_flight;
}

int blk_engine_sync(struct blk_engine *e, struct error *err)
{
    if (e->top->read_only || !e->unflushed)
        return 0;
    if (e->flush_failed)
        return error_set(err, -EIO, "%s: a flush failed before", e->top->path);
    int ret = 0;
    if (e->overlay)
        ret = blk_overlay_sync(e->overlay, err);
    else if (fdatasync(e->top->fd))
        ret = error_errno(err, "%s", e->top->path);
    if (!ret)
        e->unflushed = false;
    else
        e->flush_failed = true;
    return ret;
}

int blk_engine_create(struct blk_engine *e, struct blk_image *top, struct blk_overlay *overlay,
                      unsigned depth, int event_fd, struct error *err)
{
    // Room for the completions of all that can be in flight: they never overflow.
    static const uint8_t ops[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC,
                                  IORING_OP_FALLOCATE};
    e->top = top;
    e->overlay = overlay;
    e->shift = overlay ? overlay->data_offset : 0;
    e->event_fd = event_fd;
    int ret = ring_create(&e->ring, RING_ENTRIES, 2 * depth);
    if (ret)
        return error_set(err, ret, "io_uring_setup: %s", strerror(-ret));
    e->ring_up = true;
    const struct blk_image *base = overlay ? overlay->base : top;
    const int files[BLK_FILES] = {
        [FILE_TOP] = top->fd,
        [FILE_TOP_DIRECT] = top->direct_fd >= 0 ? top->direct_fd : top->fd,
        [FILE_BASE] = base->fd,
        [FILE_BASE_DIRECT] = base->direct_fd >= 0 ? base->direct_fd : base->fd,
    };
    ret = io_uring_register_files(&e->ring, files, ARRAY_SIZE(files));
    if (ret)
        return error_set(err, ret, "io_uring_register_files: %s", strerror(-ret));
    ret = io_uring_register_eventfd(&e->ring, event_fd);
    if (ret)
        return error_set(err, ret, "io_uring_register_eventfd: %s", strerror(-ret));
    return ring_open(&e->ring, ops, ARRAY_SIZE(ops), true, err);
}

void blk_engine_destroy(struct blk_engine *e)
{
    if (e->ring_up) {
        if (!e->unanswered) // the ring's own end may keep them open a little longer
            io_uring_unregister_files(&e->ring);
        io_uring_queue_exit(&e->ring);
    }
    e->ring_up = false;
}
