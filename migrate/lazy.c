// SPDX-License-Identifier: Apache-2.0
#include "migrate/lazy.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "migrate/userfault.h"
#include "migrate/workset.h"
#include "vmm/bitmap.h"

// UFFDIO_POISON (Linux 6.6); not in older headers.
struct poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define POISON_IOCTL _IOWR(UFFDIO, 0x08, struct poison)

enum {
    ZERO_PAGES = 16,       // placed at once around a zero page
    POISON_AFTER_MS = 500, // vCPUs have left by then
    MAP_GAP = 256,         // pages of hole that join two mappings of a file
    MAPPINGS_MAX = 16384,
};

struct lazy {
    struct ram_filler filler;
    struct ram *ram;
    char path[PATH_MAX];
    struct snapfile *f;
    bool f_ours;
    struct lazy_params params;
    char ws_path[PATH_MAX];
    int uffd, stop_fd;
    pthread_t fault_thread, fetch_thread;
    bool fault_started, fetch_started;
    uint8_t *fault_buffer, *fetch_buffer; // a chunk each
    struct workset set;                   // of the last time: the fetch thread's

    pthread_mutex_t guard; // held while a fault is served: the guard is not lifted in between
    bool lifted;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    uint64_t *have;        // placed
    struct workset record; // first touches of this time
    bool recording, stop, hurry;
    bool fetched;  // everything has been placed
    bool complete; // and guest memory is ordinary memory
    struct lazy_counts counts;
    uint64_t *damaged; // what nobody can have; NULL: nothing
    uint64_t poison_at;
    int failure;
    struct error err;
};

void lazy_params_default(struct lazy_params *params, const char *path)
{
    *params =
        (struct lazy_params) {.path = path, .record_ms = 5000, .prefetch = true, .fill = true};
}

// --- placing

// The stretch around a page that one read gives.
struct stretch {
    uint64_t first, count;
    bool zero;
};

static struct stretch stretch_at(const struct lazy *lz, uint64_t page, struct snapfile_where *where)
{
    struct stretch s = {.first = page, .count = 1};
    snapfile_find(lz->f, page, where);
    s.zero = where->kind == SNAPFILE_ZERO;
    uint64_t before = page % ZERO_PAGES, after = ZERO_PAGES - before;
    if (!s.zero) { // within one chunk
        before = where->slot;
        after = where->pages - where->slot;
    }
    before = before < where->before ? before : where->before;
    after = after < where->count ? after : where->count;
    s.first = page - before;
    s.count = before + after;
    // May cross from one region into the next: they lie back to back in this process.
    return s;
}

static int place(struct lazy *lz, const struct stretch *s, const struct snapfile_where *where,
                 uint64_t page, uint8_t *buffer, struct error *err)
{
    uint8_t *to = ram_page(lz->ram, s->first);
    if (s->zero)
        return uffd_zero(lz->uffd, to, s->count * PAGE_SIZE, err);
    int ret = snapfile_chunk(lz->f, where->level, where->chunk, buffer, err);
    uint64_t slot = where->slot - (page - s->first);
    return ret ? ret
               : uffd_copy(lz->uffd, to, buffer + slot * PAGE_SIZE, s->count * PAGE_SIZE, err);
}

// Under the lock.
static void placed(struct lazy *lz, const struct stretch *s, uint64_t *counter)
{
    for (uint64_t p = s->first; p < s->first + s->count; p++) {
        *counter += !bitmap_test(lz->have, p);
        bitmap_set(lz->have, p);
    }
}

// --- failing

// The first one is told. Whoever waits for the stretch goes on waiting until poison_now.
static void fail(struct lazy *lz, const struct stretch *s, int ret, const struct error *err)
{
    pthread_mutex_lock(&lz->lock);
    bool first = !lz->failure;
    if (first) {
        lz->failure = ret;
        lz->err = *err;
    }
    if (!lz->poison_at) // also for who comes to another page after the poison
        lz->poison_at = time_ns() + POISON_AFTER_MS * 1000000ull;
    if (lz->damaged)
        bitmap_fill(lz->damaged, s->first, s->count, true);
    pthread_cond_broadcast(&lz->changed);
    pthread_mutex_unlock(&lz->lock);
    if (first && lz->params.failed)
        lz->params.failed(lz->params.context, err);
}

static void poison_now(struct lazy *lz)
{
    uint64_t pages = lz->ram->pages;
    pthread_mutex_lock(&lz->lock);
    for (uint64_t first = 0; (first = bitmap_find(lz->damaged, pages, first, true)) < pages;) {
        uint64_t end = bitmap_find(lz->damaged, pages, first, false);
        for (; first < end; first++) {
            struct poison poison = {
                .range = {.start = (uintptr_t)ram_page(lz->ram, first), .len = PAGE_SIZE}};
            ioctl(lz->uffd, POISON_IOCTL, &poison); // before Linux 6.6: they wait on
        }
    }
    lz->poison_at = 0;
    pthread_mutex_unlock(&lz->lock);
}

// --- faults

// Who waits for a page that came meanwhile with the last of the rest was woken with the guard's
// end, and nothing can be placed any more (UFFDIO_COPY: ENOENT).
static int fault_place(struct lazy *lz, const struct stretch *s, const struct snapfile_where *where,
                       uint64_t page, struct error *err)
{
    pthread_mutex_lock(&lz->guard);
    int ret = lz->lifted ? 0 : place(lz, s, where, page, lz->fault_buffer, err);
    pthread_mutex_unlock(&lz->guard);
    return ret;
}

static void fault_serve(struct lazy *lz, uint64_t page)
{
    struct snapfile_where where;
    struct error err;
    uint64_t start = time_ns();
    struct stretch s = stretch_at(lz, page, &where);
    int ret = fault_place(lz, &s, &where, page, &err);
    if (ret) {
        fail(lz, &s, ret, &err);
        return;
    }
    uint64_t took = time_ns() - start;
    pthread_mutex_lock(&lz->lock);
    lz->counts.faults++;
    lz->counts.worst_ns = took > lz->counts.worst_ns ? took : lz->counts.worst_ns;
    placed(lz, &s, &lz->counts.by_fault);
    if (lz->recording)
        workset_add(&lz->record, page);
    pthread_mutex_unlock(&lz->lock);
}

static void faults_take(struct lazy *lz)
{
    uint64_t pages[UFFD_BATCH];
    unsigned nr;
    uffd_faults(lz->uffd, lz->ram, pages, &nr, NULL);
    for (unsigned i = 0; i < nr; i++)
        fault_serve(lz, pages[i]);
}

static int poison_wait_ms(struct lazy *lz)
{
    pthread_mutex_lock(&lz->lock);
    uint64_t at = lz->poison_at, now = time_ns();
    pthread_mutex_unlock(&lz->lock);
    return !at ? -1 : at <= now ? 0 : (int)((at - now) / 1000000 + 1);
}

static void *fault_main(void *arg)
{
    struct lazy *lz = arg;
    seccomp_enter_or_abort(SECCOMP_WORKER, lz->params.seccomp);
    for (;;) {
        struct pollfd p[2] = {{.fd = lz->uffd, .events = POLLIN},
                              {.fd = lz->stop_fd, .events = POLLIN}};
        int wait = poison_wait_ms(lz);
        if (!wait)
            poison_now(lz);
        else if (poll(p, 2, wait) > 0 && p[1].revents)
            return NULL;
        else if (p[0].revents)
            faults_take(lz);
    }
}

// --- fetching ahead

static bool stopping(struct lazy *lz)
{
    pthread_mutex_lock(&lz->lock);
    bool stop = lz->stop || lz->failure;
    pthread_mutex_unlock(&lz->lock);
    return stop;
}

// The stretch of a page, unless it is here; *next is the page behind it. False: give up.
static bool fetch(struct lazy *lz, uint64_t page, bool zeros, uint64_t *next)
{
    struct snapfile_where where;
    struct error err;
    struct stretch s = stretch_at(lz, page, &where);
    *next = s.first + s.count;
    if (s.zero && !zeros) {
        *next = page + where.count;
        return true;
    }
    pthread_mutex_lock(&lz->lock);
    bool here = bitmap_find(lz->have, *next, s.first, false) == *next;
    bool stop = lz->stop || lz->failure;
    pthread_mutex_unlock(&lz->lock);
    if (here || stop)
        return !stop;
    int ret = place(lz, &s, &where, page, lz->fetch_buffer, &err);
    if (ret) {
        fail(lz, &s, ret, &err);
        return false;
    }
    pthread_mutex_lock(&lz->lock);
    placed(lz, &s, &lz->counts.ahead);
    pthread_mutex_unlock(&lz->lock);
    return true;
}

static void set_fetch(struct lazy *lz)
{
    uint64_t next;
    for (uint32_t i = 0; i < lz->set.nr; i++)
        if (!fetch(lz, lz->set.pages[i], true, &next))
            return;
}

// Waits until the rest is to be fetched. False: it is not.
static bool fill_wait(struct lazy *lz)
{
    struct timespec end = time_deadline(lz->params.record_ms);
    int late = 0;
    pthread_mutex_lock(&lz->lock);
    while (!lz->stop && !lz->failure && !lz->hurry && !(late && lz->params.fill)) {
        if (late)
            pthread_cond_wait(&lz->changed, &lz->lock);
        else
            late = pthread_cond_timedwait(&lz->changed, &lz->lock, &end) == ETIMEDOUT;
        lz->recording &= !late;
    }
    lz->recording = false;
    bool go = !lz->stop && !lz->failure;
    pthread_mutex_unlock(&lz->lock);
    return go;
}

// Everything that is not zero is here: what is missing is zero, as the kernel would have it.
static void finish(struct lazy *lz)
{
    pthread_mutex_lock(&lz->guard);
    uffd_unregister(lz->uffd, lz->ram->map, lz->ram->size);
    lz->lifted = true;
    pthread_mutex_unlock(&lz->guard);
    atomic_store(&lz->ram->missing, false);
    ram_discard_unblock(lz->ram);
    pthread_mutex_lock(&lz->lock);
    lz->counts.complete = lz->complete = true;
    pthread_cond_broadcast(&lz->changed);
    pthread_mutex_unlock(&lz->lock);
    if (lz->params.log)
        log_write(lz->params.log, LOG_INFO,
                  "%s: all of it is here; %llu pages by %llu faults, %llu ahead", lz->params.path,
                  (unsigned long long)lz->counts.by_fault, (unsigned long long)lz->counts.faults,
                  (unsigned long long)lz->counts.ahead);
}

// What this time was touched beside what was fetched ahead belongs to the set from now on.
static void set_save(struct lazy *lz)
{
    struct error err;
    const struct snapfile_info *info = snapfile_info(lz->f);
    pthread_mutex_lock(&lz->lock);
    for (uint32_t i = 0; i < lz->record.nr; i++)
        workset_add(&lz->set, lz->record.pages[i]);
    bool news = lz->record.nr;
    lz->record.nr = 0;
    pthread_mutex_unlock(&lz->lock);
    if (news && workset_save(&lz->set, lz->ws_path, info->id, &err) && lz->params.log)
        log_write(lz->params.log, LOG_WARN, "the working set is not kept: %s", err.text);
}

static void *fetch_main(void *arg)
{
    struct lazy *lz = arg;
    seccomp_enter_or_abort(SECCOMP_WORKER, lz->params.seccomp);
    set_fetch(lz);
    bool go = fill_wait(lz);
    set_save(lz);
    uint64_t page = 0;
    while (go && page < lz->ram->pages)
        go = fetch(lz, page, false, &page);
    if (go && !stopping(lz))
        finish(lz);
    return NULL;
}

// --- life

static int guard(struct lazy *lz, struct error *err)
{
    struct ram *ram = lz->ram;
    int ret = uffd_open(&lz->uffd, "a lazy restore", 0, err);
    if (!ret)
        ret = uffd_register(lz->uffd, ram->map, ram->size, UFFDIO_REGISTER_MODE_MISSING,
                            1ull << _UFFDIO_COPY | 1ull << _UFFDIO_ZEROPAGE | 1ull << _UFFDIO_WAKE,
                            err);
    // Guarded first, dropped second: nothing can slip in between.
    return ret ? ret : ram_drop(ram, 0, ram->pages, err);
}

static int threads_start(struct lazy *lz, struct error *err)
{
    int ret = pthread_create(&lz->fault_thread, NULL, fault_main, lz);
    lz->fault_started = !ret;
    if (!ret) {
        ret = pthread_create(&lz->fetch_thread, NULL, fetch_main, lz);
        lz->fetch_started = !ret;
    }
    return ret ? error_set(err, -ret, "a lazy restore: cannot start a thread") : 0;
}

static int lazy_begin(struct lazy *lz, struct error *err)
{
    struct error ignored;
    const struct snapfile_info *info = snapfile_info(lz->f);
    if (info->pages != lz->ram->pages)
        return error_set(err, -EINVAL, "a snapshot of %llu pages for a guest of %llu",
                         (unsigned long long)info->pages, (unsigned long long)lz->ram->pages);
    snprintf(lz->path, sizeof(lz->path), "%s", lz->params.path);
    lz->params.path = lz->path;
    if ((size_t)snprintf(lz->ws_path, sizeof(lz->ws_path), "%s.ws", lz->params.path) >=
        sizeof(lz->ws_path))
        return error_set(err, -ENAMETOOLONG, "%s: name too long", lz->params.path);
    lz->have = calloc(ram_bitmap_words(lz->ram), 8);
    lz->damaged = calloc(ram_bitmap_words(lz->ram), 8);
    lz->fault_buffer = malloc(SNAPFILE_CHUNK_PAGES * PAGE_SIZE);
    lz->fetch_buffer = malloc(SNAPFILE_CHUNK_PAGES * PAGE_SIZE);
    lz->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!lz->have || !lz->damaged || !lz->fault_buffer || !lz->fetch_buffer || lz->stop_fd < 0)
        return error_set(err, -ENOMEM, "no memory for a lazy restore");
    if (lz->params.prefetch &&
        !workset_load(&lz->set, lz->ws_path, info->id, info->pages, &ignored))
        lz->counts.recorded = lz->set.nr;
    int ret = guard(lz, err);
    return ret ? ret : threads_start(lz, err);
}

static int filler_complete(struct ram_filler *filler, struct error *err)
{
    return lazy_complete(container_of(filler, struct lazy, filler), err);
}

int lazy_create(struct lazy **out, struct ram *ram, struct snapfile *f,
                const struct lazy_params *params, struct error *err)
{
    struct lazy *lz = calloc(1, sizeof(*lz));
    if (!lz)
        return error_set(err, -ENOMEM, "no memory for a lazy restore");
    lz->ram = ram;
    lz->f = f;
    lz->params = *params;
    lz->uffd = lz->stop_fd = -1;
    lz->recording = params->record_ms;
    pthread_mutex_init(&lz->guard, NULL);
    pthread_mutex_init(&lz->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&lz->changed, &attr);
    pthread_condattr_destroy(&attr);
    ram_discard_block(ram); // a page given back now would be fetched again
    atomic_store(&ram->missing, true);
    int ret = lazy_begin(lz, err);
    if (ret) {
        lazy_free(lz);
        return ret;
    }
    lz->f_ours = true;
    lz->filler.complete = filler_complete;
    ram->filler = &lz->filler;
    *out = lz;
    return 0;
}

int lazy_complete(struct lazy *lz, struct error *err)
{
    pthread_mutex_lock(&lz->lock);
    lz->hurry = true;
    pthread_cond_broadcast(&lz->changed);
    while (!lz->complete && !lz->failure && !lz->stop)
        pthread_cond_wait(&lz->changed, &lz->lock);
    int ret = lz->complete  ? 0
              : lz->failure ? lz->failure
                            : error_set(err, -ECANCELED, "the VM ends before its memory is here");
    if (lz->failure && !lz->complete && err)
        *err = lz->err;
    pthread_mutex_unlock(&lz->lock);
    return ret;
}

void lazy_counts(struct lazy *lz, struct lazy_counts *counts)
{
    pthread_mutex_lock(&lz->lock);
    *counts = lz->counts;
    pthread_mutex_unlock(&lz->lock);
}

void lazy_free(struct lazy *lz)
{
    if (!lz)
        return;
    pthread_mutex_lock(&lz->lock);
    lz->stop = true;
    pthread_cond_broadcast(&lz->changed);
    pthread_mutex_unlock(&lz->lock);
    if (lz->fetch_started)
        pthread_join(lz->fetch_thread, NULL);
    if (lz->fault_started) {
        eventfd_write(lz->stop_fd, 1);
        pthread_join(lz->fault_thread, NULL);
    }
    if (lz->uffd >= 0)
        close(lz->uffd); // unregisters, wakes
    lz->ram->filler = NULL;
    if (!lz->complete) {
        atomic_store(&lz->ram->missing, false);
        ram_discard_unblock(lz->ram);
    }
    if (lz->stop_fd >= 0)
        close(lz->stop_fd);
    if (lz->f_ours)
        snapfile_close(lz->f);
    workset_free(&lz->set);
    workset_free(&lz->record);
    free(lz->have);
    free(lz->damaged);
    free(lz->fault_buffer);
    free(lz->fetch_buffer);
    pthread_cond_destroy(&lz->changed);
    pthread_mutex_destroy(&lz->lock);
    pthread_mutex_destroy(&lz->guard);
    free(lz);
}

// --- private mappings

struct mapping {
    uint64_t first, count; // pages
    int fd;
    uint64_t offset;
};

static int map_one(struct ram *ram, const struct mapping *m, unsigned *nr, struct error *err)
{
    if (!m->count)
        return 0;
    if (++*nr > MAPPINGS_MAX)
        return error_set(err, -EOPNOTSUPP,
                         "the chain has too many pieces to be mapped (merge it first)");
    void *at = ram_page(ram, m->first);
    size_t len = m->count * PAGE_SIZE;
    if (mmap(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, m->fd,
             (off_t)m->offset) == MAP_FAILED)
        return error_errno(err, "mapping %llu pages of a snapshot", (unsigned long long)m->count);
    madvise(at, len, MADV_DONTDUMP);
    return 0;
}

// A hole between two pieces of a full file reads as the zeros that belong there.
static bool joins(const struct mapping *m, const struct snapfile_where *where, uint64_t page,
                  bool full)
{
    uint64_t gap = page - (m->first + m->count);
    return m->count && m->fd == where->fd && (!gap || (full && gap <= MAP_GAP)) &&
           m->offset + (page - m->first) * PAGE_SIZE == where->offset;
}

int lazy_map(struct ram *ram, const struct snapfile *f, struct error *err)
{
    if (ram->memfd >= 0)
        return error_set(err, -EOPNOTSUPP, "shared guest memory cannot be mapped from a snapshot");
    struct mapping m = {0};
    unsigned nr = 0;
    int ret = ram_drop(ram, 0, ram->pages, err);
    ram->file_mapped = true;
    ram_discard_block(ram); // for ever: each would cut a mapping in two
    for (uint64_t page = 0, n; !ret && page < ram->pages; page += n) {
        struct snapfile_where where;
        snapfile_find(f, page, &where);
        n = where.count;
        if (where.kind == SNAPFILE_ZERO)
            continue;
        if (where.kind != SNAPFILE_RAW)
            return error_set(err, -EOPNOTSUPP, "only snapshots of the mapped layout can be mapped");
        if (joins(&m, &where, page, snapfile_depth(f) == 1)) {
            m.count = page + n - m.first;
        } else {
            ret = map_one(ram, &m, &nr, err);
            m = (struct mapping) {page, n, where.fd, where.offset};
        }
    }
    return ret ? ret : map_one(ram, &m, &nr, err);
}
