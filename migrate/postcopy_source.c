// SPDX-License-Identifier: Apache-2.0
// Post-copy, the side that has the pages: one thread answers page requests on a connection of its
// own, the migrating thread sends the rest in the order of migrate/prepage.h. Each page is claimed
// in `todo` under the lock, so it is sent once; a request for a page already claimed finds it in
// flight and changes nothing.
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "migrate/blockpost.h"
#include "migrate/firsttouch.h"
#include "migrate/outgoing.h"
#include "migrate/switchover.h"
#include "vmm/bitmap.h"

// Pushed at a time: what a demanded page may find queued before it in this host's send path. More
// where the link is so fast that several such records are under way: each wakes threads at both
// ends, and a guest that sweeps through memory stops at the end of each.
#define PUSH_PAGES      64
#define PUSH_PAGES_MAX  128
#define RECORDS_AT_ONCE 4
#define PUSH_BLOCKS     4 // of disks: as much as PUSH_PAGES
// Runs in a pushed record at most: each bubble adds one.
#define PUSH_RUNS 256

// Records under way: the destination echoes each. What is under way cannot be reordered any more,
// and it delays what is asked for, so it is kept near what the link needs to be busy: what it
// delivers in the time of the fastest echo and this, in which a busy host wakes a thread.
#define WINDOW_MIN 2
#define WINDOW_MAX 32
#define QUEUE_NS   2000000ull

#define QUIET_NS 1000000000ull // --prepaging none: so long nobody asks before the rest is pushed

struct postcopy_source {
    struct outgoing *out;
    pthread_t thread;
    pthread_mutex_t lock; // guards out->todo, out->disks' todo, order and asked_ns
    struct prepage order;
    uint64_t asked_ns;        // when the last request came (--prepaging none)
    struct page_batch *batch; // of the demand thread
    uint64_t demanded;        // pages sent on request
    uint64_t demanded_zero;
    uint64_t demanded_blocks;
    uint8_t *blocks[2]; // WIRE_BLOCKS_DATA of the demand thread and the pusher; NULL: no disks
    struct first_touch touch;   // sent before anybody asks
    uint64_t first, first_zero; // how much of that there was
    atomic_bool finished;       // COMPLETE has come
    bool ended;                 // the thread has been joined
    int failure;                // of the thread; read after it has ended
    struct error err;

    // The pusher's.
    unsigned window, under_way;
    unsigned push_pages; // at a time
    struct {
        uint64_t at, bytes, delivered; // delivered: all that was echoed by then
    } sent[WINDOW_MAX];                // records under way, a ring
    uint64_t seq, acked;               // counts
    uint64_t delivered, rate;          // bytes; bytes/s
    uint64_t fastest_ns;               // echo
    uint64_t pushed_blocks;
    struct wire_end end;
};

static int compare_pages(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

// --- pages asked for

static bool claim_one(struct postcopy_source *ps, uint64_t page)
{
    uint64_t *todo = ps->out->todo;
    pthread_mutex_lock(&ps->lock);
    bool mine = bitmap_test(todo, page);
    if (mine) {
        bitmap_clear(todo, page);
        prepage_fault(&ps->order, todo, page);
    }
    if (ps->order.kind == PREPAGE_NONE)
        ps->asked_ns = time_ns();
    pthread_mutex_unlock(&ps->lock);
    history_add(&ps->out->m->history, HISTORY_DEMAND, page, mine, 0);
    return mine;
}

static int answer_want(struct postcopy_source *ps, const uint64_t *pages, unsigned nr,
                       struct error *err)
{
    struct outgoing *out = ps->out;
    page_batch_reset(ps->batch, &out->vm->ram);
    for (unsigned i = 0; i < nr; i++)
        if (claim_one(ps, pages[i])) // WIRE_WANT_MAX pages always fit into an empty record
            page_batch_add(ps->batch, pages[i], page_is_zero(ram_page(&out->vm->ram, pages[i])));
    ps->demanded += ps->batch->nr_data;
    ps->demanded_zero += ps->batch->nr_zero;
    return page_batch_put(ps->batch, &out->demand.wire, 0, err);
}

static int take_want(struct postcopy_source *ps, const struct wire_record *record,
                     struct error *err)
{
    uint64_t pages[WIRE_WANT_MAX];
    unsigned nr;
    int ret = wire_want_parse(record, ps->out->vm->ram.pages, pages, &nr, err);
    if (ret)
        return ret;
    qsort(pages, nr, sizeof(pages[0]), compare_pages);
    return answer_want(ps, pages, nr, err);
}

// One by one: whoever waits for the first need not wait for the last.
static int take_ask(struct postcopy_source *ps, const struct wire_record *record, struct error *err)
{
    struct outgoing *out = ps->out;
    struct block_claim claim = {.nr = 1};
    uint64_t blocks[WIRE_WANT_MAX];
    unsigned nr;
    int ret = block_post_ask_parse(out->disks, record, &claim.disk, blocks, &nr, err);
    for (unsigned i = 0; i < nr && !ret; i++) {
        pthread_mutex_lock(&ps->lock);
        bool mine = block_post_asked(out->disks, claim.disk, blocks[i]);
        pthread_mutex_unlock(&ps->lock);
        claim.first = blocks[i];
        if (mine)
            ret = block_post_put(out->disks, &out->demand.wire, &claim, ps->blocks[0], err);
        ps->demanded_blocks += mine;
    }
    return ret;
}

// Before the guest runs there: what it needs at once.
static int send_first(struct postcopy_source *ps, struct error *err)
{
    struct outgoing *out = ps->out;
    const struct first_touch *f = &ps->touch;
    page_batch_reset(ps->batch, &out->vm->ram);
    pthread_mutex_lock(&ps->lock);
    for (unsigned i = 0; i < f->nr; i++) {
        if (!bitmap_test(out->todo, f->page[i]))
            continue;
        bitmap_clear(out->todo, f->page[i]);
        page_batch_add(ps->batch, f->page[i], page_is_zero(ram_page(&out->vm->ram, f->page[i])));
    }
    pthread_mutex_unlock(&ps->lock);
    ps->first = ps->batch->nr_data;
    ps->first_zero = ps->batch->nr_zero;
    return page_batch_put(ps->batch, &out->demand.wire, 0, err);
}

static void *demand_main(void *arg)
{
    struct postcopy_source *ps = arg;
    struct outgoing *out = ps->out;
    struct wire_record record = {0};
    thread_prompt();
    int ret = send_first(ps, &ps->err);
    while (!ret) {
        ret = wire_get(&out->demand.wire, &record, &ps->err);
        if (!ret && record.header.type == WIRE_ASK && ps->blocks[0])
            ret = take_ask(ps, &record, &ps->err);
        else if (!ret && record.header.type == WIRE_WANT)
            ret = take_want(ps, &record, &ps->err);
        else if (!ret)
            ret = wire_unexpected(&out->demand.wire, &record, "want", &ps->err);
    }
    wire_record_free(&record);
    ps->failure = ret;
    // While pages are owed, a dead demand connection is a dead migration: the pusher must notice.
    // The destination closes it only after it has read the main one's end.
    if (!atomic_load(&ps->finished))
        channel_shutdown(&out->main);
    return NULL;
}

// --- before the guest runs there

int postcopy_discard(struct outgoing *out, struct error *err)
{
    return wire_discard_put(&out->main.wire, out->todo, out->vm->ram.pages, err);
}

static void source_free(struct postcopy_source *ps)
{
    if (!ps)
        return;
    free(ps->blocks[0]);
    free(ps->blocks[1]);
    free(ps->batch);
    free(ps);
}

static struct postcopy_source *source_new(struct outgoing *out)
{
    struct postcopy_source *ps = calloc(1, sizeof(*ps));
    if (!ps)
        return NULL;
    *ps = (struct postcopy_source) {.out = out,
                                    .batch = malloc(sizeof(*ps->batch)),
                                    .window = WINDOW_MIN,
                                    .push_pages = PUSH_PAGES,
                                    .fastest_ns = UINT64_MAX};
    bool good = ps->batch;
    for (unsigned i = 0; i < ARRAY_SIZE(ps->blocks) && out->disks; i++)
        if (posix_memalign((void **)&ps->blocks[i], DISK_UNIT, WIRE_BLOCKS_DATA)) {
            ps->blocks[i] = NULL;
            good = false;
        }
    if (good)
        return ps;
    source_free(ps);
    return NULL;
}

static int serve(struct outgoing *out, bool first, struct error *err)
{
    struct postcopy_source *ps = source_new(out);
    if (!ps)
        return error_set(err, -ENOMEM, "no memory for post-copy");
    pthread_mutex_init(&ps->lock, NULL);
    prepage_init(&ps->order, out->params->prepaging, out->vm->ram.pages);
    page_presence_begin(&out->presence);
    if (first && ps->order.kind != PREPAGE_NONE)
        first_touch_find(&ps->touch, out->vm); // here: should this fail, the guest soon runs on
    // The destination asks when its guest needs something: silence is no failure here. A dead peer
    // is found by the main connection.
    out->demand.timeout_ms = 0;
    out->demand.cancel_fd = -1; // a cancel is seen on the main connection, while it has effect
    channel_quick(&out->demand);
    int ret = pthread_create(&ps->thread, NULL, demand_main, ps);
    if (ret) {
        source_free(ps);
        return error_set(err, -ret, "post-copy: cannot start a thread");
    }
    out->postcopy = ps;
    return 0;
}

int postcopy_serve(struct outgoing *out, struct error *err)
{
    return serve(out, false, err);
}

int postcopy_begin(struct outgoing *out, struct error *err)
{
    int ret = postcopy_discard(out, err);
    return ret ? ret : serve(out, true, err);
}

// --- pushing

struct run {
    uint64_t first, count;
    bool zero;
};

static int compare_runs(const void *a, const void *b)
{
    const struct run *x = a, *y = b;
    return x->first < y->first ? -1 : x->first > y->first;
}

static uint64_t claim_next(struct postcopy_source *ps, uint64_t max, uint64_t *first)
{
    pthread_mutex_lock(&ps->lock);
    uint64_t n = prepage_next(&ps->order, ps->out->todo, max, first);
    bitmap_fill(ps->out->todo, *first, n, false);
    pthread_mutex_unlock(&ps->lock);
    if (n)
        history_add(&ps->out->m->history, HISTORY_PUSH, *first, n, 0);
    return n;
}

// Claims pages in the order of pre-paging until there are push_pages of data. A record's pages
// ascend, so they are put in order first.
static void claim(struct postcopy_source *ps, struct page_batch *batch)
{
    struct ram *ram = &ps->out->vm->ram;
    struct run runs[PUSH_RUNS + PUSH_PAGES_MAX];
    unsigned nr = 0, data = 0;
    while (data < ps->push_pages && nr < PUSH_RUNS) {
        uint64_t first = 0, n = claim_next(ps, ps->push_pages - data, &first);
        if (!n)
            break;
        for (uint64_t p = first; p < first + n; p++) {
            bool zero = page_known_zero(&ps->out->presence, ram, p);
            data += !zero;
            if (p > first && runs[nr - 1].zero == zero)
                runs[nr - 1].count++;
            else
                runs[nr++] = (struct run) {p, 1, zero};
        }
    }
    qsort(runs, nr, sizeof(runs[0]), compare_runs);
    for (unsigned i = 0; i < nr; i++)
        for (uint64_t p = runs[i].first; p < runs[i].first + runs[i].count; p++)
            page_batch_add(batch, p, runs[i].zero);
}

// An echo has come: all of the oldest record is placed.
static void acknowledged(struct postcopy_source *ps)
{
    unsigned slot = ps->acked++ % WINDOW_MAX;
    uint64_t took = time_ns() - ps->sent[slot].at, bytes = ps->sent[slot].bytes;
    ps->under_way--;
    ps->delivered += bytes;
    ps->fastest_ns = took < ps->fastest_ns ? took : ps->fastest_ns;
    uint64_t sample = switchover_bandwidth(0, ps->delivered - ps->sent[slot].delivered, took);
    ps->rate -= ps->rate / 32; // the best of late
    ps->rate = sample > ps->rate ? sample : ps->rate;
    unsigned __int128 room =
        (unsigned __int128)ps->rate * (ps->fastest_ns + QUEUE_NS) / 1000000000u;
    uint64_t window = (uint64_t)(room / (bytes ? bytes : 1));
    ps->window = window < WINDOW_MIN   ? WINDOW_MIN
                 : window > WINDOW_MAX ? WINDOW_MAX
                                       : (unsigned)window;
    uint64_t pages = (uint64_t)(room / PAGE_SIZE / RECORDS_AT_ONCE);
    ps->push_pages = pages < PUSH_PAGES       ? PUSH_PAGES
                     : pages > PUSH_PAGES_MAX ? PUSH_PAGES_MAX
                                              : (unsigned)pages;
}

// A record has gone, which began at byte `before`: with an echo to come, and not too many under
// way.
static int pushed(struct postcopy_source *ps, uint64_t before, struct error *err)
{
    struct outgoing *out = ps->out;
    int ret;
    if (out->version < 2)
        return 0;
    struct wire_round round = {.round = (uint32_t)ps->seq, .data_pages = ps->end.data_pages};
    unsigned slot = ps->seq++ % WINDOW_MAX;
    ps->sent[slot].at = time_ns();
    ps->sent[slot].bytes = out->main.wire.out - before;
    ps->sent[slot].delivered = ps->delivered;
    ps->under_way++;
    ret = wire_put(&out->main.wire, WIRE_ROUND, 0, &round, sizeof(round), NULL, 0, err);
    while (!ret && ps->under_way >= ps->window) {
        ret = wire_expect(&out->main.wire, &out->record, WIRE_ROUND, err);
        if (!ret)
            acknowledged(ps);
    }
    return ret;
}

static int push_batch(struct postcopy_source *ps, struct page_batch *batch, struct error *err)
{
    uint64_t before = ps->out->main.wire.out;
    int ret = page_batch_put(batch, &ps->out->main.wire, 0, err);
    ps->end.data_pages += batch->nr_data;
    ps->end.zero_pages += batch->nr_zero;
    return ret ? ret : pushed(ps, before, err);
}

// --prepaging none: what nobody asks for is sent when nobody has asked for anything for a while. No
// request wakes this thread: that would delay its answer.
static void wait_quiet(struct postcopy_source *ps)
{
    pthread_mutex_lock(&ps->lock);
    uint64_t now = ps->asked_ns = time_ns();
    while (ps->order.kind == PREPAGE_NONE && !atomic_load(&ps->out->m->severed) &&
           now - ps->asked_ns < QUIET_NS) {
        struct pollfd sever = {.fd = ps->out->m->sever_fd, .events = POLLIN};
        unsigned left = (unsigned)((QUIET_NS - (now - ps->asked_ns)) / 1000000);
        pthread_mutex_unlock(&ps->lock);
        poll(&sever, 1, (int)left + 1);
        pthread_mutex_lock(&ps->lock);
        now = time_ns();
    }
    if (ps->order.kind == PREPAGE_NONE)
        prepage_init(&ps->order, PREPAGE_PUSH, ps->out->vm->ram.pages);
    pthread_mutex_unlock(&ps->lock);
}

static int wait_complete(struct postcopy_source *ps, struct error *err)
{
    struct outgoing *out = ps->out;
    for (;;) {
        int ret = wire_get(&out->main.wire, &out->record, err);
        if (ret)
            return ret;
        switch (out->record.header.type) {
        case WIRE_ROUND:
            if (!ps->under_way)
                return wire_unexpected(&out->main.wire, &out->record, "complete", err);
            acknowledged(ps);
            break;
        case WIRE_FAULTS:
            wire_fixed(&out->record, &out->report->latency, sizeof(out->report->latency));
            break;
        case WIRE_COMPLETE:
            atomic_store(&ps->finished, true);
            return 0;
        default:
            return wire_unexpected(&out->main.wire, &out->record, "complete", err);
        }
    }
}

// Behind the pages: a vCPU stands still for one of those, a block delays what waits for it.
static int push_blocks(struct postcopy_source *ps, struct error *err)
{
    struct outgoing *out = ps->out;
    uint64_t report_at = 0;
    int ret = 0;
    if (!ps->blocks[1])
        return 0;
    pthread_mutex_lock(&ps->lock);
    uint64_t bytes = disks_left(out);
    pthread_mutex_unlock(&ps->lock);
    outgoing_round(out, bytes);
    while (!ret) {
        struct block_claim claim;
        uint64_t before = out->main.wire.out;
        if (atomic_load(&out->m->severed))
            return error_set(err, -ECANCELED, "paused by the user");
        pthread_mutex_lock(&ps->lock);
        bool more = block_post_next(out->disks, PUSH_BLOCKS, &claim);
        uint64_t left = time_ns() >= report_at ? disks_left(out) : UINT64_MAX;
        pthread_mutex_unlock(&ps->lock);
        if (!more)
            return 0;
        if (left != UINT64_MAX) {
            outgoing_progress(out, MIGRATE_PUSHING, left);
            report_at = time_ns() + 200000000;
        }
        ret = block_post_put(out->disks, &out->main.wire, &claim, ps->blocks[1], err);
        ps->pushed_blocks += claim.nr;
        if (!ret)
            ret = pushed(ps, before, err);
    }
    return ret;
}

static int push_all(struct outgoing *out, struct error *err)
{
    struct postcopy_source *ps = out->postcopy;
    uint64_t report_at = 0;
    int ret = 0;
    pthread_mutex_lock(&ps->lock); // the demand thread has begun
    uint64_t all = bitmap_count(out->todo, out->vm->ram.pages);
    pthread_mutex_unlock(&ps->lock);
    outgoing_round(out, all * PAGE_SIZE);
    outgoing_progress(out, MIGRATE_PUSHING, out->round_bytes);
    wait_quiet(ps);
    do {
        if (atomic_load(&out->m->severed))
            return error_set(err, -ECANCELED, "paused by the user");
        page_batch_reset(out->batch, &out->vm->ram);
        claim(ps, out->batch);
        if (out->batch->nr_runs)
            ret = push_batch(ps, out->batch, err);
        if (time_ns() >= report_at) {
            pthread_mutex_lock(&ps->lock);
            uint64_t left = bitmap_count(out->todo, out->vm->ram.pages);
            pthread_mutex_unlock(&ps->lock);
            outgoing_progress(out, MIGRATE_PUSHING, left * PAGE_SIZE);
            report_at = time_ns() + 200000000;
        }
    } while (!ret && out->batch->nr_runs);
    if (!ret)
        ret = push_blocks(ps, err);
    if (!ret)
        ret = wire_put(&out->main.wire, WIRE_END, 0, &ps->end, sizeof(ps->end), NULL, 0, err);
    return ret ? ret : wait_complete(ps, err);
}

// When the demand connection broke first, its error is the cause and the main one's a consequence.
int postcopy_push(struct outgoing *out, struct error *err)
{
    struct postcopy_source *ps = out->postcopy;
    struct wire_times times;
    uint64_t start = time_ns();
    int ret = push_all(out, err);
    out->report->postcopy_ns += time_ns() - start;
    out->report->pushed_pages += ps->end.data_pages;
    out->report->zero_pages += ps->end.zero_pages;
    if (!ret) {
        wire_fixed(&out->record, &times, sizeof(times));
        out->report->faults = times.faults;
        out->report->requests = times.requested;
        return 0;
    }
    channel_shutdown(&out->demand);
    pthread_join(ps->thread, NULL);
    ps->ended = true;
    if (ps->failure && ps->failure != -ENODATA) {
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
    out->report->demand_pages += ps->demanded;
    out->report->pushed_pages += ps->first;
    out->report->data_pages += ps->end.data_pages + ps->demanded + ps->first;
    out->report->zero_pages += ps->demanded_zero + ps->first_zero;
    out->report->pushed_blocks += ps->pushed_blocks;
    out->report->demand_blocks += ps->demanded_blocks;
    pthread_mutex_destroy(&ps->lock);
    source_free(ps);
    out->postcopy = NULL;
}
