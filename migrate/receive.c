// SPDX-License-Identifier: Apache-2.0
#include "migrate/receive.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "migrate/bitmap.h"
#include "migrate/blockmove.h"
#include "migrate/channel.h"
#include "migrate/crc32c.h"
#include "migrate/machine.h"
#include "migrate/pages.h"
#include "migrate/postcopy_dest.h"
#include "migrate/streams_dest.h"
#include "migrate/userfault.h"
#include "vmm/stream.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum {
    VISITOR_MS = 5000,   // for the hello of a second connection
    DROP_MS = 3000,      // for the end of a VM that will not run; the source waits longer
    CANCELLED_MS = 5000, // for the question of a source whose COMMIT crossed the cancel
    PAUSE_MS = 2000,     // a guest without its pages: what is not quiet by then waits for one
};

struct receive {
    int listen_fd;
    const struct migrate_hooks *hooks;
    struct receive_params params;
    struct receive_report *report;
    int cancel_fd; // eventfd: the user gave up
    int stop_fd;   // eventfd: the door thread is to end
    pthread_t door;
    bool door_started;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    enum owner_dest owner;
    bool answered; // the source's question has been answered
    bool dropped;  // the guest will not run here, and nothing of it is left
    bool cancelled;
    struct channel demand; // fd -1 until the door let it in
    struct channel again;  // the same: the source came back after post-copy broke off

    struct channel main;
    unsigned version; // of the format, agreed on
    struct wire_record record;
    struct machine machine;
    struct vm *vm;
    struct page_intake intake;
    struct streams_dest *streams; // NULL: pages come over the main connection; set under the lock
    struct block_intake disks;
    uint64_t *stale;
    uint8_t *state; // the whole blob, read before it is loaded
    uint32_t state_len;
    void *buffer; // post-copy: pages before they are placed
    struct postcopy_dest *postcopy;
    bool was_prepared, stay_paused;
    // We paused the guest because pages cannot come, in a thread of its own (pausing: to be
    // joined).
    pthread_t pauser;
    bool pausing;
    bool halted, paused; // under the lock: it is to stay so; it is
    bool leaving;        // under the lock: the thread ends; the guest goes on unless `ending`
    bool ending;
    pthread_t herald; // of post-copy: calls hooks->arrived
    bool heralding;   // to be joined
};

void receive_params_default(struct receive_params *params)
{
    *params = (struct receive_params) {
        .handshake_ms = CHANNEL_HANDSHAKE_MS, .idle_ms = CHANNEL_IDLE_MS, .linger_ms = 60 * 1000};
}

// --- ownership

// Steps under the lock. -EPROTO: the event has no place in this state.
static int owner_step(struct receive *r, enum owner_dest_event event, enum owner_action *action)
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

static enum owner_dest owner_now(struct receive *r)
{
    pthread_mutex_lock(&r->lock);
    enum owner_dest owner = r->owner;
    pthread_mutex_unlock(&r->lock);
    return owner;
}

// What is waited for, under the lock.
static bool has_answered(const struct receive *r)
{
    return r->answered;
}

static bool has_dropped(const struct receive *r)
{
    return r->dropped;
}

static bool came_back(const struct receive *r)
{
    return r->again.fd >= 0;
}

// A source that comes back has lost the link over which this connection was to follow.
static bool demand_settled(const struct receive *r)
{
    return r->demand.fd >= 0 || came_back(r);
}

// Until it has happened, cancelled, or the time is over. True: it has.
static bool wait_for(struct receive *r, bool (*happened)(const struct receive *),
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

static int wait_demand(struct receive *r, struct error *err)
{
    wait_for(r, demand_settled, r->params.handshake_ms);
    pthread_mutex_lock(&r->lock);
    bool here = r->demand.fd >= 0;
    pthread_mutex_unlock(&r->lock);
    return here ? 0 : error_set(err, -ETIMEDOUT, "the connection for page requests did not come");
}

// --- the door: second connections of this migration, and questions, while the first one works

static void answer_query(struct receive *r, struct channel *c, const struct wire_hello *hello)
{
    struct wire_answer answer = {.answer = WIRE_ANSWER_UNKNOWN};
    enum owner_action action = OWNER_NONE;
    bool known = !memcmp(hello->id, r->report->id, WIRE_ID_LEN);
    if (known) {
        owner_step(r, DEST_EV_QUERY, &action);
        answer.answer = action == OWNER_SAY_YES ? WIRE_ANSWER_YES : WIRE_ANSWER_NO;
        pthread_mutex_lock(&r->lock);
        if (action == OWNER_SAY_NO)
            channel_shutdown(&r->main); // a COMMIT under way has no effect any more
        pthread_mutex_unlock(&r->lock);
        // On a "no" the source goes on at once, and wants the images that are locked here.
        if (action == OWNER_SAY_NO)
            wait_for(r, has_dropped, DROP_MS);
    }
    int ret = wire_put(&c->wire, WIRE_ANSWER, 0, &answer, sizeof(answer), NULL, 0, NULL);
    pthread_mutex_lock(&r->lock);
    r->answered |= known && !ret;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

static int answer_hello(struct channel *c, const struct wire_hello *hello, unsigned *version,
                        struct error *err)
{
    struct wire_hello mine;
    int ret =
        wire_version_choose(WIRE_OLDEST, WIRE_VERSION, hello->oldest, hello->version, version, err);
    if (ret)
        return ret;
    wire_hello_fill(&mine, hello->kind, hello->id);
    mine.version = mine.oldest = (uint16_t)*version;
    return wire_put(&c->wire, WIRE_HELLO, 0, &mine, sizeof(mine), NULL, 0, err);
}

// Hands the demand connection over. False: this is not it.
static bool let_demand_in(struct receive *r, struct channel *c, const struct wire_hello *hello)
{
    pthread_mutex_lock(&r->lock);
    bool wanted = hello->kind == WIRE_DEMAND && r->demand.fd < 0 &&
                  r->machine.flags & WIRE_MACHINE_POSTCOPY &&
                  !memcmp(hello->id, r->report->id, WIRE_ID_LEN);
    pthread_mutex_unlock(&r->lock);
    unsigned version;
    if (!wanted || answer_hello(c, hello, &version, NULL))
        return false;
    pthread_mutex_lock(&r->lock);
    channel_move(&r->demand, c, r->cancel_fd, r->params.idle_ms);
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return true;
}

// One of the page connections.
static bool let_stream_in(struct receive *r, struct channel *c, const struct wire_hello *hello)
{
    pthread_mutex_lock(&r->lock);
    struct streams_dest *streams = r->streams; // freed after the door is closed
    bool wanted = hello->kind == WIRE_STREAM && streams &&
                  !memcmp(hello->id, r->report->id, WIRE_ID_LEN) &&
                  streams_dest_wants(streams, hello->stream);
    pthread_mutex_unlock(&r->lock);
    unsigned version;
    return wanted && !answer_hello(c, hello, &version, NULL) &&
           !streams_dest_take(streams, hello->stream, c, NULL);
}

// The source is back: its old connection is dead, whether we have noticed or not.
static bool let_recover_in(struct receive *r, struct channel *c, const struct wire_hello *hello)
{
    unsigned version;
    pthread_mutex_lock(&r->lock);
    bool wanted =
        hello->kind == WIRE_RECOVER &&
        (r->owner == DEST_LACKING || r->owner == DEST_SEVERED || r->owner == DEST_RUNNING) &&
        r->report->postcopy && !memcmp(hello->id, r->report->id, WIRE_ID_LEN);
    pthread_mutex_unlock(&r->lock);
    if (!wanted || answer_hello(c, hello, &version, NULL))
        return false;
    pthread_mutex_lock(&r->lock);
    channel_close(&r->again); // an attempt that nobody has looked at yet: it has given up
    channel_move(&r->again, c, r->cancel_fd, r->params.handshake_ms);
    channel_shutdown(&r->main);
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return true;
}

static void visitor(struct receive *r, struct channel *c)
{
    struct wire_record record = {0};
    struct wire_hello hello;
    struct error err = {0};
    int ret = channel_accept_secure(c, &r->params.security, &err);
    if (!ret)
        ret = wire_expect(&c->wire, &record, WIRE_HELLO, &err);
    if (!ret)
        ret = wire_hello_parse(&record, &hello, &err);
    if (!ret && hello.kind == WIRE_QUERY) {
        answer_query(r, c, &hello);
    } else if (!ret && !let_demand_in(r, c, &hello) && !let_stream_in(r, c, &hello) &&
               !let_recover_in(r, c, &hello)) {
        error_set(&err, -EBUSY, "this receiver is busy with another migration");
        channel_abort(c, &err);
    }
    wire_record_free(&record);
}

static void *door_main(void *arg)
{
    struct receive *r = arg;
    for (;;) {
        struct channel c;
        struct error err;
        int ret = channel_accept(&c, r->listen_fd, r->stop_fd, 0, VISITOR_MS, &err);
        if (ret == -ECANCELED)
            return NULL;
        if (ret) // out of descriptors, say: try again when some time has passed
            usleep(100 * 1000);
        else
            visitor(r, &c);
        channel_close(&c);
    }
}

static int door_open(struct receive *r, struct error *err)
{
    int ret = pthread_create(&r->door, NULL, door_main, r);
    if (ret)
        return error_set(err, -ret, "cannot start a thread");
    r->door_started = true;
    return 0;
}

static void door_close(struct receive *r)
{
    if (!r->door_started)
        return;
    eventfd_write(r->stop_fd, 1);
    pthread_join(r->door, NULL);
    r->door_started = false;
}

// --- arrival

static int first_hello(struct receive *r, struct error *err)
{
    struct wire_hello hello;
    int ret = channel_accept_secure(&r->main, &r->params.security, err);
    if (!ret)
        ret = wire_expect(&r->main.wire, &r->record, WIRE_HELLO, err);
    if (!ret)
        ret = wire_hello_parse(&r->record, &hello, err);
    if (ret)
        return ret;
    memcpy(r->report->id, hello.id, WIRE_ID_LEN);
    if (hello.kind == WIRE_QUERY) {
        struct wire_answer answer = {.answer = WIRE_ANSWER_UNKNOWN};
        wire_put(&r->main.wire, WIRE_ANSWER, 0, &answer, sizeof(answer), NULL, 0, NULL);
        return error_set(err, -ENOENT, "a question about a migration this receiver never saw");
    }
    if (hello.kind == WIRE_RECOVER)
        return error_set(err, -ENOENT, "no post-copy of this migration has broken off here");
    if (hello.kind != WIRE_MAIN)
        return error_set(err, -EPROTO, "a migration must begin with its main connection");
    return answer_hello(&r->main, &hello, &r->version, err);
}

static int accept_migration(struct receive *r, struct error *err)
{
    for (;;) {
        int ret =
            channel_accept(&r->main, r->listen_fd, r->cancel_fd, 0, r->params.handshake_ms, err);
        if (ret)
            return ret;
        ret = first_hello(r, err);
        if (!ret)
            return 0;
        channel_abort(&r->main, err);
        if (r->params.one_try || ret == -ECANCELED)
            return ret;
        channel_close(&r->main);
    }
}

static int expect_streams(struct receive *r, struct error *err)
{
    struct streams_dest *streams;
    if (r->version < 2)
        return error_set(err, -EPROTO, "machine record: version 1 has no page connections");
    int ret = streams_dest_create(&streams, r->machine.streams, &r->intake, &r->main,
                                  r->params.idle_ms, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&r->lock);
    r->streams = streams;
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static int take_disks(struct receive *r, struct error *err)
{
    int ret = wire_expect(&r->main.wire, &r->record, WIRE_DISKS, err);
    if (!ret)
        ret = block_intake_disks(&r->disks, r->vm, &r->record, err);
    return ret ? ret : block_intake_kept(&r->disks, &r->main.wire, err);
}

static int take_machine(struct receive *r, struct error *err)
{
    struct machine machine;
    int ret = wire_expect(&r->main.wire, &r->record, WIRE_MACHINE, err);
    if (!ret)
        ret = machine_parse(&r->record, &machine, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&r->lock); // the door looks at the flags
    r->machine = machine;
    pthread_mutex_unlock(&r->lock);
    if (r->params.ram_max && machine.ram_size > r->params.ram_max)
        return error_set(err, -E2BIG, "a guest of %llu MiB: this receiver takes at most %llu MiB",
                         (unsigned long long)(machine.ram_size / MiB),
                         (unsigned long long)(r->params.ram_max / MiB));
    ret = machine_build(&r->machine, r->hooks, &r->vm, err);
    if (!ret && machine.flags & WIRE_MACHINE_DISKS)
        ret = take_disks(r, err);
    if (!ret)
        ret = page_intake_init(&r->intake, &r->vm->ram, err);
    if (!ret && machine.flags & WIRE_MACHINE_POSTCOPY) {
        int probe = -1; // better now than at the switch
        ret = uffd_open(&probe, "post-copy", 0, err);
        if (!ret)
            close(probe);
        r->stale = calloc(ram_bitmap_words(&r->vm->ram), 8);
        r->buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
        if (!ret && (!r->stale || !r->buffer))
            ret = error_set(err, -ENOMEM, "no memory for post-copy");
    }
    if (!ret && machine.streams)
        ret = expect_streams(r, err);
    r->main.timeout_ms = r->params.idle_ms;
    return ret ? ret : wire_put(&r->main.wire, WIRE_READY, 0, NULL, 0, NULL, 0, err);
}

static int take_state(struct receive *r, struct error *err)
{
    struct wire_state head;
    wire_fixed(&r->record, &head, sizeof(head));
    if (head.len != r->record.header.data_len || r->state)
        return error_set(err, -EPROTO, "state record: %u bytes, header says %u%s", head.len,
                         r->record.header.data_len, r->state ? "; it comes twice" : "");
    r->state = malloc(head.len ? head.len : 1);
    if (!r->state)
        return error_set(err, -ENOMEM, "no memory for %u bytes of state", head.len);
    r->state_len = head.len;
    int ret = wire_read(&r->main.wire, r->state, head.len, err);
    if (!ret && crc32c(0, r->state, head.len) != head.crc)
        ret = error_set(err, -EBADMSG, "%s at byte %llu: guest state damaged on the way",
                        r->main.wire.name, (unsigned long long)r->record.offset);
    return ret;
}

static int echo_round(struct receive *r, struct error *err)
{
    struct wire_round round;
    wire_fixed(&r->record, &round, sizeof(round));
    int ret = r->streams && !r->postcopy ? streams_dest_wait(r->streams, round.pass, err) : 0;
    if (!ret)
        ret = block_intake_sync(&r->disks, err);
    return ret ? ret : wire_put(&r->main.wire, WIRE_ROUND, 0, &round, sizeof(round), NULL, 0, err);
}

// Gives stale pages back at once: that takes long, and the guest may still be running over there.
static int take_discard(struct receive *r, struct error *err)
{
    struct ram *ram = &r->vm->ram;
    if (!r->stale)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    int ret = wire_discard_parse(&r->record, ram->pages, r->stale, err);
    if (r->streams)
        streams_dest_hold(r->streams);
    for (uint64_t first = 0; !ret;) {
        first = bitmap_find(r->stale, ram->pages, first, true);
        if (first == ram->pages)
            break;
        uint64_t end = bitmap_find(r->stale, ram->pages, first, false);
        // Zero pages never were placed.
        first = bitmap_find(r->intake.touched, end, first, true);
        uint64_t stop = bitmap_find(r->intake.touched, end, first, false);
        if (first < stop)
            ret = ram_drop(ram, first, stop - first, err);
        bitmap_fill(r->intake.touched, first, stop - first, false);
        first = stop;
    }
    if (r->streams)
        streams_dest_go_on(r->streams);
    return ret;
}

static int take_packed(struct receive *r, struct error *err)
{
    if (r->version < 2 || r->streams || r->machine.flags & WIRE_MACHINE_SHARED)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    if (!r->buffer)
        r->buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
    if (!r->buffer)
        return error_set(err, -ENOMEM, "no memory to unpack pages");
    return page_intake_packed(&r->intake, &r->main.wire, &r->record, r->buffer, err);
}

// The same host: the guest's memory itself. It goes on running over there until the switch, so
// nothing here looks at it before.
static int take_handed(struct receive *r, struct error *err)
{
    struct wire_memory memory;
    struct ram *ram = &r->vm->ram;
    wire_fixed(&r->record, &memory, sizeof(memory));
    if (!(r->machine.flags & WIRE_MACHINE_SHARED) || r->intake.nr_seen)
        return wire_unexpected(&r->main.wire, &r->record, "pages", err);
    autoclose int fd = -1;
    int ret = channel_recv_fd(&r->main, &fd, err);
    if (!ret && memory.size != ram->size)
        ret = error_set(err, -EPROTO, "memory record: %llu bytes, the guest has %llu",
                        (unsigned long long)memory.size, (unsigned long long)ram->size);
    if (!ret)
        ret = ram_adopt(ram, fd, err);
    if (ret)
        return ret;
    take_fd(&fd);
    bitmap_fill(r->intake.seen, 0, ram->pages, true);
    r->intake.nr_seen = ram->pages;
    return 0;
}

// Everything up to PREPARE, which is left in r->record.
static int take_records(struct receive *r, struct error *err)
{
    for (;;) {
        int ret = wire_get(&r->main.wire, &r->record, err);
        if (ret)
            return ret;
        switch (r->record.header.type) {
        case WIRE_PAGES:
            if (r->machine.flags & WIRE_MACHINE_SHARED || r->streams)
                return wire_unexpected(&r->main.wire, &r->record, "memory, state or prepare", err);
            ret = page_intake_record(&r->intake, &r->main.wire, &r->record, err);
            break;
        case WIRE_MEMORY:
            ret = take_handed(r, err);
            break;
        case WIRE_PACKED:
            ret = take_packed(r, err);
            break;
        case WIRE_BLOCKS:
            ret = block_intake_record(&r->disks, &r->main.wire, &r->record, err);
            break;
        case WIRE_ROUND:
            ret = echo_round(r, err);
            break;
        case WIRE_DISCARD:
            ret = take_discard(r, err);
            break;
        case WIRE_STATE:
            ret = take_state(r, err);
            break;
        case WIRE_PREPARE:
            return 0;
        default:
            ret = wire_unexpected(&r->main.wire, &r->record, "pages, state or prepare", err);
        }
        if (ret)
            return ret;
    }
}

static int take_memory(struct receive *r, struct error *err)
{
    struct wire_prepare prep;
    int ret = take_records(r, err);
    if (!r->streams)
        return ret;
    if (!ret) {
        wire_fixed(&r->record, &prep, sizeof(prep));
        ret = streams_dest_wait(r->streams, prep.pass, err);
    }
    ret = ret ? streams_dest_cause(r->streams, ret, err) : 0;
    streams_dest_end(r->streams);
    return ret;
}

static int check_precopy(struct receive *r, struct error *err)
{
    uint64_t pages = r->vm->ram.pages;
    if (r->intake.nr_seen != pages)
        return error_set(err, -EPROTO, "%llu of %llu pages never came",
                         (unsigned long long)(pages - r->intake.nr_seen),
                         (unsigned long long)pages);
    if (r->intake.nr_damaged)
        return error_set(err, -EBADMSG, "page %llu was damaged on the way",
                         (unsigned long long)bitmap_find(r->intake.damaged, pages, 0, true));
    return 0;
}

// Pages are valid here when they came and are not stale.
static int begin_postcopy(struct receive *r, uint64_t stale, struct error *err)
{
    uint64_t pages = r->vm->ram.pages;
    if (!r->stale || bitmap_count(r->stale, pages) != stale)
        return error_set(err, -EPROTO, "prepare record: %llu pages stale, the list differs",
                         (unsigned long long)stale);
    for (size_t i = 0; i < bitmap_words(pages); i++) {
        if (r->intake.damaged[i] & ~r->stale[i])
            return error_set(err, -EBADMSG, "a page near %zu was damaged on the way", i * 64);
        r->intake.seen[i] &= ~r->stale[i];
    }
    if (bitmap_count(r->intake.seen, pages) != pages - stale)
        return error_set(err, -EPROTO, "pages neither came nor are to come");
    int ret = wait_demand(r, err);
    if (ret)
        return ret;
    r->demand.cancel_fd = -1; // a cancel is seen on the main connection, while it has effect
    return postcopy_dest_create(&r->postcopy, &r->vm->ram, r->intake.seen, &r->demand, err);
}

static int prepare(struct receive *r, struct error *err)
{
    struct wire_prepare prep;
    uint64_t start = time_ns();
    wire_fixed(&r->record, &prep, sizeof(prep));
    if (prep.flags & ~(uint32_t)(WIRE_PREPARE_POSTCOPY | WIRE_PREPARE_STAY_PAUSED))
        return error_set(err, -EPROTO, "prepare record: flags 0x%x are not known", prep.flags);
    if (!r->state)
        return error_set(err, -EPROTO, "prepare record without state");
    r->stay_paused = prep.flags & WIRE_PREPARE_STAY_PAUSED;
    r->report->postcopy = prep.flags & WIRE_PREPARE_POSTCOPY;
    int ret = r->report->postcopy ? begin_postcopy(r, prep.stale, err) : check_precopy(r, err);
    if (ret)
        return ret;
    ret = block_intake_sync(&r->disks, err);
    if (ret)
        return ret;
    struct stream_mem blob;
    stream_mem_reader(&blob, "guest state", r->state, r->state_len);
    ret = vm_load(r->vm, &blob.stream, err);
    if (r->postcopy) { // why loading failed, if it did: what it read was not the guest's
        struct error why = {0};
        int failed = postcopy_dest_loaded(r->postcopy, &why);
        if (failed) {
            ret = failed;
            *err = why;
        }
    }
    r->vm->moved = true;
    r->report->load_ns = time_ns() - start;
    return ret;
}

static int take_commit(struct receive *r, struct error *err)
{
    struct wire_commit commit;
    struct wire_times times = {.load_ns = r->report->load_ns};
    enum owner_action action;
    int ret = owner_step(r, DEST_EV_LOADED, &action);
    if (ret || owner_now(r) != DEST_PREPARED)
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

static void herald_end(struct receive *r)
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
        else if (r->record.header.type == WIRE_ROUND)
            ret = echo_round(r, err);
        else
            ret = wire_unexpected(&r->main.wire, &r->record, "pages or end", err);
        if (ret)
            return ret;
    }
    int ret = postcopy_dest_wait(r->postcopy, r->params.idle_ms, err);
    if (ret)
        return ret;
    herald_end(r); // whoever hears that it is complete finds it listening
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
        wait_for(r, has_answered, r->params.linger_ms);
}

// --- post-copy, and what happens when it breaks off

// Everything is here and the source knows, or it is not.
static int postcopy_finish(struct receive *r, struct error *err)
{
    enum owner_action action;
    int ret = take_pushed(r, err);
    if (!postcopy_dest_missing(r->postcopy))
        owner_step(r, DEST_EV_WHOLE, &action);
    // Until it has said good-bye the source may believe that it still owes pages.
    return ret ? ret : wire_expect(&r->main.wire, &r->record, WIRE_BYE, err);
}

static bool has_paused(const struct receive *r)
{
    return r->paused;
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

static void pauser_end(struct receive *r)
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
        pauser_end(r);
        if (vm_paused(r->vm)) // by somebody else, who will let it go on
            return;
        r->paused = r->leaving = false;
        r->halted = true;
        r->pausing = !pthread_create(&r->pauser, NULL, pauser_main, r);
    }
    if (r->pausing)
        wait_for(r, has_paused, PAUSE_MS);
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
    owner_step(r, DEST_EV_LOST, &action);
    if (action != OWNER_HOLD)
        return;
    halt(r);
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
        ret = wait_demand(r, err);
    if (ret)
        return ret;
    r->demand.cancel_fd = -1;
    r->main.timeout_ms = r->params.idle_ms;
    r->report->recoveries++;
    ret = postcopy_dest_resume(r->postcopy, err);
    owner_step(r, DEST_EV_RECOVER, &action);
    if (ret)
        return ret;
    unhalt(r); // pages come again: whoever waits for one gets on
    if (r->hooks->severed)
        r->hooks->severed(r->hooks->context, r->vm, NULL);
    return ret;
}

// Until every page is here, over as many connections as it takes.
static int postcopy_settle(struct receive *r, int ret, struct error *err)
{
    if (!ret)
        ret = postcopy_finish(r, err);
    while (ret) {
        sever(r, err);
        // A whole guest needs nobody; the source may still want to hear that.
        unsigned wait_ms = r->report->missing_pages ? r->params.recover_ms : r->params.linger_ms;
        if (!wait_for(r, came_back, wait_ms ? wait_ms : UINT_MAX))
            break;
        ret = rejoin(r, err);
        if (!ret)
            ret = postcopy_finish(r, err);
    }
    if (r->report->missing_pages && ret)
        return ret;
    r->report->missing_pages = 0;
    unhalt(r);
    pauser_end(r);
    postcopy_dest_free(r->postcopy);
    r->postcopy = NULL;
    return 0;
}

static int settle(struct receive *r, int ret, struct error *err)
{
    enum owner_action action;
    if (r->postcopy) {
        ret = postcopy_settle(r, ret, err);
        herald_end(r);
        return ret;
    }
    owner_step(r, DEST_EV_WHOLE, &action);
    see_off(r, ret);
    return 0;
}

// Cancelled, too, and until cancelled once more: without an answer the source would be in doubt.
static void stay_for_question(struct receive *r)
{
    unsigned ms = r->params.linger_ms;
    pthread_mutex_lock(&r->lock);
    if (r->cancelled && ms > CANCELLED_MS)
        ms = CANCELLED_MS;
    r->cancelled = false;
    pthread_mutex_unlock(&r->lock);
    wait_for(r, has_answered, ms);
}

// Before COMMIT: nothing is left. If COMMIT may be under way, the source will ask: say no.
static void give_up(struct receive *r, int ret, struct error *err)
{
    enum owner_action action;
    owner_step(r, ret == -ECANCELED ? DEST_EV_CANCEL : DEST_EV_LOST, &action);
    if (r->streams)
        streams_dest_end(r->streams); // the VM goes whose memory they fill
    postcopy_dest_free(r->postcopy);
    r->postcopy = NULL;
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
    channel_shutdown(&r->main); // not close: the door may be looking at it
    if (r->was_prepared)
        stay_for_question(r);
    door_close(r);
}

int receive_run(struct receive *r, struct vm **vm, struct receive_report *report, struct error *err)
{
    struct error local;
    err = err ? err : &local;
    *report = (struct receive_report) {0};
    r->report = report;
    *vm = NULL;
    thread_prompt(); // at the switch the guest waits, and its vCPUs must not keep RUNNING back
    int ret = accept_migration(r, err);
    if (!ret)
        ret = door_open(r, err);
    if (!ret)
        ret = take_machine(r, err);
    if (!ret)
        ret = take_memory(r, err);
    if (!ret)
        ret = prepare(r, err);
    if (!ret)
        ret = take_commit(r, err);
    if (ret) {
        give_up(r, ret, err);
    } else {
        *vm = r->vm;
        ret = run(r, err);
        ret = settle(r, ret, err);
    }
    door_close(r);
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
    enum owner_dest owner = owner_now(r);
    if (owner == DEST_WAITING || owner == DEST_PREPARED || owner == DEST_ABORTED)
        eventfd_write(r->cancel_fd, 1);
}

void receive_free(struct receive *r)
{
    if (!r)
        return;
    postcopy_dest_free(r->postcopy);
    pthread_mutex_lock(&r->lock);
    r->ending = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    pauser_end(r);
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
