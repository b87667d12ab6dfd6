// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <limits.h>
#include <time.h>

#include "migrate/blockpost.h"
#include "migrate/receive_internal.h"
#include "vmm/bitmap.h"

enum {
    PAUSE_MS = 2000, // a guest without its pages: what is not quiet by then waits for one
    LATE_SYNC_BYTES = 64 * 1024 * 1024,
};

// Pushed behind all pages. A sync at the end that takes longer than the source waits would be the
// end of all.
static int take_late(struct receive *r, struct error *err)
{
    int ret = postcopy_dest_late(r->postcopy, &r->main.wire, &r->record, r->buffer, err);
    bool much = atomic_load(&r->disks.late_unsynced) >= LATE_SYNC_BYTES;
    return ret || !much ? ret : block_late_sync(&r->disks, err);
}

static int take_pushed(struct receive *r, struct error *err)
{
    for (;;) {
        int ret = wire_get(&r->main.wire, &r->record, err);
        if (ret)
            return ret;
        if (r->record.header.type == WIRE_END)
            break;
        if (r->record.header.type == WIRE_PAGES)
            ret = postcopy_dest_place(r->postcopy, &r->main.wire, &r->record, r->buffer, err);
        else if (r->record.header.type == WIRE_LATE)
            ret = take_late(r, err);
        else if (r->record.header.type == WIRE_ROUND)
            ret = receive_echo_round(r, err);
        else
            ret = wire_unexpected(&r->main.wire, &r->record, "pages or end", err);
        if (ret)
            return ret;
    }
    int ret = postcopy_dest_wait(r->postcopy, r->params.idle_ms, err);
    if (!ret)
        ret = block_late_sync(&r->disks, err); // the source may let its images go
    if (ret)
        return ret;
    receive_herald_end(r); // whoever hears that it is complete finds it listening
    postcopy_dest_counts(r->postcopy, &r->report->faults, &r->report->requested);
    if (r->version >= 2) {
        struct wire_faults latency;
        postcopy_dest_latency(r->postcopy, &latency);
        ret = wire_put(&r->main.wire, WIRE_FAULTS, 0, &latency, sizeof(latency), NULL, 0, err);
        if (ret)
            return ret;
    }
    struct wire_times times = {.load_ns = r->report->load_ns,
                               .resume_ns = r->report->resume_ns,
                               .faults = r->report->faults,
                               .requested = r->report->requested};
    return wire_put(&r->main.wire, WIRE_COMPLETE, 0, &times, sizeof(times), NULL, 0, err);
}

// Pre-copy: the guest runs and is whole, but the source may not know; stay reachable until it does.
static void see_off(struct receive *r, int ret)
{
    if (!ret)
        ret = wire_expect(&r->main.wire, &r->record, WIRE_BYE, NULL);
    if (ret)
        receive_wait_for(r, receive_has_answered, r->params.linger_ms);
}

// --- post-copy, and what happens when it breaks off

// Everything is here and the source knows, or it is not.
static int postcopy_finish(struct receive *r, struct error *err)
{
    enum owner_action action;
    int ret = take_pushed(r, err);
    if (!postcopy_dest_missing(r->postcopy) && !block_late_missing(&r->disks))
        receive_owner_step(r, DEST_EV_WHOLE, &action);
    // Until it has said good-bye the source may believe that it still owes pages.
    return ret ? ret : wire_expect(&r->main.wire, &r->record, WIRE_BYE, err);
}

// Also when cancelled: whoever then keeps the guest keeps one that stands still.
static void wait_paused(struct receive *r)
{
    struct timespec end = time_deadline(PAUSE_MS);
    int late = 0;
    pthread_mutex_lock(&r->lock);
    while (!r->paused && late != ETIMEDOUT)
        late = pthread_cond_timedwait(&r->changed, &r->lock, &end);
    pthread_mutex_unlock(&r->lock);
}

// Pauses the guest until unhalt, and lets it go on. Not in the receiving thread: a device or a vCPU
// that waits for a page is not quiet before that has come, and we may be who takes it from the
// link.
static void *pauser_main(void *arg)
{
    struct receive *r = arg;
    vm_pause(r->vm, NULL);
    pthread_mutex_lock(&r->lock);
    r->paused = true;
    pthread_cond_broadcast(&r->changed);
    while (r->halted && !r->ending)
        pthread_cond_wait(&r->changed, &r->lock);
    bool resume = !r->halted;
    r->leaving = true;
    pthread_mutex_unlock(&r->lock);
    if (resume)
        vm_resume(r->vm);
    return NULL;
}

void receive_pauser_end(struct receive *r)
{
    if (r->pausing)
        pthread_join(r->pauser, NULL);
    r->pausing = false;
}

static void halt(struct receive *r)
{
    pthread_mutex_lock(&r->lock);
    bool at_work = r->pausing && !r->leaving;
    r->halted |= at_work;
    pthread_mutex_unlock(&r->lock);
    if (!at_work) {
        receive_pauser_end(r);
        if (vm_paused(r->vm)) // by somebody else, who will let it go on
            return;
        r->paused = r->leaving = false;
        r->halted = true;
        r->pausing = !pthread_create(&r->pauser, NULL, pauser_main, r);
    }
    if (r->pausing)
        wait_paused(r);
}

static void unhalt(struct receive *r)
{
    pthread_mutex_lock(&r->lock);
    r->halted = false;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

// Both connections are dead: pause, unless nothing is missing any more, and keep everything.
static void sever(struct receive *r, struct error *err)
{
    enum owner_action action;
    postcopy_dest_cause(r->postcopy, err);
    postcopy_dest_stop(r->postcopy);
    pthread_mutex_lock(&r->lock);
    channel_close(&r->main);
    channel_close(&r->demand);
    pthread_mutex_unlock(&r->lock);
    r->report->missing_pages = postcopy_dest_missing(r->postcopy);
    r->report->missing_blocks = block_late_missing(&r->disks);
    receive_owner_step(r, DEST_EV_LOST, &action);
    if (action != OWNER_HOLD)
        return;
    halt(r);
    if (r->report->missing_blocks)
        error_prefix(err,
                     "post-copy broke off, %llu pages of the guest and %llu blocks (of 64 KiB) of "
                     "its disks are still at the source",
                     (unsigned long long)r->report->missing_pages,
                     (unsigned long long)r->report->missing_blocks);
    else
        error_prefix(err, "post-copy broke off, %llu pages of the guest are still at the source",
                     (unsigned long long)r->report->missing_pages);
    if (r->hooks->severed)
        r->hooks->severed(r->hooks->context, r->vm, err);
}

static int say_missing(struct receive *r, struct error *err)
{
    uint64_t pages = r->vm->ram.pages;
    autofree uint64_t *missing = calloc(bitmap_words(pages), 8);
    if (!missing)
        return error_set(err, -ENOMEM, "no memory for the list of missing pages");
    postcopy_dest_lacks(r->postcopy, missing);
    int ret = wire_discard_put(&r->main.wire, missing, pages, err);
    if (!ret)
        ret = block_late_say(&r->disks, &r->main.wire, err);
    return ret ? ret : wire_put(&r->main.wire, WIRE_READY, 0, NULL, 0, NULL, 0, err);
}

// The source has come back: says what is missing and lets the guest go on.
static int rejoin(struct receive *r, struct error *err)
{
    enum owner_action action;
    pthread_mutex_lock(&r->lock);
    channel_move(&r->main, &r->again, -1, r->params.handshake_ms);
    pthread_mutex_unlock(&r->lock);
    int ret = say_missing(r, err);
    if (!ret)
        ret = receive_wait_demand(r, err);
    if (ret)
        return ret;
    r->demand.cancel_fd = -1;
    r->main.timeout_ms = r->params.idle_ms;
    r->report->recoveries++;
    ret = postcopy_dest_resume(r->postcopy, err);
    receive_owner_step(r, DEST_EV_RECOVER, &action);
    if (ret)
        return ret;
    unhalt(r); // pages come again: whoever waits for one gets on
    if (r->hooks->severed)
        r->hooks->severed(r->hooks->context, r->vm, NULL);
    return ret;
}

static bool lacks(const struct receive *r)
{
    return r->report->missing_pages || r->report->missing_blocks;
}

// Until every page and every block is here, over as many connections as it takes.
static int postcopy_settle(struct receive *r, int ret, struct error *err)
{
    if (!ret)
        ret = postcopy_finish(r, err);
    while (ret) {
        sever(r, err);
        // A whole guest needs nobody; the source may still want to hear that.
        unsigned wait_ms = lacks(r) ? r->params.recover_ms : r->params.linger_ms;
        if (!receive_wait_for(r, receive_came_back, wait_ms ? wait_ms : UINT_MAX))
            break;
        ret = rejoin(r, err);
        if (!ret)
            ret = postcopy_finish(r, err);
    }
    if (lacks(r) && ret)
        return ret;
    r->report->missing_pages = r->report->missing_blocks = 0;
    unhalt(r);
    receive_pauser_end(r);
    postcopy_dest_free(r->postcopy);
    r->postcopy = NULL;
    struct error why; // the source has not heard that all is here: nobody else has synced
    if (block_late_sync(&r->disks, &why))
        log_write(&r->vm->log, LOG_ERROR, "%s", why.text);
    block_late_end(&r->disks);
    return 0;
}

int receive_settle(struct receive *r, int ret, struct error *err)
{
    enum owner_action action;
    if (r->postcopy) {
        ret = postcopy_settle(r, ret, err);
        receive_herald_end(r);
        return ret;
    }
    receive_owner_step(r, DEST_EV_WHOLE, &action);
    see_off(r, ret);
    return 0;
}
