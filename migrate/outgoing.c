// SPDX-License-Identifier: Apache-2.0
// The source's side of a migration from hello to bye.
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>

#include "migrate/crc32c.h"
#include "migrate/machine.h"
#include "migrate/outgoing.h"
#include "migrate/switchover.h"
#include "vmm/bitmap.h"

enum {
    ASK_TIMEOUT_MS = 5000, // for one question
    ASK_PAUSE_MS = 200,    // between two
};

// --- parameters, progress

void migrate_params_default(struct migrate_params *params)
{
    *params = (struct migrate_params) {
        .mode = MIGRATE_PRECOPY,
        .downtime_ns = 300000000,
        .max_rounds = 30,
        .on_stall = STALL_CONTINUE,
        .prepaging = PREPAGE_MULTI,
        .compress = PACK_AUTO,
        .delta_cache = 64 * MiB,
        .connections = 1,
        .handshake_ms = CHANNEL_HANDSHAKE_MS,
        .idle_ms = CHANNEL_IDLE_MS,
        .ask_ms = 30 * 1000,
    };
}

const char *migrate_phase_name(enum migrate_phase phase)
{
    static const char *const names[] = {"idle",    "connecting", "disks", "rounds", "switching",
                                        "pushing", "asking",     "done",  "failed"};
    return names[phase];
}

static const char *const mode_names[] = {"precopy", "postcopy", "hybrid", "local"};

const char *migrate_mode_name(enum migrate_mode mode)
{
    return mode_names[mode];
}

int migrate_mode_parse(const char *text, enum migrate_mode *mode, struct error *err)
{
    for (unsigned i = 0; i < ARRAY_SIZE(mode_names); i++)
        if (!strcmp(text, mode_names[i])) {
            *mode = (enum migrate_mode)i;
            return 0;
        }
    return error_set(err, -EINVAL,
                     "migration mode '%s': expected precopy, postcopy, hybrid or local", text);
}

int migrate_stall_parse(const char *text, enum migrate_stall *stall, struct error *err)
{
    static const char *const names[] = {"continue", "cancel", "switch", "postcopy", "throttle"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(text, names[i])) {
            *stall = (enum migrate_stall)i;
            return 0;
        }
    return error_set(err, -EINVAL,
                     "on-stall '%s': expected continue, cancel, switch, postcopy or throttle",
                     text);
}

int migrate_balloon_parse(const char *text, uint64_t *most, struct error *err)
{
    if (!strcmp(text, "off"))
        *most = 0;
    else if (!strcmp(text, "auto"))
        *most = UINT64_MAX;
    else if (size_parse(text, MiB, most))
        return error_set(err, -EINVAL, "balloon '%.40s': expected auto, off or a size, e.g. 512M",
                         text);
    return 0;
}

int migration_init(struct migration *m, struct error *err)
{
    *m = (struct migration) {.cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                             .sever_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (m->cancel_fd < 0 || m->sever_fd < 0) {
        int ret = error_errno(err, "eventfd");
        if (m->cancel_fd >= 0)
            close(m->cancel_fd);
        return ret;
    }
    pthread_mutex_init(&m->lock, NULL);
    history_init(&m->history);
    return 0;
}

void migration_free(struct migration *m)
{
    if (m->cancel_fd >= 0)
        close(m->cancel_fd);
    if (m->sever_fd >= 0)
        close(m->sever_fd);
    m->cancel_fd = m->sever_fd = -1;
    pthread_mutex_destroy(&m->lock);
    history_free(&m->history);
}

void migration_cancel(struct migration *m)
{
    atomic_store(&m->cancelled, true);
    eventfd_write(m->cancel_fd, 1);
}

int migration_sever(struct migration *m, struct error *err)
{
    struct migrate_progress progress;
    migration_get(m, &progress);
    if (progress.phase != MIGRATE_PUSHING)
        return error_set(err, -EBUSY,
                         "only a post-copy that pushes pages can be paused, this migration is in "
                         "phase %s",
                         migrate_phase_name(progress.phase));
    atomic_store(&m->severed, true);
    eventfd_write(m->sever_fd, 1);
    return 0;
}

void migration_get(struct migration *m, struct migrate_progress *progress)
{
    pthread_mutex_lock(&m->lock);
    *progress = m->progress;
    pthread_mutex_unlock(&m->lock);
}

void outgoing_round(struct outgoing *out, uint64_t bytes)
{
    out->round_start_ns = time_ns();
    out->round_start_bytes = outgoing_bytes(out);
    out->round_start_pages = out->report->data_pages;
    out->round_bytes = bytes;
}

// What is left, and what the guest writes while that is sent, and so on: a geometric series.
static uint64_t time_left(uint64_t remaining, uint64_t bandwidth, uint64_t dirty_rate)
{
    if (!remaining)
        return 0;
    return bandwidth > dirty_rate ? switchover_transfer_ns(remaining, bandwidth - dirty_rate)
                                  : UINT64_MAX;
}

void outgoing_progress(struct outgoing *out, enum migrate_phase phase, uint64_t remaining)
{
    struct migration *m = out->m;
    struct migrate_progress copy;
    uint64_t bytes = outgoing_bytes(out) - out->round_start_bytes;
    uint64_t data = (out->report->data_pages - out->round_start_pages) * PAGE_SIZE;
    bytes = data > bytes ? data : bytes; // packed
    uint64_t ns = time_ns() - out->round_start_ns;
    bool sending = phase == MIGRATE_ROUNDS || phase == MIGRATE_PUSHING || phase == MIGRATE_DISKS;
    uint64_t bandwidth =
        sending && bytes && ns > 50000000 ? switchover_bandwidth(0, bytes, ns) : out->bandwidth;
    pthread_mutex_lock(&m->lock);
    m->progress.phase = phase;
    m->progress.round = out->report->rounds;
    m->progress.total_bytes = out->vm->ram.size;
    m->progress.sent_bytes = outgoing_bytes(out);
    m->progress.round_bytes = out->round_bytes;
    m->progress.remaining_bytes = remaining;
    m->progress.bandwidth = bandwidth;
    m->progress.dirty_rate = out->dirty_rate;
    m->progress.disk_bytes = out->disks ? out->disks->total_bytes : 0;
    m->progress.disk_sent_bytes = out->disks ? out->disks->data_bytes : 0;
    m->progress.throttle = out->report->throttle;
    m->progress.balloon_bytes = out->squeeze.held;
    m->progress.time_left_ns =
        sending ? time_left(remaining, bandwidth, phase == MIGRATE_ROUNDS ? out->dirty_rate : 0)
                : UINT64_MAX;
    copy = m->progress;
    pthread_mutex_unlock(&m->lock);
    if (m->on_progress)
        m->on_progress(&copy, m->on_progress_arg);
}

int outgoing_check_cancel(struct outgoing *out, struct error *err)
{
    return atomic_load(&out->m->cancelled) ? error_set(err, -ECANCELED, "migration cancelled") : 0;
}

// --- handshake

static int say_hello(struct outgoing *out, struct channel *c, enum wire_connection kind,
                     struct error *err)
{
    struct wire_hello hello, answer;
    wire_hello_fill(&hello, kind, out->report->id);
    uint64_t start = time_ns();
    int ret = wire_put(&c->wire, WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&c->wire, &out->record, WIRE_HELLO, err);
    if (!ret)
        ret = wire_hello_parse(&out->record, &answer, err);
    if (ret)
        return ret;
    out->rtt_ns = time_ns() - start;
    if (memcmp(answer.id, hello.id, WIRE_ID_LEN) || answer.kind != kind)
        return error_set(err, -EPROTO, "%s: answers for another migration", c->name);
    return wire_version_choose(WIRE_OLDEST, WIRE_VERSION, answer.version, answer.version,
                               &out->version, err);
}

static bool may_postcopy(const struct migrate_params *p)
{
    return p->mode == MIGRATE_POSTCOPY || p->mode == MIGRATE_HYBRID ||
           (p->mode == MIGRATE_PRECOPY && p->on_stall == STALL_POSTCOPY);
}

// Post-copy pushes over the main connection.
unsigned outgoing_streams(const struct outgoing *out)
{
    const struct migrate_params *p = out->params;
    bool pages = p->mode == MIGRATE_PRECOPY || p->mode == MIGRATE_HYBRID;
    return pages && p->connections > 1 ? p->connections : 0;
}

static int send_machine(struct outgoing *out, struct error *err)
{
    struct machine machine;
    int ret = machine_describe(out->vm, out->params->hooks, &machine, err);
    if (ret)
        return ret;
    machine.flags = (may_postcopy(out->params) ? WIRE_MACHINE_POSTCOPY : 0u) |
                    (out->disks ? WIRE_MACHINE_DISKS : 0u) |
                    (out->params->mode == MIGRATE_LOCAL ? WIRE_MACHINE_SHARED : 0u);
    machine.streams = outgoing_streams(out);
    out->report->connections = machine.streams ? machine.streams : 1;
    autofree void *meta = NULL;
    size_t len;
    ret = machine_encode(&machine, &meta, &len, err);
    machine_free(&machine);
    if (!ret)
        ret = wire_put(&out->main.wire, WIRE_MACHINE, 0, meta, len, NULL, 0, err);
    return ret || !out->disks ? ret : block_move_describe(out->disks, &out->main.wire, err);
}

static int check_local(const struct outgoing *out, struct error *err)
{
    if (out->params->connections < 1 || out->params->connections > WIRE_STREAMS_MAX)
        return error_set(err, -EINVAL, "%u connections: expected 1 to %d", out->params->connections,
                         WIRE_STREAMS_MAX);
    if (out->params->mode != MIGRATE_LOCAL)
        return 0;
    if (strncmp(out->params->to, "unix:", 5))
        return error_set(err, -EINVAL,
                         "mode local hands memory to a process of this host: expected unix:PATH, "
                         "not %s",
                         out->params->to);
    if (out->params->disks)
        return error_set(err, -EINVAL, "mode local: disks stay where they are: leave --disk out");
    if (out->params->security.tls)
        return error_set(
            err, -EINVAL,
            "mode local: memory is handed over by a descriptor, which TLS cannot carry, "
            "and nothing leaves this host: leave --tls and --psk out");
    if (out->vm->ram.memfd < 0 || out->vm->ram.unit != PAGE_SIZE)
        return error_set(err, -EINVAL,
                         "mode local: the memory of VM %s cannot be handed over: start it with "
                         "--backing memfd",
                         out->vm->name);
    return 0;
}

static int hand_memory(struct outgoing *out, struct error *err)
{
    struct wire_memory memory = {.size = out->vm->ram.size};
    if (out->version < 2)
        return error_set(err, -EPROTONOSUPPORT, "%s is too old for mode local", out->main.name);
    int ret = wire_put(&out->main.wire, WIRE_MEMORY, 0, &memory, sizeof(memory), NULL, 0, err);
    return ret ? ret : channel_send_fd(&out->main, out->vm->ram.memfd, err);
}

static int handshake(struct outgoing *out, struct error *err)
{
    const struct migrate_params *p = out->params;
    int cancel = out->m->cancel_fd;
    int ret = check_local(out, err);
    if (!ret)
        ret = disks_begin(out, err);
    if (!ret)
        ret = channel_connect_secure(&out->main, p->to, &p->security, cancel, p->handshake_ms, err);
    if (!ret)
        ret = say_hello(out, &out->main, WIRE_MAIN, err);
    if (!ret)
        ret = send_machine(out, err);
    if (!ret)
        ret = disks_agree(out, err);
    if (!ret)
        ret = wire_expect(&out->main.wire, &out->record, WIRE_READY, err);
    if (!ret && p->mode == MIGRATE_LOCAL)
        ret = hand_memory(out, err);
    if (!ret)
        ret = streams_open(out, err);
    if (!ret && may_postcopy(p)) {
        ret =
            channel_connect_secure(&out->demand, p->to, &p->security, cancel, p->handshake_ms, err);
        if (!ret)
            ret = say_hello(out, &out->demand, WIRE_DEMAND, err);
    }
    out->main.timeout_ms = p->idle_ms;
    out->main.limit = &out->m->bandwidth;
    return ret;
}

// --- the switch

// The state is saved before the last dirty-log sync: whatever saving writes into guest memory is
// then still sent.
static int stop_and_save(struct outgoing *out, struct error *err)
{
    struct migrate_downtime *d = &out->report->downtime;
    uint64_t t0 = time_ns();
    enum owner_action action;
    out->was_running = !vm_paused(out->vm);
    int ret = owner_source_step(&out->owner, SOURCE_EV_STOP, &action);
    if (!ret)
        ret = vm_pause(out->vm, err);
    uint64_t t1 = time_ns();
    d->stop = t1 - t0;
    squeeze_end(out); // what is saved is a balloon that shall be as before
    if (!ret)
        ret = vm_save(out->vm, &out->state.stream, err);
    d->save = time_ns() - t1;
    out->report->state_bytes = out->state.len;
    if (!ret && out->logging)
        ret = ram_dirty_sync(&out->vm->ram, &out->dirty, out->todo, NULL, err);
    return ret;
}

static int send_rest(struct outgoing *out, bool postcopy, struct error *err)
{
    uint64_t start = time_ns(), stale = bitmap_count(out->todo, out->vm->ram.pages);
    struct wire_prepare prepare = {.flags = (postcopy ? WIRE_PREPARE_POSTCOPY : 0u) |
                                            (out->was_running ? 0u : WIRE_PREPARE_STAY_PAUSED),
                                   .stale = postcopy ? stale : 0};
    bool blocks = false;
    int ret = disks_late(out, postcopy) ? disks_say(out, &blocks, err) : disks_pass(out, err);
    prepare.flags |= blocks ? WIRE_PREPARE_BLOCKS : 0u;
    if (!ret)
        ret = postcopy ? postcopy_begin(out, err) : precopy_pass(out, err);
    prepare.pass = streams_passes(out);
    out->report->discarded_pages = prepare.stale;
    out->report->downtime.last_pages = time_ns() - start;
    if (ret)
        return ret;
    struct iovec blob = {out->state.data, out->state.len};
    struct wire_state state = {.len = (uint32_t)out->state.len,
                               .crc = crc32c(0, out->state.data, out->state.len)};
    ret = wire_put(&out->main.wire, WIRE_STATE, 0, &state, sizeof(state), &blob, 1, err);
    out->prepared = !ret;
    return ret ? ret
               : wire_put(&out->main.wire, WIRE_PREPARE, 0, &prepare, sizeof(prepare), NULL, 0,
                          err);
}

static int wait_prepared(struct outgoing *out, struct error *err)
{
    struct migrate_downtime *d = &out->report->downtime;
    struct wire_times times;
    enum owner_action action;
    uint64_t start = time_ns();
    int ret = wire_expect(&out->main.wire, &out->record, WIRE_PREPARED, err);
    if (!ret)
        ret = outgoing_check_cancel(out, err); // the last moment a cancel has effect
    if (ret)
        return ret;
    wire_fixed(&out->record, &times, sizeof(times));
    uint64_t waited = time_ns() - start;
    d->load = times.load_ns;
    d->transfer = waited > d->load ? waited - d->load : 0;
    ret = owner_source_step(&out->owner, SOURCE_EV_PREPARED, &action);
    return ret ? error_set(err, ret, "PREPARED in state %s", owner_source_name(out->owner)) : 0;
}

static int commit(struct outgoing *out, struct error *err)
{
    struct wire_commit commit;
    enum owner_action action;
    uint64_t start = time_ns();
    memcpy(commit.id, out->report->id, WIRE_ID_LEN);
    // The state changes before the first byte leaves.
    int ret = owner_source_step(&out->owner, SOURCE_EV_COMMIT, &action);
    if (ret || action != OWNER_SEND)
        return error_set(err, -EPROTO, "COMMIT in state %s", owner_source_name(out->owner));
    out->main.cancel_fd = -1; // too late for the user to change their mind
    out->main.limit = NULL;
    ret = wire_put(&out->main.wire, WIRE_COMMIT, 0, &commit, sizeof(commit), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&out->main.wire, &out->record, WIRE_RUNNING, err);
    if (ret)
        return ret;
    out->report->downtime.resume = time_ns() - start;
    return owner_source_step(&out->owner, SOURCE_EV_ACK, &action);
}

static int hand_over(struct outgoing *out, bool postcopy, struct error *err)
{
    uint64_t start = time_ns();
    outgoing_progress(out, MIGRATE_SWITCHING, 0);
    int ret = stop_and_save(out, err);
    throttle_end(&out->throttle); // not before: the guest would use its last moments
    if (!ret)
        ret = send_rest(out, postcopy, err);
    if (!ret)
        ret = wait_prepared(out, err);
    if (!ret)
        ret = commit(out, err);
    out->report->downtime.total = time_ns() - start;
    return ret;
}

// --- when it goes wrong

// One question over a fresh connection. SOURCE_EV_NO_ANSWER also for "never heard of it": another
// process may listen there while the one that got COMMIT still runs the guest.
static enum owner_source_event ask_once(struct outgoing *out, int cancel_fd, struct error *err)
{
    struct channel c;
    struct wire_answer answer = {0};
    if (!channel_connect_secure(&c, out->params->to, &out->params->security, cancel_fd,
                                ASK_TIMEOUT_MS, err)) {
        struct wire_hello hello;
        wire_hello_fill(&hello, WIRE_QUERY, out->report->id);
        if (!wire_put(&c.wire, WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0, err) &&
            !wire_expect(&c.wire, &out->record, WIRE_ANSWER, err)) {
            wire_fixed(&out->record, &answer, sizeof(answer));
            if (answer.answer == WIRE_ANSWER_UNKNOWN)
                error_set(err, -ENOENT, "whoever listens at %s does not know this migration",
                          out->params->to);
        }
        channel_close(&c);
    }
    return answer.answer == WIRE_ANSWER_YES  ? SOURCE_EV_YES
           : answer.answer == WIRE_ANSWER_NO ? SOURCE_EV_NO
                                             : SOURCE_EV_NO_ANSWER;
}

// Returns the action of the last step.
static enum owner_action ask(struct outgoing *out, struct error *err)
{
    enum owner_action action = OWNER_HOLD;
    uint64_t end = time_ns() + out->params->ask_ms * 1000000ull;
    struct pollfd cancel = {.fd = out->m->cancel_fd, .events = POLLIN};
    outgoing_progress(out, MIGRATE_ASKING, 0);
    do { // at least once, also when the user has tried to cancel
        struct error why = {0};
        enum owner_source_event event = ask_once(out, -1, &why);
        owner_source_step(&out->owner, event, &action);
        if (event == SOURCE_EV_NO)
            error_set(err, -ECONNABORTED,
                      "the link broke at the switch; the destination says it will not run the "
                      "guest, so it goes on here");
        if (event == SOURCE_EV_NO_ANSWER) {
            error_set(err, -EOWNERDEAD,
                      "the link broke after the destination was told to run the guest, and it "
                      "cannot be asked whether it does (%s). The guest stays paused here. If it "
                      "does not run there: ferry migrate force-resume %s",
                      why.text, out->vm->name);
            poll(&cancel, 1, ASK_PAUSE_MS);
        }
    } while (action == OWNER_HOLD && time_ns() < end && !atomic_load(&out->m->cancelled));
    return action;
}

// The link broke when the destination may have been waiting for COMMIT: it would keep images and
// memory until its own wait is over, and then wait for a question. It gets one, whose answer
// changes nothing here.
static void *release_main(void *arg)
{
    struct outgoing *out = arg;
    struct error err;
    ask_once(out, out->m->cancel_fd, &err);
    return NULL;
}

static void resume_here(struct outgoing *out, bool release)
{
    pthread_t thread;
    // At the same time: the guest may go on at once, or may want an image back first.
    bool releasing = release && !pthread_create(&thread, NULL, release_main, out);
    if (out->was_running)
        vm_resume(out->vm);
    if (releasing)
        pthread_join(thread, NULL);
}

// Before COMMIT: the guest goes on here. After it: ask.
static int failed(struct outgoing *out, int ret, struct error *err)
{
    enum owner_action action;
    enum owner_source_event event = ret == -ECANCELED   ? SOURCE_EV_CANCEL
                                    : ret == -EREMOTEIO ? SOURCE_EV_REFUSED
                                                        : SOURCE_EV_LOST;
    if (out->owner == SOURCE_COMMITTING && event == SOURCE_EV_CANCEL)
        event = SOURCE_EV_LOST; // a connection given up is a connection lost
    owner_source_step(&out->owner, event, &action);
    bool release = action == OWNER_RESUME && event == SOURCE_EV_LOST && out->prepared;
    if (action == OWNER_ASK) {
        channel_shutdown(&out->main); // not close: who serves demands may be about to do the same
        out->main_lost = true;
        action = ask(out, err);
        ret = action == OWNER_RELEASE ? 0 : err->code;
    } else if (out->owner == SOURCE_RUNNING) {
        channel_abort(&out->main, err);
    }
    if (action == OWNER_RESUME)
        resume_here(out, release);
    return ret;
}

// --- all of it

static int outgoing_alloc(struct outgoing *out, struct error *err)
{
    static const uint8_t none[WIRE_ID_LEN];
    out->batch = malloc(sizeof(*out->batch));
    out->todo = calloc(ram_bitmap_words(&out->vm->ram), 8);
    page_presence_init(&out->presence);
    stream_mem_writer(&out->state, "guest state", WIRE_STATE_MAX);
    if (!out->batch || !out->todo)
        return error_set(err, -ENOMEM, "no memory for a migration");
    if (memcmp(out->report->id, none, WIRE_ID_LEN))
        return 0; // an old migration goes on
    if (getrandom(out->report->id, WIRE_ID_LEN, 0) != WIRE_ID_LEN)
        return error_errno(err, "getrandom");
    return 0;
}

static void outgoing_release(struct outgoing *out)
{
    postcopy_end(out);
    disks_end(out);
    precopy_hints_end(out);
    squeeze_end(out);
    out->report->free_pages += out->presence.nr_free;
    throttle_end(&out->throttle);
    out->report->lz4_pages += out->packer.lz4_pages;
    out->report->lz4_bytes += out->packer.lz4_bytes;
    out->report->delta_pages += out->packer.delta_pages;
    out->report->delta_bytes += out->packer.delta_bytes;
    packer_free(&out->packer);
    streams_close(out);
    out->report->wire_bytes += out->main.wire.out + out->demand.wire.out;
    channel_close(&out->main);
    channel_close(&out->demand);
    if (out->logging)
        ram_dirty_stop(&out->vm->ram, &out->dirty, NULL);
    wire_record_free(&out->record);
    stream_mem_free(&out->state);
    page_presence_free(&out->presence);
    free(out->todo);
    free(out->batch);
}

// The destination owns the guest. Sends what it lacks; when that breaks off, both sides keep what
// they have.
static int settle(struct outgoing *out, struct error *err)
{
    enum owner_action action;
    struct error why = {0};
    int ret = 0;
    out->main.cancel_fd = out->m->sever_fd;
    out->main.limit = &out->m->bandwidth; // what is asked for goes past it
    if (out->postcopy)
        ret = out->main_lost ? error_set(&why, -ENOTCONN, "the connection was lost")
                             : postcopy_push(out, &why);
    owner_source_step(&out->owner, ret ? SOURCE_EV_LOST : SOURCE_EV_COMPLETE, &action);
    if (!ret)
        return 0;
    const char *text = atomic_load(&out->m->severed) ? "paused by the user" : why.text;
    uint64_t blocks = disks_left(out) / DISK_BLOCK;
    char and_blocks[64] = "";
    if (blocks)
        snprintf(and_blocks, sizeof(and_blocks), " and %llu blocks of 64 KiB",
                 (unsigned long long)blocks);
    return error_set(err, ret,
                     "post-copy broke off: %s. The guest belongs to %s and waits there for what is "
                     "still here (%llu pages%s were not sent); both sides stay paused. When the "
                     "link is back: ferry migrate recover %s %s",
                     text, out->params->to,
                     (unsigned long long)bitmap_count(out->todo, out->vm->ram.pages), and_blocks,
                     out->vm->name, out->params->to);
}

static int migrate_run(struct outgoing *out, struct error *err)
{
    bool postcopy = false;
    int ret = outgoing_alloc(out, err);
    if (!ret) {
        outgoing_progress(out, MIGRATE_CONNECTING, out->vm->ram.size);
        ret = handshake(out, err);
    }
    if (!ret)
        ret = precopy_rounds(out, &postcopy, err);
    if (!ret && postcopy && out->report->rounds)
        out->report->mode = MIGRATE_HYBRID;
    if (!ret)
        ret = hand_over(out, postcopy, err);
    if (ret)
        ret = failed(out, ret, err);
    if (!ret)
        disks_gone(out);
    if (!ret)
        ret = settle(out, err);
    if (!ret && !out->main_lost)
        wire_put(&out->main.wire, WIRE_BYE, 0, NULL, 0, NULL, 0, NULL);
    return ret;
}

// What the destination says it lacks, into `todo`.
static int hear_missing(struct outgoing *out, struct error *err)
{
    for (;;) {
        int ret = wire_get(&out->main.wire, &out->record, err);
        if (ret || out->record.header.type == WIRE_READY)
            return ret;
        ret = out->record.header.type == WIRE_ABSENT ? disks_hear(out, err)
              : out->record.header.type == WIRE_DISCARD
                  ? wire_discard_parse(&out->record, out->vm->ram.pages, out->todo, err)
                  : wire_unexpected(&out->main.wire, &out->record, "discard or ready", err);
        if (ret)
            return ret;
    }
}

static int reconnect(struct outgoing *out, struct error *err)
{
    const struct migrate_params *p = out->params;
    int cancel = out->m->cancel_fd;
    int ret = channel_connect_secure(&out->main, p->to, &p->security, cancel, p->handshake_ms, err);
    if (!ret)
        ret = say_hello(out, &out->main, WIRE_RECOVER, err);
    if (!ret)
        ret = hear_missing(out, err);
    if (!ret)
        ret =
            channel_connect_secure(&out->demand, p->to, &p->security, cancel, p->handshake_ms, err);
    if (!ret)
        ret = say_hello(out, &out->demand, WIRE_DEMAND, err);
    if (!ret)
        ret = postcopy_serve(out, err);
    out->main.timeout_ms = p->idle_ms;
    return ret;
}

static int recover_run(struct outgoing *out, struct error *err)
{
    enum owner_action action;
    int ret = outgoing_alloc(out, err);
    outgoing_progress(out, MIGRATE_CONNECTING, 0);
    if (!ret)
        ret = reconnect(out, err);
    if (!ret)
        ret = owner_source_step(&out->owner, SOURCE_EV_RECOVER, &action);
    if (!ret)
        ret = settle(out, err);
    if (!ret)
        wire_put(&out->main.wire, WIRE_BYE, 0, NULL, 0, NULL, 0, NULL);
    return ret;
}

static int outgoing_run(int (*run)(struct outgoing *out, struct error *err), struct vm *vm,
                        const struct migrate_params *params, struct migration *m,
                        struct migrate_report *report, enum owner_source owner, struct error *err)
{
    struct error local;
    err = err ? err : &local; // failed() returns its code
    struct outgoing out = {.vm = vm,
                           .params = params,
                           .m = m,
                           .report = report,
                           .main = {.fd = -1},
                           .demand = {.fd = -1},
                           .owner = owner,
                           .presence = {.pagemap_fd = -1}};
    // It waits for the link more than it works: beside a vCPU that never sleeps it would get its
    // turn milliseconds after each wait.
    thread_prompt();
    uint64_t start = time_ns();
    atomic_store(&m->bandwidth, params->bandwidth);
    atomic_store(&m->downtime_ns, params->downtime_ns);
    int ret = run(&out, err);
    report->total_ns += time_ns() - start;
    report->owner = out.owner;
    outgoing_release(&out);
    outgoing_progress(&out, ret ? MIGRATE_FAILED : MIGRATE_DONE, 0);
    return ret;
}

int migrate_out(struct vm *vm, const struct migrate_params *params, struct migration *m,
                struct migrate_report *report, struct error *err)
{
    *report = (struct migrate_report) {.mode = params->mode};
    return outgoing_run(migrate_run, vm, params, m, report, SOURCE_RUNNING, err);
}

int migrate_recover(struct vm *vm, const struct migrate_params *params, struct migration *m,
                    struct migrate_report *report, struct error *err)
{
    if (report->owner != SOURCE_SEVERED)
        return error_set(err, -EPROTO, "no post-copy has broken off (the source is in state %s)",
                         owner_source_name(report->owner));
    report->recoveries++;
    return outgoing_run(recover_run, vm, params, m, report, SOURCE_SEVERED, err);
}

int migrate_force_resume(struct vm *vm, struct migrate_report *report, struct error *err)
{
    enum owner_action action;
    int ret = owner_source_step(&report->owner, SOURCE_EV_FORCE, &action);
    if (ret)
        return error_set(err, ret, "no migration is in doubt (the source is in state %s)",
                         owner_source_name(report->owner));
    vm_resume(vm);
    return 0;
}
