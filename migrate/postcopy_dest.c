// SPDX-License-Identifier: Apache-2.0
#include "migrate/postcopy_dest.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>

#include "migrate/blockpost.h"
#include "migrate/crc32c.h"
#include "migrate/landing.h"
#include "migrate/pages.h"
#include "migrate/userfault.h"
#include "vmm/bitmap.h"

enum {
    WAITS_MAX = 256, // requests whose latency is measured at a time: more than there are vCPUs
};

struct wait {
    uint64_t page, since;
};

struct postcopy_dest {
    struct ram *ram;
    struct channel *demand;
    struct landing landing;
    struct block_intake *disks;
    int stop_fd;
    pthread_t fault_thread, demand_thread;
    bool fault_started, demand_started;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    uint64_t *have;   // content is here: placed, or zero and placed at the first touch
    uint64_t *asked;  // requested, not yet here
    uint64_t *coming; // somebody is about to place it
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

// Under the lock: who asked for a page of these, which are shown, has it now.
static void served(struct postcopy_dest *pd, uint64_t first, uint64_t count)
{
    uint64_t now = pd->nr_waits ? time_ns() : 0;
    for (unsigned i = 0; i < pd->nr_waits;) {
        if (pd->waits[i].page < first || pd->waits[i].page - first >= count) {
            i++;
            continue;
        }
        uint64_t ns = now - pd->waits[i].since;
        pd->latency.count[wire_latency_bucket(ns)]++;
        pd->latency.total_ns += ns;
        pd->latency.max_ns = ns > pd->latency.max_ns ? ns : pd->latency.max_ns;
        pd->waits[i] = pd->waits[--pd->nr_waits];
    }
}

// Under the lock.
static void arrived(struct postcopy_dest *pd, uint64_t page)
{
    if (!bitmap_test(pd->have, page)) {
        bitmap_set(pd->have, page);
        pd->missing--;
        pd->arrived++;
    }
    bitmap_clear(pd->asked, page);
    bitmap_clear(pd->coming, page);
}

// Pages of one unit that lie where the guest will find them. From the moment they count as here
// only its own memory is newer than they are; so that comes first, and then they are shown.
static int arrived_in_unit(struct postcopy_dest *pd, uint64_t first, uint64_t count,
                           struct error *err)
{
    bool shown;
    pthread_mutex_lock(&pd->lock);
    // Who waits has asked for all that was missing then.
    bool wanted = bitmap_find(pd->asked, first + count, first, true) < first + count;
    for (uint64_t p = first; p < first + count; p++)
        arrived(pd, p);
    bool whole = landing_whole(&pd->landing, pd->have, first);
    pthread_mutex_unlock(&pd->lock);
    if (!whole)
        return 0;
    int ret = landing_show(&pd->landing, first, &shown, err);
    if (!ret && !shown && wanted)
        ret = landing_serve(&pd->landing, first, err);
    pthread_mutex_lock(&pd->lock);
    served(pd, landing_unit(&pd->landing, first), pd->landing.unit);
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

static int take_run_huge(struct postcopy_dest *pd, const struct wire_run *run, struct error *err)
{
    uint64_t end = run->first + run->count;
    int ret = 0;
    for (uint64_t first = run->first, stop; !ret && first < end; first = stop) {
        stop = landing_unit(&pd->landing, first) + pd->landing.unit;
        stop = stop < end ? stop : end;
        if (run->kind == WIRE_RUN_ZERO)
            landing_clear(&pd->landing, first, stop - first);
        ret = arrived_in_unit(pd, first, stop - first, err);
    }
    return ret;
}

// Zero pages are placed when they are touched; whoever waits for one already gets it now.
static int take_zero_run(struct postcopy_dest *pd, const struct wire_run *run, struct error *err)
{
    int ret = 0;
    pthread_mutex_lock(&pd->lock);
    for (uint64_t p = run->first; !ret && p < run->first + run->count; p++) {
        bool wanted = bitmap_test(pd->asked, p);
        arrived(pd, p);
        if (wanted)
            ret = landing_serve(&pd->landing, p, err);
        if (wanted)
            served(pd, p, 1);
    }
    pthread_mutex_unlock(&pd->lock);
    return ret;
}

static int take_data_run(struct postcopy_dest *pd, const struct wire_run *run, const uint8_t *data,
                         struct error *err)
{
    int ret = landing_copy(&pd->landing, run->first, data, run->count, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&pd->lock);
    for (uint64_t p = run->first; p < run->first + run->count; p++)
        arrived(pd, p);
    served(pd, run->first, run->count);
    pthread_mutex_unlock(&pd->lock);
    return 0;
}

// From here until it is placed nobody else may send it: it would be written over the guest's.
static int claim_run(struct postcopy_dest *pd, const struct wire_run *run, struct error *err)
{
    uint64_t end = run->first + run->count;
    pthread_mutex_lock(&pd->lock);
    uint64_t twice = bitmap_find(pd->have, end, run->first, true);
    uint64_t coming = bitmap_find(pd->coming, end, run->first, true);
    if (twice == end && coming == end)
        bitmap_fill(pd->coming, run->first, run->count, true);
    pthread_mutex_unlock(&pd->lock);
    if (twice != end)
        return error_set(err, -EPROTO, "page %llu sent though the guest has it already",
                         (unsigned long long)twice);
    return coming == end ? 0
                         : error_set(err, -EPROTO, "page %llu sent twice at the same time",
                                     (unsigned long long)coming);
}

// Where each run of data goes: the file behind guest memory, or else the buffer.
static int find_places(struct postcopy_dest *pd, const struct wire_pages_view *view,
                       uint8_t *buffer, struct iovec *iov, unsigned *nr, struct error *err)
{
    for (uint32_t i = 0; i < view->head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(view, i);
        int ret = claim_run(pd, &run, err);
        if (ret)
            return ret;
        if (run.kind == WIRE_RUN_ZERO)
            continue;
        if (pd->landing.second)
            ret = landing_room(&pd->landing, run.first, run.count, err);
        if (ret)
            return ret;
        iov[(*nr)++] =
            (struct iovec) {pd->landing.second ? landing_page(&pd->landing, run.first) : buffer,
                            run.count * PAGE_SIZE};
        buffer += run.count * PAGE_SIZE;
    }
    return 0;
}

static int check_sums(const struct wire *w, const struct wire_record *record,
                      const struct wire_pages_view *view, const struct iovec *iov, unsigned nr,
                      struct error *err)
{
    uint32_t sum = 0;
    for (unsigned i = 0; i < nr; i++)
        for (size_t at = 0; at < iov[i].iov_len; at += PAGE_SIZE)
            if (page_sum((const uint8_t *)iov[i].iov_base + at) != wire_pages_sum(view, sum++))
                return error_set(err, -EBADMSG, "%s at byte %llu: page data damaged", w->name,
                                 (unsigned long long)record->offset);
    return 0;
}

static int place(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                 void *buffer, struct error *err)
{
    struct wire_pages_view view;
    struct iovec places[WIRE_RUNS_MAX], iov[WIRE_RUNS_MAX];
    unsigned nr = 0, data = 0;
    int ret = wire_pages_parse(record, pd->ram->pages, &view, err);
    if (!ret)
        ret = find_places(pd, &view, buffer, places, &nr, err);
    memcpy(iov, places, nr * sizeof(iov[0])); // reading uses it up
    if (!ret && nr)
        ret = w->readv(w, iov, nr, err);
    if (!ret)
        ret = check_sums(w, record, &view, places, nr, err);
    for (uint32_t i = 0; !ret && i < view.head.nr_runs; i++) {
        struct wire_run run = wire_pages_run(&view, i);
        if (pd->landing.second)
            ret = take_run_huge(pd, &run, err);
        else if (run.kind == WIRE_RUN_DATA)
            ret = take_data_run(pd, &run, places[data++].iov_base, err);
        else
            ret = take_zero_run(pd, &run, err);
    }
    return ret;
}

int postcopy_dest_place(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                        void *buffer, struct error *err)
{
    int ret = place(pd, w, record, buffer, err);
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
            landing_unguard(&pd->landing);
    }
    pthread_cond_broadcast(&pd->changed);
    pthread_mutex_unlock(&pd->lock);
}

struct want {
    struct wire_want head;
    uint64_t pages[WIRE_WANT_MAX];
};

static int want_put(struct postcopy_dest *pd, struct want *want, struct error *err)
{
    if (!want->head.nr)
        return 0;
    int ret = wire_put(&pd->demand->wire, WIRE_WANT, 0, want,
                       sizeof(want->head) + want->head.nr * sizeof(want->pages[0]), NULL, 0, err);
    want->head = (struct wire_want) {0};
    return ret;
}

static int want_add(struct postcopy_dest *pd, struct want *want, uint64_t page, struct error *err)
{
    int ret = want->head.nr == WIRE_WANT_MAX ? want_put(pd, want, err) : 0;
    want->pages[want->head.nr++] = page;
    return ret;
}

// Decides what a fault needs: what is here (true), or a request of what is not here and not yet
// asked for: appended to `lack`, `nr` of at most a unit's pages.
static bool fault_sort(struct postcopy_dest *pd, uint64_t page, uint64_t *lack, unsigned *nr)
{
    uint64_t first = landing_unit(&pd->landing, page), end = first + pd->landing.unit;
    pthread_mutex_lock(&pd->lock);
    bool whole = landing_whole(&pd->landing, pd->have, page);
    pd->faults++;
    for (uint64_t p = first; !whole && p < end; p++) {
        if (bitmap_test(pd->have, p) || bitmap_test(pd->asked, p))
            continue;
        bitmap_set(pd->asked, p);
        lack[(*nr)++] = p;
    }
    if (*nr) {
        pd->requested++;
        if (pd->nr_waits < WAITS_MAX)
            pd->waits[pd->nr_waits++] = (struct wait) {first, time_ns()};
    }
    pthread_mutex_unlock(&pd->lock);
    return whole;
}
static int faults_take(struct postcopy_dest *pd, struct error *err)
{
    uint64_t pages[UFFD_BATCH], lack[HUGE_PAGE / PAGE_SIZE];
    unsigned nr, nr_lack;
    struct want want = {0};
    int ret = uffd_faults(pd->landing.uffd, pd->ram, pages, &nr, err);
    for (unsigned i = 0; i < nr && !ret; i++) {
        nr_lack = 0;
        if (fault_sort(pd, pages[i], lack, &nr_lack))
            ret = landing_serve(&pd->landing, pages[i], err);
        for (unsigned k = 0; k < nr_lack && !ret; k++)
            ret = want_add(pd, &want, lack[k], err);
    }
    return ret ? ret : want_put(pd, &want, err);
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
        struct pollfd p[3] = {{.fd = pd->landing.uffd, .events = POLLIN},
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
    int ret = landing_open(&pd->landing, pd->ram, err);
    if (!ret)
        ret = landing_guard(&pd->landing, pd->have, err);
    return ret ? ret : threads_start(pd, err);
}

static int ask_again(struct postcopy_dest *pd, struct error *err)
{
    struct want want = {0};
    int ret = 0;
    uint64_t pages = pd->ram->pages;
    for (uint64_t page = 0; !ret; page++) {
        page = bitmap_find(pd->asked, pages, page, true);
        if (page == pages)
            return want_put(pd, &want, err);
        ret = want_add(pd, &want, page, err);
    }
    return ret;
}

int postcopy_dest_resume(struct postcopy_dest *pd, struct error *err)
{
    eventfd_t drained;
    eventfd_read(pd->stop_fd, &drained);
    pd->failure = 0;                                      // no thread looks at it now
    memset(pd->coming, 0, ram_bitmap_words(pd->ram) * 8); // it comes anew
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
    *pd = (struct postcopy_dest) {.ram = ram,
                                  .demand = demand,
                                  .disks = disks,
                                  .landing = {.uffd = -1},
                                  .stop_fd = -1,
                                  .load_ms = demand->timeout_ms};
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
    pd->coming = calloc(words, 8);
    int ret = pd->have && pd->asked && pd->coming
                  ? 0
                  : error_set(err, -ENOMEM, "no memory for post-copy");
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
    landing_close(&pd->landing);
    atomic_store(&pd->ram->missing, false);
    ram_discard_unblock(pd->ram);
    if (pd->stop_fd >= 0)
        close(pd->stop_fd);
    free(pd->have);
    free(pd->asked);
    free(pd->coming);
    pthread_cond_destroy(&pd->changed);
    pthread_mutex_destroy(&pd->lock);
    free(pd);
}
