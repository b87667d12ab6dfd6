// SPDX-License-Identifier: Apache-2.0
// Iterative pre-copy (Clark et al., NSDI'05): send everything, then what was written meanwhile, and
// so on, until the rest fits the downtime limit.
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "migrate/outgoing.h"
#include "migrate/switchover.h"
#include "vmm/bitmap.h"
#include "vmm/probe.h"

// Before the first pause nobody knows the size of the state or what saving it takes; these are on
// the high side of what tests measure (docs/migration.md) and only matter for limits near them.
#define STATE_BYTES(cpus) (64 * KiB + (cpus)*16 * KiB)
#define STOP_NS(cpus)     (150000ull + (cpus)*20000ull)
#define SAVE_NS(cpus)     (150000ull + (cpus)*100000ull)
#define LOAD_NS(cpus)     (200000ull + (cpus)*170000ull)
#define RESUME_NS         100000ull
#define SAMPLE_MIN        (256 * KiB)
#define BANDWIDTH_GUESS   100000000ull // bytes/s: 1 Gbit Ethernet
// Below the limit rounds go on while they make the pause shorter. The guest then stands still for
// this share of each such period, so that there is less after each round: it loses less time than
// if it were stopped for all that is left.
#define EASE_PERCENT   90
#define EASE_PERIOD_US 2000
// What a shorter write takes says more about waking the other side than about the link.
#define WRITE_SAMPLE_MIN (64 * KiB)

// The limit is below what a pause without pages takes: rounds without a wait between them would
// only keep a processor busy, and flood whoever is told of each.
#define FEW_PAGES   64
#define FEW_WAIT_MS 10

// How long the first round waits for a guest that says which pages it does not need: between two
// hints, and in all. The guest runs meanwhile; what comes later still spares what the round has not
// reached.
#define HINT_NS  1000000000ull
#define HINTS_NS 5000000000ull

// With a low bandwidth limit records get small, so that a write takes about 50 ms at most.
static unsigned batch_pages(const struct outgoing *out)
{
    uint64_t rate = atomic_load(&out->m->bandwidth);
    uint64_t pages = rate ? rate / 20 / PAGE_SIZE : WIRE_BATCH_PAGES / 2;
    pages = pages < 1 ? 1 : pages;
    return pages < WIRE_BATCH_PAGES / 2 ? (unsigned)pages : WIRE_BATCH_PAGES / 2;
}

// What the link takes when it is written to: without a limit and with a fast peer little more than
// copying into the socket.
// 0: not known yet.
static uint64_t write_bandwidth(const struct outgoing *out)
{
    uint64_t limit = atomic_load(&out->m->bandwidth);
    uint64_t measured = switchover_bandwidth(0, out->write_bytes, out->write_ns);
    return limit && (!measured || limit < measured) ? limit : measured;
}

// Until the link is known, records go as they are: small packed ones would never tell.
static void pack_begin(struct outgoing *out)
{
    uint64_t bandwidth = write_bandwidth(out);
    packer_begin(&out->packer, bandwidth);
    if (!bandwidth && out->packer.when == PACK_AUTO)
        out->packer.lz4 = out->packer.delta = false;
    out->batch->packer = &out->packer;
}

static int put_batch(struct outgoing *out, struct error *err)
{
    uint64_t start = time_ns(), before = out->main.wire.out;
    int ret = page_batch_put(out->batch, &out->main.wire, 0, err);
    if (!ret)
        ret = packer_put(&out->packer, &out->main.wire, err);
    if (out->write_bytes > 64 * MiB) {
        out->write_bytes /= 2;
        out->write_ns /= 2;
    }
    if (out->main.wire.out - before >= WRITE_SAMPLE_MIN) {
        out->write_bytes += out->main.wire.out - before;
        out->write_ns += time_ns() - start;
    }
    out->report->data_pages += out->batch->nr_data + out->packer.nr;
    out->report->zero_pages += out->batch->nr_zero;
    return ret;
}

int precopy_pass(struct outgoing *out, struct error *err)
{
    if (out->streams)
        return streams_pass(out, err);
    struct ram *ram = &out->vm->ram;
    uint64_t remaining = out->taken ? 0 : bitmap_count(out->todo, ram->pages), cursor = 0;
    uint64_t report_at = time_ns() + 200000000;
    page_presence_begin(&out->presence);
    while (cursor < ram->pages) {
        int ret = outgoing_check_cancel(out, err);
        if (ret)
            return ret;
        page_batch_reset(out->batch, ram);
        out->batch->shard = out->shard;
        pack_begin(out);
        page_batch_take(out->batch, out->todo, &cursor, batch_pages(out), &out->presence);
        ret = put_batch(out, err);
        if (ret)
            return ret;
        uint64_t done = out->batch->nr_data + out->batch->nr_zero + out->packer.nr;
        if (out->taken) {
            atomic_fetch_add(out->taken, done);
            continue;
        }
        remaining -= done;
        if (out->owner == SOURCE_RUNNING && time_ns() >= report_at) {
            squeeze_look(out);
            outgoing_progress(out, MIGRATE_ROUNDS, remaining * PAGE_SIZE);
            report_at = time_ns() + 200000000;
        }
    }
    return 0;
}

// Pages that are waited for would make up most of the pause: see EASE_PERCENT.
static void ease(struct outgoing *out, bool within)
{
    if (out->report->throttle)
        return; // it is slowed already, and as much as it takes
    if (within)
        throttle_set(&out->throttle, out->vm, EASE_PERCENT, EASE_PERIOD_US);
    else
        throttle_end(&out->throttle);
}

static enum switchover_verdict decide(struct outgoing *out, uint64_t dirty_pages)
{
    unsigned cpus = out->vm->config.cpus;
    uint64_t limit = atomic_load(&out->m->downtime_ns);
    struct switchover_input in = {
        .remaining = dirty_pages * PAGE_SIZE,
        .state = STATE_BYTES(cpus),
        .bandwidth = out->bandwidth,
        .stop_ns = STOP_NS(cpus),
        .save_ns = SAVE_NS(cpus),
        .load_ns = LOAD_NS(cpus),
        .resume_ns = RESUME_NS,
        .rtt_ns = out->rtt_ns,
        .limit_ns = limit,
        .round = out->report->rounds,
        .max_rounds = out->params->max_rounds,
        .before = out->before,
        .within = out->within,
        .spare_ns = limit,
    };
    uint64_t expected;
    enum switchover_verdict verdict = switchover_decide(&in, &expected);
    out->before = in.remaining;
    out->within += expected <= in.limit_ns;
    if (verdict != SWITCHOVER_STOP)
        ease(out, expected <= in.limit_ns);
    pthread_mutex_lock(&out->m->lock);
    out->m->progress.expected_downtime_ns = expected;
    out->m->progress.dirty_bytes = in.remaining;
    pthread_mutex_unlock(&out->m->lock);
    return verdict;
}

static int stalled(struct outgoing *out, bool *stop, bool *postcopy, struct error *err)
{
    switch (out->params->on_stall) {
    case STALL_CONTINUE:
        return 0;
    case STALL_CANCEL:
        return error_set(err, -EBUSY,
                         "the guest writes too fast: after %u rounds the rest still needs longer "
                         "than the downtime limit of %llu us",
                         out->report->rounds,
                         (unsigned long long)atomic_load(&out->m->downtime_ns) / 1000);
    case STALL_POSTCOPY:
        *postcopy = true;
        break;
    case STALL_THROTTLE:
        out->report->throttle =
            switchover_throttle(out->report->throttle, out->dirty_rate, out->bandwidth);
        throttle_set(&out->throttle, out->vm, out->report->throttle, THROTTLE_PERIOD_US);
        return 0;
    case STALL_SWITCH:
        break;
    }
    *stop = true;
    return 0;
}

int precopy_flush(struct outgoing *out, struct error *err)
{
    struct wire_round round = {.round = out->report->rounds,
                               .pass = streams_passes(out),
                               .data_pages = out->report->data_pages};
    uint64_t start = time_ns();
    int ret = wire_put(&out->main.wire, WIRE_ROUND, 0, &round, sizeof(round), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&out->main.wire, &out->record, WIRE_ROUND, err);
    uint64_t took = time_ns() - start; // with nothing before it, a round trip
    if (!ret && took < out->rtt_ns)
        out->rtt_ns = took;
    return ret;
}

// Guest memory a second: `data` bytes of it went as `bytes` over the link. What a few KiB took says
// nothing about it.
static void bandwidth_update(struct outgoing *out, uint64_t data, uint64_t bytes, uint64_t ns)
{
    uint64_t limit = atomic_load(&out->m->bandwidth);
    if (data > bytes && bytes) // packed: the limit is the link's
        limit = limit > UINT64_MAX / data ? UINT64_MAX : limit * data / bytes;
    bytes = data > bytes ? data : bytes;
    if (bytes >= SAMPLE_MIN)
        out->bandwidth = switchover_bandwidth(out->bandwidth, bytes, ns);
    else if (!out->bandwidth)
        out->bandwidth = BANDWIDTH_GUESS;
    if (limit && out->bandwidth > limit)
        out->bandwidth = limit;
}

static void hints_wait(struct outgoing *out, struct ram_hinter *hinter)
{
    struct pollfd cancel = {.fd = out->m->cancel_fd, .events = POLLIN};
    uint64_t start = time_ns(), news = start, seen = 0, now;
    do {
        uint64_t progress = hinter->progress(hinter);
        if (!progress)
            return;
        now = time_ns();
        if (progress != seen)
            news = now;
        seen = progress;
    } while (now - start < HINTS_NS && now - news < HINT_NS && !poll(&cancel, 1, 2));
}

static void hints_stop(struct outgoing *out)
{
    if (out->hinting)
        out->vm->ram.hinter->end(out->vm->ram.hinter);
    out->hinting = false;
}

// During the first round only: it sends everything, later ones what the guest has just used.
static void hints_begin(struct outgoing *out)
{
    struct ram *ram = &out->vm->ram;
    out->hints = ram->hinter ? calloc(ram_bitmap_words(ram), sizeof(*out->hints)) : NULL;
    if (!out->hints)
        return; // without hints it only takes longer
    out->hinting = ram->hinter->start(ram->hinter, out->hints);
    if (!out->hinting) {
        free((void *)out->hints);
        out->hints = NULL;
        return;
    }
    out->presence.hinted = out->hints;
    hints_wait(out, ram->hinter);
    if (!ram->hinter->progress(ram->hinter))
        hints_stop(out); // it has named everything: it may use it again, and tells by writing
}

void precopy_hints_end(struct outgoing *out)
{
    if (!out->hints)
        return;
    hints_stop(out);
    out->presence.hinted = NULL;
    free((void *)out->hints);
    out->hints = NULL;
}

// The time of a round ends when the destination has taken it all: socket buffers hold megabytes,
// which would otherwise make the link look fast and then be waited for while the guest stands
// still.
static int one_round(struct outgoing *out, uint64_t *dirty, struct error *err)
{
    uint64_t start = time_ns(), before = outgoing_bytes(out), pages = out->report->data_pages;
    outgoing_round(out, bitmap_count(out->todo, out->vm->ram.pages) * PAGE_SIZE);
    squeeze_look(out);
    int ret = disks_pass(out, err);
    if (!ret)
        ret = precopy_pass(out, err);
    out->report->rounds++;
    out->packer.again = true;
    if (!ret)
        ret = precopy_flush(out, err);
    precopy_hints_end(out);
    if (ret)
        return ret;
    uint64_t bytes = outgoing_bytes(out) - before, took = time_ns() - start;
    bandwidth_update(out, (out->report->data_pages - pages) * PAGE_SIZE, bytes, took);
    ret = ram_dirty_sync(&out->vm->ram, &out->dirty, out->todo, NULL, err);
    *dirty = bitmap_count(out->todo, out->vm->ram.pages) + disks_left(out) / PAGE_SIZE;
    out->dirty_rate = switchover_bandwidth(0, *dirty * PAGE_SIZE, time_ns() - start);
    history_add(&out->m->history, HISTORY_ROUND, bytes, *dirty * PAGE_SIZE, took);
    FERRY_PROBE4(migration_round, out->report->rounds, bytes, took, *dirty);
    return ret;
}

int precopy_rounds(struct outgoing *out, bool *postcopy, struct error *err)
{
    *postcopy = out->params->mode == MIGRATE_POSTCOPY || out->params->mode == MIGRATE_HYBRID;
    if (out->params->mode == MIGRATE_LOCAL)
        return 0; // nothing to send
    int ret = disks_late(out, *postcopy) ? 0 : disks_first(out, err);
    if (ret)
        return ret;
    squeeze_begin(out);
    bitmap_fill(out->todo, 0, out->vm->ram.pages, true);
    if (out->params->mode == MIGRATE_POSTCOPY)
        return outgoing_check_cancel(out, err);
    bool old = out->version < 2; // who does not know PACKED
    packer_init(&out->packer, &out->vm->ram, old ? PACK_NEVER : out->params->compress,
                out->params->delta_cache);
    ret = ram_dirty_start(&out->vm->ram, &out->dirty, err);
    out->logging = !ret;
    if (!ret)
        hints_begin(out);
    for (bool stop = false; !ret && !stop;) {
        uint64_t dirty = 0;
        ret = one_round(out, &dirty, err);
        if (ret)
            break;
        enum switchover_verdict verdict = decide(out, dirty);
        if (verdict == SWITCHOVER_CONTINUE && dirty < FEW_PAGES)
            poll(&(struct pollfd) {.fd = out->m->cancel_fd, .events = POLLIN}, 1, FEW_WAIT_MS);
        outgoing_progress(out, MIGRATE_ROUNDS, dirty * PAGE_SIZE);
        stop = verdict == SWITCHOVER_STOP || out->params->mode == MIGRATE_HYBRID;
        if (verdict == SWITCHOVER_STALLED && !stop)
            ret = stalled(out, &stop, postcopy, err);
    }
    // Giving back what is stale already takes the destination long: better while the guest runs.
    if (!ret && *postcopy)
        ret = postcopy_discard(out, err);
    return ret ? ret : *postcopy ? precopy_flush(out, err) : 0;
}
