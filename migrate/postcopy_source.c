// SPDX-License-Identifier: Apache-2.0
// Post-copy, the side that has the pages: one thread answers page requests on a connection of its
// own, the migrating thread pushes the rest. Each page is claimed in `todo` under the lock, so it
// is sent once; a request for a page already claimed finds it in flight and changes nothing.
#include <errno.h>
#include <string.h>

#include "migrate/bitmap.h"
#include "migrate/outgoing.h"
#include "migrate/pushorder.h"

// Pushed at a time: what a demanded page may find queued before it in this host's send path.
#define PUSH_PAGES 64

struct postcopy_source {
    struct outgoing *out;
    pthread_t thread;
    pthread_mutex_t lock; // guards out->todo and order
    struct pushorder order;
    struct page_batch *batch; // of the demand thread
    uint64_t demanded;        // pages sent on request
    uint64_t demanded_zero;
    bool ended;  // the thread has been joined
    int failure; // of the thread; read after it has ended
    struct error err;
};

static int compare_pages(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int answer_want(struct postcopy_source *ps, const uint64_t *pages, unsigned nr,
                       struct error *err)
{
    struct outgoing *out = ps->out;
    page_batch_reset(ps->batch, &out->vm->ram);
    for (unsigned i = 0; i < nr; i++) {
        pthread_mutex_lock(&ps->lock);
        bool mine = bitmap_test(out->todo, pages[i]);
        if (mine)
            bitmap_clear(out->todo, pages[i]);
        ps->order.ops->fault(&ps->order, pages[i]);
        pthread_mutex_unlock(&ps->lock);
        if (mine) // WIRE_WANT_MAX pages always fit into an empty record
            page_batch_add(ps->batch, pages[i], page_is_zero(ram_page(&out->vm->ram, pages[i])));
    }
    ps->demanded += ps->batch->nr_data;
    ps->demanded_zero += ps->batch->nr_zero;
    return page_batch_put(ps->batch, &out->demand.wire, 0, err);
}

static void *demand_main(void *arg)
{
    struct postcopy_source *ps = arg;
    struct outgoing *out = ps->out;
    struct wire_record record = {0};
    uint64_t pages[WIRE_WANT_MAX];
    unsigned nr;
    int ret = 0;
    while (!ret) {
        ret = wire_expect(&out->demand.wire, &record, WIRE_WANT, &ps->err);
        if (!ret)
            ret = wire_want_parse(&record, out->vm->ram.pages, pages, &nr, &ps->err);
        if (ret)
            break;
        qsort(pages, nr, sizeof(pages[0]), compare_pages);
        ret = answer_want(ps, pages, nr, &ps->err);
    }
    wire_record_free(&record);
    ps->failure = ret;
    // While pages are owed, a dead demand connection is a dead migration: the pusher must notice.
    if (ret != -ENODATA)
        channel_shutdown(&out->main);
    return NULL;
}

int postcopy_discard(struct outgoing *out, struct error *err)
{
    uint64_t pages = out->vm->ram.pages;
    autofree uint8_t *meta =
        malloc(sizeof(struct wire_discard) + WIRE_DISCARD_WORDS * sizeof(uint64_t));
    if (!meta)
        return error_set(err, -ENOMEM, "no memory for the list of discarded pages");
    int ret = 0;
    for (uint64_t first = 0; !ret && first < pages; first += WIRE_DISCARD_WORDS * 64ull) {
        uint64_t left = pages - first;
        uint64_t n = left < WIRE_DISCARD_WORDS * 64ull ? left : WIRE_DISCARD_WORDS * 64ull;
        struct wire_discard head = {.first = first, .pages = n};
        memcpy(meta, &head, sizeof(head));
        memcpy(meta + sizeof(head), out->todo + first / 64, bitmap_words(n) * 8);
        ret = wire_put(&out->main.wire, WIRE_DISCARD, 0, meta, sizeof(head) + bitmap_words(n) * 8,
                       NULL, 0, err);
    }
    return ret;
}

int postcopy_begin(struct outgoing *out, struct error *err)
{
    int ret = postcopy_discard(out, err);
    if (ret)
        return ret;
    struct postcopy_source *ps = calloc(1, sizeof(*ps));
    struct page_batch *batch = malloc(sizeof(*batch));
    if (!ps || !batch) {
        free(ps);
        free(batch);
        return error_set(err, -ENOMEM, "no memory for post-copy");
    }
    ps->out = out;
    ps->batch = batch;
    pthread_mutex_init(&ps->lock, NULL);
    pushorder_init(&ps->order, &pushorder_plain, out->vm->ram.pages);
    // The destination asks when its guest needs something: silence is no failure here. A dead peer
    // is found by the main connection.
    out->demand.timeout_ms = 0;
    out->demand.cancel_fd = -1; // a cancel is seen on the main connection, while it has effect
    ret = pthread_create(&ps->thread, NULL, demand_main, ps);
    if (ret) {
        free(batch);
        free(ps);
        return error_set(err, -ret, "post-copy: cannot start a thread");
    }
    out->postcopy = ps;
    return 0;
}

// Claims pages in push order until the record has PUSH_PAGES pages of data or the order jumps back.
static void claim(struct postcopy_source *ps, struct page_batch *batch)
{
    struct ram *ram = &ps->out->vm->ram;
    uint64_t end = 0;
    while (batch->nr_data < PUSH_PAGES && batch->nr_runs < WIRE_RUNS_MAX - PUSH_PAGES) {
        uint64_t first;
        pthread_mutex_lock(&ps->lock);
        uint64_t n =
            ps->order.ops->next(&ps->order, ps->out->todo, PUSH_PAGES - batch->nr_data, &first);
        bool fits = n && first >= end;
        if (fits)
            bitmap_fill(ps->out->todo, first, n, false);
        pthread_mutex_unlock(&ps->lock);
        if (!fits)
            return;
        for (uint64_t p = first; p < first + n; p++)
            page_batch_add(batch, p, page_known_zero(&ps->out->presence, ram, p));
        end = first + n;
    }
}

static int push_all(struct outgoing *out, struct error *err)
{
    struct postcopy_source *ps = out->postcopy;
    uint64_t start = time_ns(), report_at = start;
    struct wire_end end = {0};
    int ret = 0;
    do {
        page_batch_reset(out->batch, &out->vm->ram);
        claim(ps, out->batch);
        ret = page_batch_put(out->batch, &out->main.wire, 0, err);
        end.data_pages += out->batch->nr_data;
        end.zero_pages += out->batch->nr_zero;
        if (time_ns() >= report_at) {
            pthread_mutex_lock(&ps->lock);
            uint64_t left = bitmap_count(out->todo, out->vm->ram.pages);
            pthread_mutex_unlock(&ps->lock);
            outgoing_progress(out, MIGRATE_PUSHING, left * PAGE_SIZE);
            report_at = time_ns() + 200000000;
        }
    } while (!ret && out->batch->nr_runs);

    if (!ret)
        ret = wire_put(&out->main.wire, WIRE_END, 0, &end, sizeof(end), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&out->main.wire, &out->record, WIRE_COMPLETE, err);
    if (ret)
        return ret;
    struct wire_times times;
    wire_fixed(&out->record, &times, sizeof(times));
    out->report->postcopy_ns = time_ns() - start;
    out->report->faults = times.faults;
    out->report->requests = times.requested;
    out->report->pushed_pages = end.data_pages;
    out->report->zero_pages += end.zero_pages;
    return 0;
}

// When the demand connection broke first, its error is the cause and the main one's a consequence.
int postcopy_push(struct outgoing *out, struct error *err)
{
    struct postcopy_source *ps = out->postcopy;
    int ret = push_all(out, err);
    if (!ret)
        return 0;
    channel_shutdown(&out->demand);
    pthread_join(ps->thread, NULL);
    ps->ended = true;
    if (ps->failure != -ENODATA) {
        *err = ps->err;
        ret = ps->failure;
    }
    return ret;
}

void postcopy_end(struct outgoing *out)
{
    struct postcopy_source *ps = out->postcopy;
    if (!ps)
        return;
    channel_shutdown(&out->demand);
    if (!ps->ended)
        pthread_join(ps->thread, NULL);
    out->report->demand_pages = ps->demanded;
    out->report->data_pages += out->report->pushed_pages + ps->demanded;
    out->report->zero_pages += ps->demanded_zero;
    pthread_mutex_destroy(&ps->lock);
    free(ps->batch);
    free(ps);
    out->postcopy = NULL;
}
