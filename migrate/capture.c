// SPDX-License-Identifier: Apache-2.0
#include "migrate/capture.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

#include "migrate/userfault.h"
#include "vmm/bitmap.h"

// Of Linux 6.4; not in older headers.
#define FEATURE_WP_UNPOPULATED (1ull << 13)

// PAGEMAP_SCAN (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst): which pages of a range are
// there, without an entry for each page that is not.
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL   _IOWR('f', 16, struct scan_arg)
#define SCAN_PRESENT (1ull << 3)
#define SCAN_SWAPPED (1ull << 4)

enum {
    FAULT_WAY_NS = 50 * 1000, // of a fault that another thread serves: there and back
    HUGE_PAGES = 512,         // 4 KiB pages of a 2 MiB page
    TAKE_PAGES = 64,          // a drain's step: as many pages as a snapshot's chunk
    ARM_PAGES = 1024,         // protected under the lock at once: some 80 us
    ASIDE_BYTES = 16 << 20,
};

// Pages that were copied aside; those of `bits`, counted from `first` on.
struct aside {
    uint64_t first;
    uint64_t bits[HUGE_PAGES / 64];
};

struct capture {
    struct ram *ram;
    int uffd, stop_fd, pagemap_fd;
    uint64_t unit, step; // pages: what protection works in; what a drain takes
    pthread_t thread;
    bool started, discards_blocked;
    uint8_t *bounce; // step pages

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    bool frozen, stop;
    uint64_t *known;               // existed when arming began, and so for good
    uint64_t *armed;               // protected, and not written to since
    uint64_t *todo;                // wanted and not yet taken; since the freeze
    uint64_t *zero;                // wanted and zero
    uint64_t left;                 // bits of `todo` and `zero`
    uint64_t busy_first, busy_end; // being copied by the drain
    struct aside *aside;           // a ring of nr_aside; data holds a unit for each
    uint8_t *data;
    uint64_t nr_aside, put, taken; // counted up for ever
    struct capture_counts counts;
    int failure; // the handler's
    struct error err;
};

// --- which pages exist

static void present_memfd(const struct ram *ram, uint64_t first, uint64_t end, uint64_t *bitmap)
{
    for (off_t at = (off_t)(first * PAGE_SIZE), stop = (off_t)(end * PAGE_SIZE); at < stop;) {
        off_t data = lseek(ram->memfd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return;
        if (data < 0)
            data = at;
        if (data >= stop)
            return;
        off_t hole = lseek(ram->memfd, data, SEEK_HOLE);
        hole = hole < 0 || hole > stop ? stop : hole;
        bitmap_fill(bitmap, (uint64_t)data / PAGE_SIZE,
                    align_up((uint64_t)hole, PAGE_SIZE) / PAGE_SIZE - (uint64_t)data / PAGE_SIZE,
                    true);
        at = hole;
    }
}

// False: the kernel does not say.
static bool present_anonymous(const struct capture *c, uint64_t first, uint64_t end,
                              uint64_t *bitmap)
{
    struct scan_region found[256];
    uint64_t base = (uintptr_t)c->ram->map;
    struct scan_arg scan = {.size = sizeof(scan),
                            .start = base + first * PAGE_SIZE,
                            .end = base + end * PAGE_SIZE,
                            .vec = (uintptr_t)found,
                            .vec_len = ARRAY_SIZE(found),
                            .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
                            .return_mask = SCAN_PRESENT};
    while (scan.start < scan.end) {
        int n = c->pagemap_fd < 0 ? -1 : ioctl(c->pagemap_fd, SCAN_IOCTL, &scan);
        if (n < 0)
            return false;
        for (int i = 0; i < n; i++)
            bitmap_fill(bitmap, (found[i].start - base) / PAGE_SIZE,
                        (found[i].end - found[i].start) / PAGE_SIZE, true);
        scan.start = scan.walk_end;
    }
    return true;
}

// Sets the bits of [first, end) that may be anything but zero.
static void present_find(const struct capture *c, uint64_t first, uint64_t end, uint64_t *bitmap)
{
    if (c->ram->memfd >= 0)
        present_memfd(c->ram, first, end, bitmap);
    else if (c->ram->file_mapped || !present_anonymous(c, first, end, bitmap))
        bitmap_fill(bitmap, first, end - first, true);
}

// --- protecting

// Under the lock. Whole units.
static int arm(struct capture *c, uint64_t first, uint64_t end, struct error *err)
{
    first = align_down(first, c->unit);
    end = align_up(end, c->unit);
    bitmap_fill(c->armed, first, end - first, true);
    return uffd_protect(c->uffd, ram_page(c->ram, first), (end - first) * PAGE_SIZE, err);
}

static int arm_all(struct capture *c, const uint64_t *pages, struct error *err)
{
    struct ram *ram = c->ram;
    const uint64_t *known = c->known;
    present_find(c, 0, ram->pages, c->known);
    for (size_t i = 0; pages && i < ram_bitmap_words(ram); i++)
        c->known[i] &= pages[i];
    int ret = 0;
    for (uint64_t first = 0; !ret;) {
        first = bitmap_find(known, ram->pages, first, true);
        if (first == ram->pages)
            break;
        uint64_t end = bitmap_find(known, ram->pages, first, false);
        end = end < first + ARM_PAGES ? end : align_down(first + ARM_PAGES, c->unit);
        pthread_mutex_lock(&c->lock); // a fault must find its bit set
        ret = arm(c, first, end, err);
        pthread_mutex_unlock(&c->lock);
        c->counts.armed += end - first;
        first = end;
    }
    return ret;
}

// Under the lock. Wanted pages of [first, end) that are bare: they are protected if they exist.
// With `ask` the kernel is asked which do.
static int freeze_span(struct capture *c, uint64_t first, uint64_t end, bool ask, uint64_t *present,
                       struct error *err)
{
    size_t word = (size_t)(first / 64);
    memcpy(present + word, c->known + word, (bitmap_words(end) - word) * 8);
    if (ask)
        present_find(c, first, end, present);
    for (size_t i = first / 64; i < bitmap_words(end); i++) {
        uint64_t bare = c->todo[i] & ~c->armed[i];
        c->zero[i] = bare & ~present[i];
        c->todo[i] &= ~c->zero[i];
        present[i] &= bare;
    }
    for (;;) {
        first = bitmap_find(present, end, first, true);
        if (first == end)
            return 0;
        uint64_t stop = bitmap_find(present, end, first, false);
        c->counts.bare += stop - first;
        int ret = arm(c, first, stop, err);
        if (ret)
            return ret;
        first = stop;
    }
}

static bool bare_unknown(const struct capture *c, uint64_t first, uint64_t end, bool *unknown)
{
    uint64_t bare = 0, news = 0;
    for (size_t i = first / 64; i < bitmap_words(end); i++) {
        bare |= c->todo[i] & ~c->armed[i];
        news |= c->todo[i] & ~c->armed[i] & ~c->known[i];
    }
    *unknown = news;
    return bare;
}

// The spans that have bare pages, by 2 MiB: asking the kernel for each page alone would cost more,
// as would asking it where every bare page is known to exist.
static int freeze(struct capture *c, uint64_t *present, struct error *err)
{
    uint64_t pages = c->ram->pages, start = 0, end;
    bool unknown = false; // of the span [start, at)
    int ret = 0;
    for (uint64_t at = 0; at < pages && !ret; at = end) {
        bool news, bare;
        end = at + HUGE_PAGES < pages ? at + HUGE_PAGES : pages;
        bare = bare_unknown(c, at, end, &news);
        if (start < at && (!bare || news != unknown)) {
            ret = freeze_span(c, start, at, unknown, present, err);
            start = at;
        }
        unknown = news;
        if (!bare)
            start = end;
    }
    return ret || start >= pages ? ret : freeze_span(c, start, pages, unknown, present, err);
}

int capture_freeze(struct capture *c, const uint64_t *pages, struct error *err)
{
    struct ram *ram = c->ram;
    uint64_t begin = time_ns();
    size_t words = ram_bitmap_words(ram);
    autofree uint64_t *present = calloc(words, 8);
    c->todo = calloc(words, 8);
    c->zero = calloc(words, 8);
    if (!present || !c->todo || !c->zero)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    if (pages)
        memcpy(c->todo, pages, words * 8);
    else
        bitmap_fill(c->todo, 0, ram->pages, true);
    pthread_mutex_lock(&c->lock);
    c->left = bitmap_count(c->todo, ram->pages);
    int ret = freeze(c, present, err);
    c->frozen = !ret;
    c->counts.freeze_ns = time_ns() - begin;
    pthread_mutex_unlock(&c->lock);
    return ret;
}

// --- faults

static int unprotect(struct capture *c, uint64_t first, uint64_t end, struct error *err)
{
    return uffd_unprotect(c->uffd, ram_page(c->ram, first), (end - first) * PAGE_SIZE, err);
}

// Under the lock. Moves the bits of [first, end), at most 512, out of `map`.
static bool bits_take(uint64_t *map, uint64_t first, uint64_t end, uint64_t *bits)
{
    bool any = false;
    memset(bits, 0, HUGE_PAGES / 8);
    for (uint64_t p = first; (p = bitmap_find(map, end, p, true)) < end; p++) {
        bitmap_clear(map, p);
        bitmap_set(bits, p - first);
        any = true;
    }
    return any;
}

static bool wanted(const struct capture *c, uint64_t first, uint64_t end)
{
    return c->frozen && bitmap_find(c->todo, end, first, true) < end;
}

// Under the lock, which it gives up while there is no room. A unit that nobody has taken yet is
// copied before the writer may go on; one that the drain copies just now, the drain releases.
static int fault_serve(struct capture *c, uint64_t page, struct error *err)
{
    uint64_t first = align_down(page, c->unit), end = first + c->unit;
    c->counts.waits += wanted(c, first, end) && c->put - c->taken == c->nr_aside;
    while (wanted(c, first, end) && c->put - c->taken == c->nr_aside && !c->stop)
        pthread_cond_wait(&c->changed, &c->lock);
    if (c->stop || (first < c->busy_end && end > c->busy_first))
        return 0;
    if (wanted(c, first, end)) {
        uint64_t slot = c->put % c->nr_aside;
        c->aside[slot].first = first;
        bits_take(c->todo, first, end, c->aside[slot].bits);
        ram_copy(c->data + slot * c->unit * PAGE_SIZE, ram_page(c->ram, first),
                 c->unit * PAGE_SIZE);
        c->put++;
        c->counts.aside += c->unit;
        pthread_cond_broadcast(&c->changed);
    }
    bitmap_fill(c->armed, first, c->unit, false);
    return unprotect(c, first, end, err);
}

static int faults_take(struct capture *c, struct error *err)
{
    uint64_t pages[UFFD_BATCH];
    unsigned nr;
    int ret = uffd_faults(c->uffd, c->ram, pages, &nr, err);
    uint64_t begin = time_ns();
    pthread_mutex_lock(&c->lock);
    for (unsigned i = 0; i < nr && !ret; i++) {
        c->counts.faults += c->frozen;
        ret = fault_serve(c, pages[i], err);
        c->counts.fault_ns += time_ns() - begin + FAULT_WAY_NS;
    }
    pthread_mutex_unlock(&c->lock);
    return ret;
}

static void *fault_main(void *arg)
{
    struct capture *c = arg;
    struct error err = {0};
    int ret = 0;
    while (!ret) {
        struct pollfd p[2] = {{.fd = c->uffd, .events = POLLIN},
                              {.fd = c->stop_fd, .events = POLLIN}};
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            ret = error_errno(&err, "poll");
        else if (p[1].revents)
            return NULL;
        else if (p[0].revents)
            ret = faults_take(c, &err);
    }
    pthread_mutex_lock(&c->lock);
    c->failure = ret;
    c->err = err;
    pthread_mutex_unlock(&c->lock);
    // Nobody serves faults any more: the guest must not wait for ever. After the word about it, so
    // that no drain takes what is written from here on for the instant's.
    uffd_unregister(c->uffd, c->ram->map, c->ram->size);
    return NULL;
}

// --- draining

// The pages of `bits`, counted from `first` on; their bytes from `data` on.
static int give(const struct capture_sink *sink, uint64_t first, const uint64_t *bits,
                uint64_t pages, const uint8_t *data, struct error *err)
{
    for (uint64_t p = 0;;) {
        p = bitmap_find(bits, pages, p, true);
        if (p == pages)
            return 0;
        uint64_t end = bitmap_find(bits, pages, p, false);
        int ret = sink->pages(sink->context, first + p, end - p, data + p * PAGE_SIZE, err);
        if (ret)
            return ret;
        p = end;
    }
}

// Under the lock, which it gives up meanwhile. What is aside first: the guest may wait for room.
static int drain_aside(struct capture *c, const struct capture_sink *sink, struct error *err)
{
    while (c->taken < c->put) {
        const uint64_t slot = c->taken % c->nr_aside;
        const struct aside *a = &c->aside[slot];
        pthread_mutex_unlock(&c->lock);
        int ret = give(sink, a->first, a->bits, c->unit, c->data + slot * c->unit * PAGE_SIZE, err);
        pthread_mutex_lock(&c->lock);
        if (ret)
            return ret;
        c->left -= bitmap_count(a->bits, c->unit);
        c->taken++;
        pthread_cond_broadcast(&c->changed);
    }
    return 0;
}

// Under the lock, which it gives up meanwhile.
static int drain_step(struct capture *c, const struct capture_sink *sink, uint64_t page,
                      struct error *err)
{
    uint64_t first = align_down(page, c->step), end = first + c->step;
    uint64_t bits[HUGE_PAGES / 64];
    end = end < c->ram->pages ? end : c->ram->pages;
    bits_take(c->todo, first, end, bits);
    c->busy_first = first;
    c->busy_end = end;
    pthread_mutex_unlock(&c->lock);
    ram_copy(c->bounce, ram_page(c->ram, first), (end - first) * PAGE_SIZE);
    pthread_mutex_lock(&c->lock);
    c->busy_first = c->busy_end = 0;
    bitmap_fill(c->armed, first, end - first, false);
    int ret = unprotect(c, first, end, err);
    pthread_mutex_unlock(&c->lock);
    if (!ret)
        ret = give(sink, first, bits, end - first, c->bounce, err);
    pthread_mutex_lock(&c->lock);
    c->left -= bitmap_count(bits, end - first);
    return ret;
}

static int drain_zero(struct capture *c, const struct capture_sink *sink, struct error *err)
{
    uint64_t pages = c->ram->pages;
    for (uint64_t first = 0;;) {
        first = bitmap_find(c->zero, pages, first, true);
        if (first == pages)
            return 0;
        uint64_t end = bitmap_find(c->zero, pages, first, false);
        int ret = sink->zero(sink->context, first, end - first, err);
        if (ret)
            return ret;
        pthread_mutex_lock(&c->lock);
        c->left -= end - first;
        pthread_mutex_unlock(&c->lock);
        first = end;
    }
}

int capture_drain(struct capture *c, const struct capture_sink *sink, const _Atomic bool *cancelled,
                  struct error *err)
{
    int ret = drain_zero(c, sink, err);
    uint64_t page = 0, pages = c->ram->pages;
    pthread_mutex_lock(&c->lock);
    while (!ret) {
        ret = drain_aside(c, sink, err);
        if (!ret && c->failure) {
            ret = c->failure;
            *err = c->err;
        }
        if (!ret && cancelled && atomic_load(cancelled))
            ret = error_set(err, -ECANCELED, "snapshot cancelled");
        page = bitmap_find(c->todo, pages, page, true);
        if (ret || page == pages)
            break;
        ret = drain_step(c, sink, page, err);
    }
    pthread_mutex_unlock(&c->lock);
    return ret;
}

uint64_t capture_left(struct capture *c)
{
    pthread_mutex_lock(&c->lock);
    uint64_t left = c->left;
    pthread_mutex_unlock(&c->lock);
    return left;
}

void capture_counts(struct capture *c, struct capture_counts *counts)
{
    pthread_mutex_lock(&c->lock);
    *counts = c->counts;
    pthread_mutex_unlock(&c->lock);
}

// --- life

static int capture_open(struct capture *c, struct error *err)
{
    struct ram *ram = c->ram;
    struct scan_region none;
    struct scan_arg probe = {.size = sizeof(probe),
                             .start = (uintptr_t)ram->map,
                             .end = (uintptr_t)ram->map + PAGE_SIZE,
                             .vec = (uintptr_t)&none,
                             .vec_len = 1,
                             .category_mask = SCAN_PRESENT,
                             .return_mask = SCAN_PRESENT};
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    if (ram->memfd >= 0 || ram->file_mapped)
        features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    c->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    bool scans = c->pagemap_fd >= 0 && ioctl(c->pagemap_fd, SCAN_IOCTL, &probe) >= 0;
    if (!scans && c->pagemap_fd >= 0) {
        close(c->pagemap_fd);
        c->pagemap_fd = -1;
    }
    if (ram->memfd < 0 && !scans) // then pages that do not exist must be protected, too
        features |= FEATURE_WP_UNPOPULATED;
    c->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->stop_fd < 0)
        return error_errno(err, "eventfd");
    int ret = uffd_open(&c->uffd, "a snapshot of a running guest", features, err);
    return ret ? ret
               : uffd_register(c->uffd, ram->map, ram->size, UFFDIO_REGISTER_MODE_WP,
                               1ull << _UFFDIO_WRITEPROTECT, err);
}

static int capture_alloc(struct capture *c, struct error *err)
{
    c->unit = c->ram->unit / PAGE_SIZE;
    c->step = c->unit > TAKE_PAGES ? c->unit : TAKE_PAGES;
    c->nr_aside = ASIDE_BYTES / (c->unit * PAGE_SIZE);
    c->armed = calloc(ram_bitmap_words(c->ram), 8);
    c->known = calloc(ram_bitmap_words(c->ram), 8);
    c->aside = calloc(c->nr_aside, sizeof(*c->aside));
    c->data = malloc(ASIDE_BYTES);
    c->bounce = malloc(c->step * PAGE_SIZE);
    return c->armed && c->known && c->aside && c->data && c->bounce
               ? 0
               : error_set(err, -ENOMEM, "no memory for a snapshot of a running guest");
}

int capture_create(struct capture **out, struct ram *ram, const uint64_t *pages, struct error *err)
{
    uint64_t begin = time_ns();
    struct capture *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for a snapshot");
    *c = (struct capture) {.ram = ram, .uffd = -1, .stop_fd = -1, .pagemap_fd = -1};
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    int ret = capture_alloc(c, err);
    if (!ret)
        ret = capture_open(c, err);
    if (!ret) {
        ram_discard_block(ram);
        c->discards_blocked = true;
        ret = -pthread_create(&c->thread, NULL, fault_main, c);
        c->started = !ret;
        if (ret)
            error_set(err, ret, "snapshot: cannot start a thread");
    }
    if (!ret)
        ret = arm_all(c, pages, err);
    c->counts.arm_ns = time_ns() - begin;
    if (ret) {
        capture_free(c);
        return ret;
    }
    *out = c;
    return 0;
}

void capture_free(struct capture *c)
{
    if (!c)
        return;
    if (c->started) {
        pthread_mutex_lock(&c->lock);
        c->stop = true;
        pthread_cond_broadcast(&c->changed);
        pthread_mutex_unlock(&c->lock);
        eventfd_write(c->stop_fd, 1);
        pthread_join(c->thread, NULL);
    }
    if (c->uffd >= 0) {
        uffd_unregister(c->uffd, c->ram->map, c->ram->size);
        close(c->uffd);
    }
    if (c->discards_blocked)
        ram_discard_unblock(c->ram);
    if (c->stop_fd >= 0)
        close(c->stop_fd);
    if (c->pagemap_fd >= 0)
        close(c->pagemap_fd);
    free(c->known);
    free(c->armed);
    free(c->todo);
    free(c->zero);
    free(c->aside);
    free(c->data);
    free(c->bounce);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
    free(c);
}
