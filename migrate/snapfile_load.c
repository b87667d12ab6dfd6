// SPDX-License-Identifier: Apache-2.0
// Reading all of a chain: file after file, and within a file chunk after chunk by several threads.
// A page that a nearer file has is left out, so each page is written once.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/uio.h>

#include "migrate/pages.h"
#include "migrate/snapfile_level.h"
#include "vmm/bitmap.h"

enum { AHEAD = 32 }; // chunks asked from the disk ahead

struct loader {
    const struct snapfile *f;
    const struct snapfile_target *target; // NULL: only checks
    uint64_t *nearer;                     // pages that nearer files have; NULL: none

    const struct snapfile_level *level;
    uint32_t *first_run; // of a chunk in `order`; one more than chunks
    uint32_t *order;     // runs of data, by chunk

    atomic_uint next; // chunk
    _Atomic uint64_t pages_done;
    atomic_bool stop;
    pthread_mutex_t lock; // guards running, ret, err
    pthread_cond_t changed;
    unsigned running;
    int ret;
    struct error err;
};

static void fail(struct loader *ld, int ret, const struct error *err)
{
    pthread_mutex_lock(&ld->lock);
    if (!ld->ret) {
        ld->ret = ret;
        ld->err = *err;
    }
    pthread_mutex_unlock(&ld->lock);
    atomic_store(&ld->stop, true);
}

// --- one chunk

// Where the chunk's slots go in memory, as far as they go there.
struct places {
    struct iovec iov[SNAPFILE_CHUNK_PAGES];
    uint32_t slot[SNAPFILE_CHUNK_PAGES]; // of each iovec's first page
    unsigned nr;
    unsigned pages;
    bool in_order; // iovecs are slot after slot, from the first to the last of the chunk
};

static void places_add(struct places *p, void *at, uint32_t slot, uint64_t count)
{
    p->in_order &= slot == p->pages;
    p->pages += (unsigned)count;
    struct iovec *last = p->nr ? &p->iov[p->nr - 1] : NULL;
    if (last && (char *)last->iov_base + last->iov_len == at &&
        p->slot[p->nr - 1] + last->iov_len / PAGE_SIZE == slot) {
        last->iov_len += count * PAGE_SIZE;
        return;
    }
    p->slot[p->nr] = slot;
    p->iov[p->nr++] = (struct iovec) {at, count * PAGE_SIZE};
}

static void places_find(const struct loader *ld, uint32_t chunk, struct places *p)
{
    p->nr = p->pages = 0;
    p->in_order = true;
    for (uint32_t i = ld->first_run[chunk]; i < ld->first_run[chunk + 1]; i++) {
        const struct snapfile_run *run = &ld->level->runs[ld->order[i]];
        uint64_t end = (uint64_t)run->page + run->count;
        for (uint64_t page = run->page; page < end;) {
            uint64_t count = end - page;
            if (ld->nearer) {
                page = bitmap_find(ld->nearer, end, page, false);
                if (page == end)
                    break;
                count = bitmap_find(ld->nearer, end, page, true) - page;
            }
            uint64_t here;
            void *at = ld->target->at(ld->target, page, &here);
            here = here < count ? here : count;
            places_add(p, at, run->slot + (uint32_t)(page - run->page), here);
            page += here;
        }
    }
}

// Straight from the file into guest memory, then checked there: nothing runs in it yet.
static int load_raw(const struct loader *ld, uint32_t chunk, struct places *p, struct error *err)
{
    const struct snapfile_chunk *c = &ld->level->chunks[chunk];
    struct iovec iov[SNAPFILE_CHUNK_PAGES];
    memcpy(iov, p->iov, p->nr * sizeof(iov[0]));
    ssize_t n = preadv(ld->level->fd, iov, (int)p->nr, (off_t)c->offset);
    if (n != (ssize_t)c->len) // rare: the other way tells why, or does it
        return -EAGAIN;
    uint32_t crc = 0;
    for (unsigned i = 0; i < p->nr; i++)
        crc = snapfile_sum_more(crc, p->iov[i].iov_base, p->iov[i].iov_len);
    return crc == c->sum ? 0 : snapfile_chunk_damaged(ld->level, chunk, "checksum", err);
}

static int load_chunk(const struct loader *ld, uint32_t chunk, uint8_t *scratch, uint8_t *pages,
                      struct error *err)
{
    const struct snapfile_chunk *c = &ld->level->chunks[chunk];
    struct places p;
    if (!ld->target)
        return snapfile_chunk_read(ld->level, chunk, scratch, pages, err);
    places_find(ld, chunk, &p);
    if (!p.nr)
        return 0;
    bool whole = p.in_order && p.pages == c->pages;
    if (whole && c->kind == CHUNK_RAW) {
        int ret = load_raw(ld, chunk, &p, err);
        if (ret != -EAGAIN)
            return ret;
    }
    uint8_t *to = whole && p.nr == 1 ? p.iov[0].iov_base : pages;
    int ret = snapfile_chunk_read(ld->level, chunk, scratch, to, err);
    for (unsigned i = 0; !ret && to == pages && i < p.nr; i++)
        memcpy(p.iov[i].iov_base, pages + p.slot[i] * PAGE_SIZE, p.iov[i].iov_len);
    return ret;
}

static void read_ahead(const struct loader *ld, uint32_t chunk)
{
    const struct snapfile_level *l = ld->level;
    if (chunk % AHEAD || !l->header.nr_chunks)
        return;
    uint32_t last = l->header.nr_chunks - 1, from = chunk + (chunk ? AHEAD : 0);
    uint32_t to = from + AHEAD + (chunk ? 0 : AHEAD);
    if (from > last)
        return;
    to = to < last ? to : last;
    uint64_t start = l->chunks[from].offset, end = l->chunks[to].offset + l->chunks[to].len;
    posix_fadvise(l->fd, (off_t)start, (off_t)(end - start), POSIX_FADV_WILLNEED);
}

static void *loader_main(void *arg)
{
    struct loader *ld = arg;
    struct error err = {0};
    const size_t bytes = SNAPFILE_CHUNK_PAGES * PAGE_SIZE;
    autofree uint8_t *scratch = malloc(bytes), *pages = malloc(bytes);
    if (!scratch || !pages)
        fail(ld, error_set(&err, -ENOMEM, "no memory to read a snapshot"), &err);
    while (!atomic_load(&ld->stop)) {
        uint32_t chunk = atomic_fetch_add(&ld->next, 1);
        if (chunk >= ld->level->header.nr_chunks)
            break;
        read_ahead(ld, chunk);
        int ret = load_chunk(ld, chunk, scratch, pages, &err);
        if (ret)
            fail(ld, ret, &err);
        atomic_fetch_add(&ld->pages_done, ld->level->chunks[chunk].pages);
    }
    pthread_mutex_lock(&ld->lock);
    ld->running--;
    pthread_cond_signal(&ld->changed);
    pthread_mutex_unlock(&ld->lock);
    return NULL;
}

// --- one file

// Runs by chunk: counted, then placed.
static int runs_order(struct loader *ld, struct error *err)
{
    const struct snapfile_level *l = ld->level;
    const uint32_t chunks = l->header.nr_chunks;
    ld->first_run = calloc(chunks + 2ull, sizeof(ld->first_run[0]));
    ld->order = malloc((l->header.nr_runs + 1ull) * sizeof(ld->order[0]));
    if (!ld->first_run || !ld->order)
        return error_set(err, -ENOMEM, "no memory to read a snapshot");
    for (uint32_t i = 0; i < l->header.nr_runs; i++)
        if (l->runs[i].chunk != RUN_ZERO)
            ld->first_run[l->runs[i].chunk + 2]++;
    for (uint32_t i = 2; i < chunks + 2; i++)
        ld->first_run[i] += ld->first_run[i - 1];
    for (uint32_t i = 0; i < l->header.nr_runs; i++)
        if (l->runs[i].chunk != RUN_ZERO)
            ld->order[ld->first_run[l->runs[i].chunk + 1]++] = i;
    return 0;
}

static int wait_for_end(struct loader *ld, struct error *err)
{
    int ret = 0;
    pthread_mutex_lock(&ld->lock);
    while (ld->running) {
        struct timespec until = time_deadline(200);
        pthread_cond_timedwait(&ld->changed, &ld->lock, &until);
        if (ret || !ld->target || !ld->target->progress || !ld->running)
            continue;
        pthread_mutex_unlock(&ld->lock);
        ret = ld->target->progress(ld->target, atomic_load(&ld->pages_done), err);
        if (ret)
            atomic_store(&ld->stop, true);
        pthread_mutex_lock(&ld->lock);
    }
    if (!ret && ld->ret) {
        ret = ld->ret;
        if (err)
            *err = ld->err;
    }
    pthread_mutex_unlock(&ld->lock);
    return ret;
}

static int level_load(struct loader *ld, unsigned workers, struct error *err)
{
    pthread_t threads[4];
    unsigned nr = 0;
    int ret = runs_order(ld, err);
    atomic_store(&ld->next, 0);
    for (; !ret && nr < workers; nr++) {
        pthread_mutex_lock(&ld->lock);
        ld->running++;
        pthread_mutex_unlock(&ld->lock);
        ret = pthread_create(&threads[nr], NULL, loader_main, ld);
        if (ret) {
            pthread_mutex_lock(&ld->lock);
            ld->running--;
            pthread_mutex_unlock(&ld->lock);
            ret = error_set(err, -ret, "cannot start a thread that reads a snapshot");
            atomic_store(&ld->stop, true);
            break;
        }
    }
    int end = wait_for_end(ld, ret ? NULL : err);
    while (nr)
        pthread_join(threads[--nr], NULL);
    free(ld->first_run);
    free(ld->order);
    ld->first_run = ld->order = NULL;
    return ret ? ret : end;
}

static void nearer_add(struct loader *ld, const struct snapfile_level *l)
{
    for (uint32_t i = 0; i < l->header.nr_runs; i++)
        bitmap_fill(ld->nearer, l->runs[i].page, l->runs[i].count, true);
}

// A mapped file may be mapped whole: between its pages there must be nothing.
static int holes_check(const struct snapfile_level *l, struct error *err)
{
    const struct snapfile_header *h = &l->header;
    autofree uint8_t *page = malloc(PAGE_SIZE);
    off_t at = (off_t)h->data_offset, end = (off_t)(h->data_offset + h->data_bytes);
    uint32_t run = 0;
    if (!page)
        return error_set(err, -ENOMEM, "no memory to read a snapshot");
    while (at < end) {
        off_t data = lseek(l->fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0;
        if (data < 0)
            return error_errno(err, "%s: looking for holes", l->path);
        if (data >= end)
            break;
        off_t hole = lseek(l->fd, data, SEEK_HOLE);
        hole = hole < 0 || hole > end ? end : hole;
        for (uint64_t p = ((uint64_t)data - h->data_offset) / PAGE_SIZE,
                      stop = ((uint64_t)hole - h->data_offset + PAGE_SIZE - 1) / PAGE_SIZE;
             p < stop; p++) {
            while (run < h->nr_runs && (uint64_t)l->runs[run].page + l->runs[run].count <= p)
                run++;
            if (run < h->nr_runs && l->runs[run].page <= p && l->runs[run].chunk != RUN_ZERO)
                continue;
            if (pread(l->fd, page, PAGE_SIZE, (off_t)(h->data_offset + p * PAGE_SIZE)) !=
                    (ssize_t)PAGE_SIZE ||
                !page_is_zero(page))
                return error_set(err, -EBADMSG, "%s: page %llu is not listed, but not zero",
                                 l->path, (unsigned long long)p);
        }
        at = hole;
    }
    return 0;
}

static int run_levels(struct loader *ld, unsigned workers, struct error *err)
{
    int ret = 0;
    workers = snapfile_workers(workers);
    for (unsigned n = 0; !ret && n < ld->f->depth; n++) {
        ld->level = &ld->f->levels[n];
        if (!ld->target && ld->level->header.layout == SNAPFILE_MAPPED)
            ret = holes_check(ld->level, err);
        if (!ret)
            ret = level_load(ld, workers, err);
        if (!ret && ld->nearer)
            nearer_add(ld, ld->level);
    }
    return ret;
}

static int run(const struct snapfile *f, const struct snapfile_target *target, unsigned workers,
               struct error *err)
{
    struct loader ld = {.f = f, .target = target};
    if (target && f->depth > 1) {
        ld.nearer = calloc(bitmap_words(f->levels[0].header.pages), 8);
        if (!ld.nearer)
            return error_set(err, -ENOMEM, "no memory to read a snapshot");
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&ld.changed, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&ld.lock, NULL);
    int ret = run_levels(&ld, workers, err);
    pthread_mutex_destroy(&ld.lock);
    pthread_cond_destroy(&ld.changed);
    free(ld.nearer);
    return ret;
}

int snapfile_load(const struct snapfile *f, const struct snapfile_target *target, unsigned workers,
                  struct error *err)
{
    return run(f, target, workers, err);
}

int snapfile_verify(const struct snapfile *f, unsigned workers, struct error *err)
{
    return run(f, NULL, workers, err);
}
