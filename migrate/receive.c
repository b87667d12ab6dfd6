// SPDX-License-Identifier: Apache-2.0
#include "migrate/receive.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "migrate/blockpost.h"
#include "migrate/receive_internal.h"

enum {
    CANCELLED_MS = 5000, // for the question of a source whose COMMIT crossed the cancel
};

void receive_params_default(struct receive_params *params)
{
    *params = (struct receive_params) {
        .handshake_ms = CHANNEL_HANDSHAKE_MS, .idle_ms = CHANNEL_IDLE_MS, .linger_ms = 60 * 1000};
}

// --- ownership

// Steps under the lock. -EPROTO: the event has no place in this state.
int receive_owner_step(struct receive *r, enum owner_dest_event event, enum owner_action *action)
{
    pthread_mutex_lock(&r->lock);
    int ret = owner_dest_step(&r->owner, event, action);
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return ret;
}

// COMMIT has come. A cancel that was called before counts, even if no wait has noticed it yet:
// receive_cancel and this exclude each other, so whoever cancels first wins for certain.
static int commit_step(struct receive *r, enum owner_action *action)
{
    pthread_mutex_lock(&r->lock);
    int ret = r->cancelled ? -ECANCELED : owner_dest_step(&r->owner, DEST_EV_COMMIT, action);
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return ret;
}

enum owner_dest receive_owner_now(struct receive *r)
{
    pthread_mutex_lock(&r->lock);
    enum owner_dest owner = r->owner;
    pthread_mutex_unlock(&r->lock);
    return owner;
}

// What is waited for, under the lock.
bool receive_has_answered(const struct receive *r)
{
    return r->answered;
}

bool receive_came_back(const struct receive *r)
{
    return r->again.fd >= 0;
}

// A source that comes back has lost the link over which this connection was to follow.
static bool demand_settled(const struct receive *r)
{
    return r->demand.fd >= 0 || receive_came_back(r);
}

// Until it has happened, cancelled, or the time is over. True: it has.
bool receive_wait_for(struct receive *r, bool (*happened)(const struct receive *),
                      unsigned timeout_ms)
{
    struct timespec end = time_deadline(timeout_ms);
    int late = 0;
    pthread_mutex_lock(&r->lock);
    while (!happened(r) && !r->cancelled && late != ETIMEDOUT)
        late = pthread_cond_timedwait(&r->changed, &r->lock, &end);
    bool has = happened(r);
    pthread_mutex_unlock(&r->lock);
    return has;
}

int receive_wait_demand(struct receive *r, struct error *err)
{
    receive_wait_for(r, demand_settled, r->params.handshake_ms);
    pthread_mutex_lock(&r->lock);
    bool here = r->demand.fd >= 0;
    pthread_mutex_unlock(&r->lock);
    return here ? 0 : error_set(err, -ETIMEDOUT, "the connection for page requests did not come");
}

// --- the switch

static int take_commit(struct receive *r, struct error *err)
{
    struct wire_commit commit;
    struct wire_times times = {.load_ns = r->report->load_ns};
    enum owner_action action;
    int ret = receive_owner_step(r, DEST_EV_LOADED, &action);
    if (ret || receive_owner_now(r) != DEST_PREPARED)
        return error_set(err, -ECONNABORTED, "the source asked before the guest was loaded");
    r->was_prepared = true;
    r->main.timeout_ms = r->params.handshake_ms;
    ret = wire_put(&r->main.wire, WIRE_PREPARED, 0, &times, sizeof(times), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&r->main.wire, &r->record, WIRE_COMMIT, err);
    if (ret)
        return ret;
    wire_fixed(&r->record, &commit, sizeof(commit));
    if (memcmp(commit.id, r->report->id, WIRE_ID_LEN))
        return error_set(err, -EPROTO, "COMMIT of another migration");
    if (commit_step(r, &action))
        return error_set(err, -ECANCELED, "the arrival was cancelled before COMMIT came");
    if (action != OWNER_RUN)
        return error_set(err, -ECONNABORTED,
                         "the source has been told that the guest will not run");
    return 0;
}

static void *herald_main(void *arg)
{
    struct receive *r = arg;
    if (r->hooks->arrived)
        r->hooks->arrived(r->hooks->context, r->vm);
    return NULL;
}

void receive_herald_end(struct receive *r)
{
    if (r->heralding)
        pthread_join(r->herald, NULL);
    r->heralding = false;
}

// The guest is ours: nothing from here on may undo it.
static int run(struct receive *r, struct error *err)
{
    uint64_t start = time_ns();
    block_intake_arrived(&r->disks, r->report->id);
    if (!r->stay_paused)
        vm_resume(r->vm);
    r->report->resume_ns = time_ns() - start;
    r->main.cancel_fd = -1;
    r->main.timeout_ms = r->params.idle_ms;
    struct wire_times times = {.load_ns = r->report->load_ns, .resume_ns = r->report->resume_ns};
    int ret = wire_put(&r->main.wire, WIRE_RUNNING, 0, &times, sizeof(times), NULL, 0, err);
    // In post-copy the loop's thread, which the hook may wait for, may itself wait for a page that
    // is pushed: only we take that from the link.
    r->heralding = r->postcopy && !pthread_create(&r->herald, NULL, herald_main, r);
    if (!r->heralding)
        herald_main(r);
    return ret;
}

// Waits for the source's word that it goes on itself, after which it asks nothing. A COMMIT may
// come before.
static bool source_gives_up(struct receive *r, unsigned timeout_ms)
{
    r->main.cancel_fd = r->cancel_fd;
    r->main.timeout_ms = timeout_ms;
    for (unsigned i = 0; i < 2 && !wire_get(&r->main.wire, &r->record, NULL); i++)
        if (r->record.header.type == WIRE_ABORT)
            return true;
    return false;
}

// Cancelled, too, and until cancelled once more: without an answer the source would be in doubt.
static void stay_for_question(struct receive *r)
{
    unsigned ms = r->params.linger_ms;
    eventfd_t count;
    pthread_mutex_lock(&r->lock);
    if (r->cancelled && ms > CANCELLED_MS)
        ms = CANCELLED_MS;
    r->cancelled = false;
    eventfd_read(r->cancel_fd, &count);
    pthread_mutex_unlock(&r->lock);
    uint64_t end = time_ns() + ms * 1000000ull;
    if (source_gives_up(r, ms))
        return;
    channel_shutdown(&r->main);
    uint64_t now = time_ns();
    receive_wait_for(r, receive_has_answered, now < end ? (unsigned)((end - now) / 1000000) : 0);
}

// Before COMMIT: nothing is left. If COMMIT may be under way, the source will ask: say no.
static void give_up(struct receive *r, int ret, struct error *err)
{
    enum owner_action action;
    receive_owner_step(r, ret == -ECANCELED ? DEST_EV_CANCEL : DEST_EV_LOST, &action);
    if (r->streams)
        streams_dest_end(r->streams); // the VM goes whose memory they fill
    postcopy_dest_free(r->postcopy);
    r->postcopy = NULL;
    block_late_end(&r->disks);
    if (r->vm)
        block_intake_forget(r->vm);
    if (r->vm) // before the source hears of it: it needs the images back
        r->hooks->destroy_vm(r->hooks->context, r->vm);
    r->vm = NULL;
    pthread_mutex_lock(&r->lock);
    r->dropped = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    channel_abort(&r->main, err);
    if (r->was_prepared && ret != -EREMOTEIO) // the source's ABORT: it will not ask
        stay_for_question(r);
    channel_shutdown(&r->main); // not close: the door may be looking at it
    receive_door_close(r);
}

int receive_run(struct receive *r, struct vm **vm, struct receive_report *report, struct error *err)
{
    struct error local;
    err = err ? err : &local;
    *report = (struct receive_report) {0};
    r->report = report;
    *vm = NULL;
    thread_prompt(); // at the switch the guest waits, and its vCPUs must not keep RUNNING back
    int ret = receive_accept(r, err);
    if (!ret)
        ret = receive_door_open(r, err);
    if (!ret)
        ret = receive_take_machine(r, err);
    if (!ret)
        ret = receive_take_memory(r, err);
    if (!ret)
        ret = receive_prepare(r, err);
    if (!ret)
        ret = take_commit(r, err);
    if (ret) {
        give_up(r, ret, err);
    } else {
        *vm = r->vm;
        ret = run(r, err);
        ret = receive_settle(r, ret, err);
    }
    receive_door_close(r);
    report->owner = r->owner;
    report->data_pages = r->intake.nr_data;
    report->zero_pages = r->intake.nr_zero;
    return ret;
}

// --- life

int receive_create(struct receive **out, int listen_fd, const struct migrate_hooks *hooks,
                   const struct receive_params *params, struct error *err)
{
    struct receive *r = calloc(1, sizeof(*r));
    if (!r)
        return error_set(err, -ENOMEM, "no memory for a receiver");
    *r = (struct receive) {.listen_fd = listen_fd,
                           .hooks = hooks,
                           .params = *params,
                           .cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                           .stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                           .main = {.fd = -1},
                           .demand = {.fd = -1},
                           .again = {.fd = -1}};
    pthread_mutex_init(&r->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (r->cancel_fd < 0 || r->stop_fd < 0) {
        int ret = error_errno(err, "eventfd");
        receive_free(r);
        return ret;
    }
    *out = r;
    return 0;
}

void receive_cancel(struct receive *r)
{
    pthread_mutex_lock(&r->lock);
    r->cancelled = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    enum owner_dest owner = receive_owner_now(r);
    if (owner == DEST_WAITING || owner == DEST_PREPARED || owner == DEST_ABORTED)
        eventfd_write(r->cancel_fd, 1);
}

void receive_free(struct receive *r)
{
    if (!r)
        return;
    postcopy_dest_free(r->postcopy);
    block_late_end(&r->disks);
    pthread_mutex_lock(&r->lock);
    r->ending = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    receive_pauser_end(r);
    streams_dest_free(r->streams);
    channel_close(&r->main);
    channel_close(&r->demand);
    channel_close(&r->again);
    if (r->cancel_fd >= 0)
        close(r->cancel_fd);
    if (r->stop_fd >= 0)
        close(r->stop_fd);
    wire_record_free(&r->record);
    machine_free(&r->machine);
    page_intake_free(&r->intake);
    block_intake_free(&r->disks);
    free(r->stale);
    free(r->state);
    free(r->buffer);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    free(r);
}
