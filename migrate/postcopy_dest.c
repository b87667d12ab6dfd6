// SPDX-License-Identifier: Apache-2.0
#include "migrate/postcopy_dest.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "migrate/bitmap.h"
#include "migrate/blockpost.h"
#include "migrate/crc32c.h"
#include "migrate/pages.h"
#include "migrate/userfault.h"

enum {
    WAITS_MAX = 256, // requests whose latency is measured at a time: more than there are vCPUs
};

struct wait {
    uint64_t page, since;
};

struct postcopy_dest {
    struct ram *ram;
    struct channel *demand;
    struct block_intake *disks;
    int uffd;
    int stop_fd;
    pthread_t fault_thread, demand_thread;
    bool fault_started, demand_started;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    uint64_t *have;  // content is here: placed, or zero and placed at the first touch
    uint64_t *asked; // requested, not yet here
    uint64_t missing, arrived;
    uint64_t faults, requested;
    struct wait waits[WAITS_MAX];
    unsigned nr_waits;
    struct wire_faults latency;
    unsigned load_ms; // how long a page may take to come while the state is loaded
    bool loaded;      // from now on nobody but the source can help who waits for a page
    int failure;      // of the fault or the demand thread
    struct error err;
};

// --- placing

static int place_zero(struct postcopy_dest *pd, uint64_t page, struct error *err)
{
    return uffd_zero(pd->uffd, ram_page(pd->ram, page), PAGE_SIZE, err);
}

// Under the lock: who asked for the page has it now.
static void served(struct postcopy_dest *pd, uint64_t page)
{
    for (unsigned i = 0; i < pd->nr_waits; i++) {
        if (pd->waits[i].page != page)
            continue;
        uint64_t ns = time_ns() - pd->waits[i].since;
        pd->latency.count[wire_latency_bucket(ns)]++;
        pd->latency.total_ns += ns;
        pd->latency.max_ns = ns > pd->latency.max_ns ? ns : pd->latency.max_ns;
        pd->waits[i] = pd->waits[--pd->nr_waits];
        return;
    }
}

// Under the lock.
static void arrived(struct postcopy_dest *pd, uint64_t page)
{
    if (bitmap_test(pd->asked, page))
        served(pd, page);
    if (!bitmap_test(pd->have, page)) {
        bitmap_set(pd->have, page);
        pd->missing--;
        pd->arrived++;
    }
    bitmap_clear(pd->asked, page);
}

// Zero pages are placed when they are touched; whoever waits for one already gets it now.
static int take_zero_run(struct postcopy_dest *pd, const struct wire_run *run, struct error *err)
{
    int ret = 0;
    pthread_mutex_lock(&pd->lock);
    for (uint64_t p = run->first; !ret && p < run->first + run->count; p++) {
        if (bitmap_test(pd->asked, p))
            ret = place_zero(pd, p, err);
        arrived(pd, p);
    }
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

static int take_data_run(struct postcopy_dest *pd, const struct wire_run *run, const uint8_t *data,
                         struct error *err)
{
    for (uint64_t p = 0; p < run->count;) {
        uint64_t n = ram_contiguous(pd->ram, run->first + p);
        n = n < run->count - p ? n : run->count - p;
        int ret = uffd_copy(pd->uffd, ram_page(pd->ram, run->first + p), data + p * PAGE_SIZE,
                            n * PAGE_SIZE, err);
        if (ret)
            return ret;
        p += n;
    }
    pthread_mutex_lock(&pd->lock);
    for (uint64_t p = run->first; p < run->first + run->count; p++)
        arrived(pd, p);
    pthread_mutex_unlock(&pd->lock);
    return 0;
}

static int check_run(struct postcopy_dest *pd, const struct wire_run *run, struct error *err)
{
    pthread_mutex_lock(&pd->lock);
    uint64_t end = run->first + run->count;
    uint64_t twice = bitmap_find(pd->have, end, run->first, true);
    pthread_mutex_unlock(&pd->lock);
    if (twice != end)
        return error_set(err, -EPROTO, "page %llu sent though the guest has it already",
                         (unsigned long long)twice);
    return 0;
}

int postcopy_dest_place(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                        void *buffer, struct error *err)
{
    struct wire_pages_view view;
    int ret = wire_pages_parse(record, pd->ram->pages, &view, err);
    if (!ret)
        ret = wire_read(w, buffer, view.head.nr_data * PAGE_SIZE, err);
    const uint8_t *data = buffer;
    for (uint32_t i = 0; !ret && i < view.head.nr_data; i++)
        if (page_sum(data + i * PAGE_SIZE) != wire_pages_sum(&view, i))
            ret = error_set(err, -EBADMSG, "%s at byte %llu: page data damaged", w->name,
                            (unsigned long long)record->offset);
    for (uint32_t i = 0; !ret && i < view.head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(&view, i);
        ret = check_run(pd, &run, err);
        if (ret)
            break;
        if (run.kind == WIRE_RUN_ZERO) {
            ret = take_zero_run(pd, &run, err);
        } else {
            ret = take_data_run(pd, &run, data, err);
            data += run.count * PAGE_SIZE;
        }
    }
    pthread_mutex_lock(&pd->lock);
    pthread_cond_broadcast(&pd->changed);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

int postcopy_dest_late(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                       void *buffer, struct error *err)
{
    int ret = block_late_take(pd->disks, w, record, buffer, err);
    pthread_mutex_lock(&pd->lock);
    pd->arrived++;
    pthread_cond_broadcast(&pd->changed);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

// --- faults

// Whoever loads the state may wait for a page, in the kernel, and would wait for ever. What it then
// reads instead does not matter: a guest that has not been loaded well is discarded.
static void dest_failed(struct postcopy_dest *pd, int ret, const struct error *err)
{
    pthread_mutex_lock(&pd->lock);
    if (!pd->failure) {
        pd->failure = ret;
        pd->err = *err;
        if (!pd->loaded)
            uffd_unregister(pd->uffd, pd->ram->map, pd->ram->size);
    }
    pthread_cond_broadcast(&pd->changed);
    pthread_mutex_unlock(&pd->lock);
}

// Decides what a fault needs: nothing (asked already), its zero page, or a request (appended).
static int fault_sort(struct postcopy_dest *pd, uint64_t page, uint64_t *want, unsigned *nr,
                      struct error *err)
{
    pthread_mutex_lock(&pd->lock);
    bool have = bitmap_test(pd->have, page);
    pd->faults++;
    if (!have && !bitmap_test(pd->asked, page)) {
        bitmap_set(pd->asked, page);
        if (pd->nr_waits < WAITS_MAX)
            pd->waits[pd->nr_waits++] = (struct wait) {page, time_ns()};
        pd->requested++;
        want[(*nr)++] = page;
    }
    pthread_mutex_unlock(&pd->lock);
    // A page that was placed meanwhile answers EEXIST, and who waits is woken.
    return have ? place_zero(pd, page, err) : 0;
}

static int faults_take(struct postcopy_dest *pd, struct error *err)
{
    uint64_t pages[UFFD_BATCH];
    unsigned nr;
    struct {
        struct wire_want head;
        uint64_t pages[UFFD_BATCH];
    } want = {0};
    int ret = uffd_faults(pd->uffd, pd->ram, pages, &nr, err);
    for (unsigned i = 0; i < nr && !ret; i++)
        ret = fault_sort(pd, pages[i], want.pages, &want.head.nr, err);
    if (ret || !want.head.nr)
        return ret;
    return wire_put(&pd->demand->wire, WIRE_WANT, 0, &want,
                    sizeof(want.head) + want.head.nr * sizeof(want.pages[0]), NULL, 0, err);
}

// Only while the state is loaded; a guest may wait for long, and the main connection has a
// time-out.
static int waits_check(struct postcopy_dest *pd, struct error *err)
{
    int ret = 0;
    uint64_t now = time_ns();
    pthread_mutex_lock(&pd->lock);
    for (unsigned i = 0; i < pd->nr_waits && !pd->loaded && !ret; i++)
        if (now - pd->waits[i].since >= pd->load_ms * 1000000ull)
            ret = error_set(err, -ETIMEDOUT, "page %llu did not come for %u ms",
                            (unsigned long long)pd->waits[i].page, pd->load_ms);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

static bool is_loaded(struct postcopy_dest *pd)
{
    pthread_mutex_lock(&pd->lock);
    bool loaded = pd->loaded;
    pthread_mutex_unlock(&pd->lock);
    return loaded;
}

// A request of the guest waits for a block, or the guest has written the last one that was missing.
static int blocks_woke(struct postcopy_dest *pd, struct error *err)
{
    int ret = block_late_ask(pd->disks, &pd->demand->wire, false, err);
    pthread_mutex_lock(&pd->lock);
    pthread_cond_broadcast(&pd->changed);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

static void *fault_main(void *arg)
{
    struct postcopy_dest *pd = arg;
    thread_prompt();
    struct error err = {0};
    int ret = 0;
    while (!ret) {
        struct pollfd p[3] = {{.fd = pd->uffd, .events = POLLIN},
                              {.fd = pd->stop_fd, .events = POLLIN},
                              {.fd = block_late_fd(pd->disks), .events = POLLIN}};
        int n = poll(p, 3, is_loaded(pd) ? -1 : (int)pd->load_ms);
        if (n < 0 && errno != EINTR)
            ret = error_errno(&err, "poll");
        else if (n <= 0)
            ret = waits_check(pd, &err);
        else if (p[1].revents)
            break;
        else if (p[0].revents) // pages first: a vCPU stands still for one
            ret = faults_take(pd, &err);
        else if (p[2].revents)
            ret = blocks_woke(pd, &err);
    }
    if (ret)
        dest_failed(pd, ret, &err);
    return NULL;
}

static void *demand_main(void *arg)
{
    struct postcopy_dest *pd = arg;
    struct wire_record record = {0};
    struct error err = {0};
    thread_prompt();
    void *buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
    int ret = buffer ? 0 : error_set(&err, -ENOMEM, "no memory to receive pages");
    while (!ret) {
        ret = wire_get(&pd->demand->wire, &record, &err);
        if (!ret && record.header.type == WIRE_LATE)
            ret = postcopy_dest_late(pd, &pd->demand->wire, &record, buffer, &err);
        else if (!ret && record.header.type == WIRE_PAGES)
            ret = postcopy_dest_place(pd, &pd->demand->wire, &record, buffer, &err);
        else if (!ret)
            ret = wire_unexpected(&pd->demand->wire, &record, "pages", &err);
    }
    dest_failed(pd, ret, &err); // also the ordinary end: nobody looks at it then
    free(buffer);
    wire_record_free(&record);
    return NULL;
}

// --- life

static int guard(struct postcopy_dest *pd, struct error *err)
{
    struct ram *ram = pd->ram;
    int ret =
        uffd_register(pd->uffd, ram->map, ram->size, UFFDIO_REGISTER_MODE_MISSING,
                      1ull << _UFFDIO_COPY | 1ull << _UFFDIO_ZEROPAGE | 1ull << _UFFDIO_WAKE, err);
    if (ret) {
        error_prefix(err, "post-copy");
        return ret;
    }
    // Guarded first, dropped second: nothing can slip in between.
    for (uint64_t first = 0;;) {
        first = bitmap_find(pd->have, ram->pages, first, false);
        if (first == ram->pages)
            return 0;
        uint64_t end = bitmap_find(pd->have, ram->pages, first, true);
        ret = ram_drop(ram, first, end - first, err);
        if (ret)
            return ret;
        first = end;
    }
}

static int threads_start(struct postcopy_dest *pd, struct error *err)
{
    pd->demand->timeout_ms = 0; // the guest may need nothing for long
    channel_quick(pd->demand);
    int ret = pthread_create(&pd->fault_thread, NULL, fault_main, pd);
    pd->fault_started = !ret;
    if (!ret) {
        ret = pthread_create(&pd->demand_thread, NULL, demand_main, pd);
        pd->demand_started = !ret;
    }
    return ret ? error_set(err, -ret, "post-copy: cannot start a thread") : 0;
}

static int dest_start(struct postcopy_dest *pd, struct error *err)
{
    pd->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (pd->stop_fd < 0)
        return error_errno(err, "eventfd");
    int ret = uffd_open(&pd->uffd, "post-copy", 0, err);
    if (!ret)
        ret = guard(pd, err);
    return ret ? ret : threads_start(pd, err);
}

static int ask_again(struct postcopy_dest *pd, struct error *err)
{
    struct {
        struct wire_want head;
        uint64_t pages[WIRE_WANT_MAX];
    } want;
    uint64_t page = 0, pages = pd->ram->pages;
    for (;;) {
        want.head = (struct wire_want) {0};
        while (want.head.nr < WIRE_WANT_MAX &&
               (page = bitmap_find(pd->asked, pages, page, true)) < pages)
            want.pages[want.head.nr++] = page++;
        if (!want.head.nr)
            return 0;
        int ret = wire_put(&pd->demand->wire, WIRE_WANT, 0, &want,
                           sizeof(want.head) + want.head.nr * sizeof(want.pages[0]), NULL, 0, err);
        if (ret)
            return ret;
    }
}

int postcopy_dest_resume(struct postcopy_dest *pd, struct error *err)
{
    eventfd_t drained;
    eventfd_read(pd->stop_fd, &drained);
    pd->failure = 0; // no thread looks at it now
    int ret = ask_again(pd, err);
    if (!ret)
        ret = block_late_ask(pd->disks, &pd->demand->wire, true, err);
    return ret ? ret : threads_start(pd, err);
}

int postcopy_dest_create(struct postcopy_dest **out, struct ram *ram, const uint64_t *valid,
                         struct channel *demand, struct block_intake *disks, struct error *err)
{
    struct postcopy_dest *pd = calloc(1, sizeof(*pd));
    if (!pd)
        return error_set(err, -ENOMEM, "no memory for post-copy");
    size_t words = ram_bitmap_words(ram);
    *pd = (struct postcopy_dest) {
        .ram = ram, .demand = demand, .disks = disks, .uffd = -1, .stop_fd = -1};
    pd->load_ms = demand->timeout_ms;
    ram_discard_block(ram); // a page given back now would be asked for again
    atomic_store(&ram->missing, true);
    pthread_mutex_init(&pd->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&pd->changed, &attr);
    pthread_condattr_destroy(&attr);
    pd->have = calloc(words, 8);
    pd->asked = calloc(words, 8);
    int ret = pd->have && pd->asked ? 0 : error_set(err, -ENOMEM, "no memory for post-copy");
    if (!ret) {
        memcpy(pd->have, valid, words * 8);
        pd->missing = ram->pages - bitmap_count(pd->have, ram->pages);
        ret = dest_start(pd, err);
    }
    if (ret) {
        postcopy_dest_free(pd);
        return ret;
    }
    *out = pd;
    return 0;
}

int postcopy_dest_loaded(struct postcopy_dest *pd, struct error *err)
{
    pthread_mutex_lock(&pd->lock);
    int ret = pd->failure;
    pd->loaded = !ret;
    if (ret)
        error_set(err, ret, "while the guest was loaded: %s", pd->err.text);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

int postcopy_dest_wait(struct postcopy_dest *pd, unsigned timeout_ms, struct error *err)
{
    int ret = 0;
    pthread_mutex_lock(&pd->lock);
    while ((pd->missing || block_late_missing(pd->disks)) && !pd->failure && !ret) {
        uint64_t before = pd->arrived;
        struct timespec end = time_deadline(timeout_ms);
        int late = pthread_cond_timedwait(&pd->changed, &pd->lock, &end);
        if (late == ETIMEDOUT && pd->arrived == before)
            ret = error_set(err, -ETIMEDOUT, "%llu pages and %llu blocks have not come",
                            (unsigned long long)pd->missing,
                            (unsigned long long)block_late_missing(pd->disks));
    }
    if (!ret && (pd->missing || block_late_missing(pd->disks))) {
        ret = pd->failure;
        if (err)
            *err = pd->err;
    }
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

void postcopy_dest_cause(struct postcopy_dest *pd, struct error *err)
{
    pthread_mutex_lock(&pd->lock);
    if (pd->failure && pd->failure != -ENODATA)
        *err = pd->err;
    pthread_mutex_unlock(&pd->lock);
}

uint64_t postcopy_dest_missing(struct postcopy_dest *pd)
{
    pthread_mutex_lock(&pd->lock);
    uint64_t missing = pd->missing;
    pthread_mutex_unlock(&pd->lock);
    return missing;
}

void postcopy_dest_lacks(struct postcopy_dest *pd, uint64_t *missing)
{
    pthread_mutex_lock(&pd->lock);
    for (size_t i = 0; i < ram_bitmap_words(pd->ram); i++)
        missing[i] = ~pd->have[i];
    if (pd->ram->pages % 64) // no bits beyond the last page
        missing[pd->ram->pages / 64] &= (1ull << pd->ram->pages % 64) - 1;
    pthread_mutex_unlock(&pd->lock);
}

void postcopy_dest_counts(struct postcopy_dest *pd, uint64_t *faults, uint64_t *requested)
{
    pthread_mutex_lock(&pd->lock);
    *faults = pd->faults;
    *requested = pd->requested;
    pthread_mutex_unlock(&pd->lock);
}

void postcopy_dest_latency(struct postcopy_dest *pd, struct wire_faults *latency)
{
    pthread_mutex_lock(&pd->lock);
    *latency = pd->latency;
    pthread_mutex_unlock(&pd->lock);
}

void postcopy_dest_stop(struct postcopy_dest *pd)
{
    if (pd->demand_started) // before the joins: either thread may be waiting on it
        channel_shutdown(pd->demand);
    if (pd->fault_started) {
        eventfd_write(pd->stop_fd, 1);
        pthread_join(pd->fault_thread, NULL);
        pd->fault_started = false;
    }
    if (pd->demand_started) {
        pthread_join(pd->demand_thread, NULL);
        pd->demand_started = false;
    }
}

void postcopy_dest_free(struct postcopy_dest *pd)
{
    if (!pd)
        return;
    postcopy_dest_stop(pd);
    if (pd->uffd >= 0)
        close(pd->uffd); // unregisters, wakes
    atomic_store(&pd->ram->missing, false);
    ram_discard_unblock(pd->ram);
    if (pd->stop_fd >= 0)
        close(pd->stop_fd);
    free(pd->have);
    free(pd->asked);
    pthread_cond_destroy(&pd->changed);
    pthread_mutex_destroy(&pd->lock);
    free(pd);
}
