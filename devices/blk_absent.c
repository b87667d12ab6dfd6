// SPDX-License-Identifier: Apache-2.0
#include "devices/blk_absent.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "devices/blk_engine.h"
#include "vmm/bitmap.h"
#include "vmm/disk.h"

struct blk_absent {
    void (*ring)(void *arg, unsigned queue);
    void *arg;
    uint64_t size; // bytes of the disk
    uint64_t nr;   // blocks, the last one perhaps a part of one

    pthread_mutex_t lock; // guards what follows
    uint64_t *missing;
    uint64_t *filling;      // part of missing
    uint64_t *waited;       // somebody is parked for it
    uint64_t *untold;       // part of waited: the source has not been asked yet
    uint64_t left;          // bits of missing
    uint64_t untold_lowest; // no bit of untold lies below
    uint32_t parked;        // queues, a bit each
    int wake_fd;
};

struct blk_absent *blk_absent_create(uint64_t *missing, uint64_t size, int wake_fd,
                                     void (*ring)(void *arg, unsigned queue), void *arg)
{
    struct blk_absent *a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    uint64_t nr = (size + DISK_BLOCK - 1) / DISK_BLOCK;
    *a = (struct blk_absent) {.ring = ring, .arg = arg, .size = size, .nr = nr, .wake_fd = wake_fd};
    pthread_mutex_init(&a->lock, NULL);
    a->filling = calloc(bitmap_words(nr), 8);
    a->waited = calloc(bitmap_words(nr), 8);
    a->untold = calloc(bitmap_words(nr), 8);
    if (!a->filling || !a->waited || !a->untold) {
        blk_absent_free(a);
        return NULL;
    }
    a->missing = missing;
    a->untold_lowest = nr;
    a->left = bitmap_count(missing, nr);
    return a;
}

void blk_absent_free(struct blk_absent *a)
{
    if (!a)
        return;
    free(a->missing);
    free(a->filling);
    free(a->waited);
    free(a->untold);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

// --- requests; under the lock

static void tell(struct blk_absent *a, uint64_t block)
{
    bitmap_set(a->untold, block);
    a->untold_lowest = block < a->untold_lowest ? block : a->untold_lowest;
}

static void wait_for(struct blk_absent *a, uint64_t block, bool *news)
{
    if (bitmap_test(a->waited, block))
        return;
    bitmap_set(a->waited, block);
    if (bitmap_test(a->filling, block))
        return; // it comes
    tell(a, block);
    *news = true;
}

struct stretch { // of blocks that a range touches
    uint64_t first, last;
    bool whole_first, whole_last; // all of that block
};

static struct stretch stretch_of(const struct blk_absent *a, const struct blk_range *s)
{
    uint64_t end = s->offset + s->len;
    struct stretch t = {.first = s->offset / DISK_BLOCK, .last = (end - 1) / DISK_BLOCK};
    bool ends = !(end % DISK_BLOCK) || end == a->size; // of the block
    t.whole_last = ends && (t.last > t.first || !(s->offset % DISK_BLOCK));
    t.whole_first = t.first == t.last ? t.whole_last : !(s->offset % DISK_BLOCK);
    return t;
}

static bool whole(const struct stretch *t, uint64_t block)
{
    return (block != t->first || t->whole_first) && (block != t->last || t->whole_last);
}

// Does not wait for what it is to write anew, unless somebody else does.
static bool may_fill(const struct blk_absent *a, const struct blk_request *r,
                     const struct stretch *t, uint64_t block)
{
    return (r->op == BLK_WRITE || r->op == BLK_ZERO) && r->nr_ranges == 1 && whole(t, block) &&
           !bitmap_test(a->filling, block) && !bitmap_test(a->waited, block);
}

enum { TOUCHES = 1, WAITS = 2 };

static unsigned request_look(const struct blk_absent *a, const struct blk_request *r)
{
    unsigned found = 0;
    for (unsigned i = 0; i < r->nr_ranges; i++) {
        struct stretch t = stretch_of(a, &r->ranges[i]);
        for (uint64_t block = t.first; block <= t.last; block++)
            if (bitmap_test(a->missing, block))
                found |= TOUCHES | (may_fill(a, r, &t, block) ? 0 : WAITS);
    }
    return found;
}

// Everything that is missing of it is waited for: also what it would fill, so that nobody else
// fills it before.
static bool request_park(struct blk_absent *a, const struct blk_request *r)
{
    bool news = false;
    for (unsigned i = 0; i < r->nr_ranges; i++) {
        struct stretch t = stretch_of(a, &r->ranges[i]);
        for (uint64_t block = t.first; block <= t.last; block++)
            if (bitmap_test(a->missing, block))
                wait_for(a, block, &news);
    }
    a->parked |= 1u << r->queue;
    return news;
}

static void request_fill(struct blk_absent *a, const struct blk_request *r)
{
    struct stretch t = stretch_of(a, &r->ranges[0]);
    for (uint64_t block = t.first; block <= t.last; block++)
        if (bitmap_test(a->missing, block))
            bitmap_set(a->filling, block);
}

enum blk_absent_verdict blk_absent_look(struct blk_absent *a, const struct blk_request *r)
{
    enum blk_absent_verdict verdict = BLK_ABSENT_GO;
    bool news = false;
    pthread_mutex_lock(&a->lock);
    unsigned found = a->left ? request_look(a, r) : 0;
    if (found && r->op == BLK_DISCARD) {
        verdict = BLK_ABSENT_SKIP;
    } else if (found & WAITS) {
        verdict = BLK_ABSENT_PARK;
        news = request_park(a, r);
    } else if (found) {
        verdict = BLK_ABSENT_FILL;
        request_fill(a, r);
    }
    if (news && a->wake_fd >= 0)
        eventfd_write(a->wake_fd, 1);
    pthread_mutex_unlock(&a->lock);
    return verdict;
}

void blk_absent_unpark(struct blk_absent *a, unsigned queue)
{
    pthread_mutex_lock(&a->lock);
    a->parked &= ~(1u << queue);
    pthread_mutex_unlock(&a->lock);
}

// --- filling

// Under the lock. The queues to tell.
static uint32_t fill_end(struct blk_absent *a, uint64_t block, bool written)
{
    bool waited = bitmap_test(a->waited, block);
    bitmap_clear(a->filling, block);
    if (written) {
        bitmap_clear(a->missing, block);
        bitmap_clear(a->waited, block);
        bitmap_clear(a->untold, block);
        if (!--a->left && a->wake_fd >= 0)
            eventfd_write(a->wake_fd, 1); // somebody waits for that
    } else if (waited) {
        tell(a, block);
        if (a->wake_fd >= 0)
            eventfd_write(a->wake_fd, 1);
    }
    return waited ? a->parked : 0;
}

static void ring(struct blk_absent *a, uint32_t queues)
{
    for (unsigned q = 0; queues; q++, queues >>= 1)
        if (queues & 1)
            a->ring(a->arg, q);
}

void blk_absent_done(struct blk_absent *a, const struct blk_request *r, bool written)
{
    uint32_t queues = 0;
    pthread_mutex_lock(&a->lock);
    struct stretch t = stretch_of(a, &r->ranges[0]);
    for (uint64_t block = t.first; block <= t.last; block++)
        if (bitmap_test(a->filling, block))
            queues |= fill_end(a, block, written);
    pthread_mutex_unlock(&a->lock);
    ring(a, queues);
}

bool blk_absent_fill_begin(struct blk_absent *a, uint64_t block)
{
    pthread_mutex_lock(&a->lock);
    bool ours = block < a->nr && bitmap_test(a->missing, block) && !bitmap_test(a->filling, block);
    if (ours)
        bitmap_set(a->filling, block);
    pthread_mutex_unlock(&a->lock);
    return ours;
}

void blk_absent_fill_end(struct blk_absent *a, uint64_t block, bool written)
{
    pthread_mutex_lock(&a->lock);
    uint32_t queues = fill_end(a, block, written);
    pthread_mutex_unlock(&a->lock);
    ring(a, queues);
}

// --- what the source is asked for

unsigned blk_absent_wanted(struct blk_absent *a, uint64_t *blocks, unsigned max)
{
    unsigned nr = 0;
    pthread_mutex_lock(&a->lock);
    uint64_t word = a->untold_lowest / 64, end = bitmap_words(a->nr);
    while (word < end && nr < max) {
        if (!a->untold[word]) {
            word++;
            continue;
        }
        uint64_t block = word * 64 + (unsigned)__builtin_ctzll(a->untold[word]);
        bitmap_clear(a->untold, block);
        blocks[nr++] = block;
    }
    a->untold_lowest = word * 64 < a->nr ? word * 64 : a->nr;
    pthread_mutex_unlock(&a->lock);
    return nr;
}

void blk_absent_again(struct blk_absent *a)
{
    pthread_mutex_lock(&a->lock);
    for (uint64_t i = 0; i < bitmap_words(a->nr); i++)
        if (a->waited[i]) // of a large disk little is: the rest of the map stays untouched
            a->untold[i] = a->waited[i] & ~a->filling[i];
    a->untold_lowest = 0;
    pthread_mutex_unlock(&a->lock);
}

void blk_absent_wake_fd(struct blk_absent *a, int fd)
{
    pthread_mutex_lock(&a->lock);
    a->wake_fd = fd;
    pthread_mutex_unlock(&a->lock);
}

uint64_t blk_absent_missing(struct blk_absent *a, uint64_t *copy)
{
    pthread_mutex_lock(&a->lock);
    uint64_t left = a->left;
    if (copy)
        memcpy(copy, a->missing, bitmap_words(a->nr) * 8);
    pthread_mutex_unlock(&a->lock);
    return left;
}
