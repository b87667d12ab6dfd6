// SPDX-License-Identifier: Apache-2.0
#include "migrate/streams_dest.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#include "vmm/util.h"

enum { LOOK_MS = 200 }; // how often a wait looks whether it has been cancelled

struct stream {
    struct streams_dest *all;
    unsigned index;
    pthread_t thread;
    bool started;
    struct channel channel;    // fd -1 until it has come
    struct page_intake intake; // the bitmaps are everybody's, the counts its own
    struct wire_record record;
    uint8_t *buffer; // of packed pages
    uint32_t pass;   // ended; guarded by the lock
};

struct streams_dest {
    struct page_intake *intake;
    struct channel *main;
    unsigned idle_ms;
    _Atomic uint64_t moved;   // bytes, of all
    pthread_rwlock_t placing; // read by who places pages
    pthread_mutex_t lock;     // guards what follows
    pthread_cond_t changed;
    bool ended;
    int failure; // of the first that failed
    struct error err;
    unsigned nr;
    struct stream stream[];
};

int streams_dest_create(struct streams_dest **out, unsigned nr, struct page_intake *intake,
                        struct channel *main, unsigned idle_ms, struct error *err)
{
    struct streams_dest *sd = calloc(1, sizeof(*sd) + nr * sizeof(sd->stream[0]));
    if (!sd)
        return error_set(err, -ENOMEM, "no memory for %u page connections", nr);
    sd->intake = intake;
    sd->main = main;
    sd->idle_ms = idle_ms;
    sd->nr = nr;
    pthread_rwlock_init(&sd->placing, NULL);
    pthread_mutex_init(&sd->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&sd->changed, &attr);
    pthread_condattr_destroy(&attr);
    for (unsigned i = 0; i < nr; i++)
        sd->stream[i] = (struct stream) {.all = sd,
                                         .index = i,
                                         .channel = {.fd = -1},
                                         .intake = {.ram = intake->ram,
                                                    .seen = intake->seen,
                                                    .touched = intake->touched,
                                                    .damaged = intake->damaged,
                                                    .shard = {.index = i, .count = nr}}};
    main->moved = &sd->moved;
    *out = sd;
    return 0;
}

// --- one connection

static int end_pass(struct stream *s, struct error *err)
{
    struct wire_round round;
    wire_fixed(&s->record, &round, sizeof(round));
    pthread_mutex_lock(&s->all->lock);
    uint32_t next = s->pass + 1;
    if (round.pass == next)
        s->pass = next;
    pthread_cond_broadcast(&s->all->changed);
    pthread_mutex_unlock(&s->all->lock);
    return round.pass == next ? 0
                              : error_set(err, -EPROTO, "%s: end of pass %u, expected %u",
                                          s->channel.name, round.pass, next);
}

static int take_packed(struct stream *s, struct error *err)
{
    if (!s->buffer)
        s->buffer = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
    if (!s->buffer)
        return error_set(err, -ENOMEM, "no memory to unpack pages");
    return page_intake_packed(&s->intake, &s->channel.wire, &s->record, s->buffer, err);
}

static int take_record(struct stream *s, struct error *err)
{
    struct wire *w = &s->channel.wire;
    int ret = wire_get(w, &s->record, err);
    if (ret)
        return ret;
    pthread_rwlock_rdlock(&s->all->placing);
    switch (s->record.header.type) {
    case WIRE_PAGES:
        ret = page_intake_record(&s->intake, w, &s->record, err);
        break;
    case WIRE_PACKED:
        ret = take_packed(s, err);
        break;
    case WIRE_ROUND:
        ret = end_pass(s, err);
        break;
    default:
        ret = wire_unexpected(w, &s->record, "pages or round", err);
    }
    pthread_rwlock_unlock(&s->all->placing);
    return ret;
}

static void *stream_main(void *arg)
{
    struct stream *s = arg;
    struct streams_dest *sd = s->all;
    struct error err = {0};
    int ret;
    char name[16];
    snprintf(name, sizeof(name), "pages%u", s->index);
    pthread_setname_np(pthread_self(), name);
    do
        ret = take_record(s, &err);
    while (!ret);
    pthread_mutex_lock(&sd->lock);
    if (!sd->ended && !sd->failure) {
        sd->failure = ret;
        sd->err = err;
        // Writing goes on working: the source is to hear why.
        shutdown(sd->main->fd, SHUT_RD);
    }
    pthread_cond_broadcast(&sd->changed);
    pthread_mutex_unlock(&sd->lock);
    return NULL;
}

bool streams_dest_wants(struct streams_dest *sd, unsigned index)
{
    pthread_mutex_lock(&sd->lock);
    bool wants = !sd->ended && index < sd->nr && !sd->stream[index].started;
    pthread_mutex_unlock(&sd->lock);
    return wants;
}

int streams_dest_take(struct streams_dest *sd, unsigned index, struct channel *c, struct error *err)
{
    struct stream *s = &sd->stream[index];
    int ret = 0;
    pthread_mutex_lock(&sd->lock);
    if (sd->ended || s->started) {
        ret = error_set(err, -ECANCELED, "page connection %u is not expected", index);
    } else {
        channel_move(&s->channel, c, sd->main->cancel_fd, sd->idle_ms);
        s->channel.moved = &sd->moved;
        ret = pthread_create(&s->thread, NULL, stream_main, s);
        s->started = !ret;
        if (ret)
            ret = error_set(err, -ret, "cannot start a thread");
    }
    pthread_mutex_unlock(&sd->lock);
    return ret;
}

// --- what the main connection does with them

static bool all_ended(const struct streams_dest *sd, uint32_t pass)
{
    for (unsigned i = 0; i < sd->nr; i++)
        if (sd->stream[i].pass < pass)
            return false;
    return true;
}

// Under the lock.
static int cause(const struct streams_dest *sd, int ret, struct error *err)
{
    if (!sd->failure)
        return ret;
    *err = sd->err;
    return sd->failure;
}

int streams_dest_wait(struct streams_dest *sd, uint32_t pass, struct error *err)
{
    struct pollfd cancel = {.fd = sd->main->cancel_fd, .events = POLLIN};
    uint64_t seen = atomic_load(&sd->moved), quiet_ns = time_ns();
    int ret = 0;
    pthread_mutex_lock(&sd->lock);
    while (!ret && !sd->failure && !all_ended(sd, pass)) {
        struct timespec end = time_deadline(LOOK_MS);
        pthread_cond_timedwait(&sd->changed, &sd->lock, &end);
        uint64_t moved = atomic_load(&sd->moved);
        if (moved != seen)
            quiet_ns = time_ns();
        seen = moved;
        if (sd->idle_ms && time_ns() - quiet_ns > sd->idle_ms * 1000000ull)
            ret = error_set(err, -ETIMEDOUT, "nothing moved on the page connections for %u ms",
                            sd->idle_ms);
        if (poll(&cancel, 1, 0) > 0)
            ret = error_set(err, -ECANCELED, "cancelled while pages came");
    }
    ret = cause(sd, ret, err);
    pthread_mutex_unlock(&sd->lock);
    return ret;
}

void streams_dest_hold(struct streams_dest *sd)
{
    pthread_rwlock_wrlock(&sd->placing);
}

void streams_dest_go_on(struct streams_dest *sd)
{
    pthread_rwlock_unlock(&sd->placing);
}

int streams_dest_cause(struct streams_dest *sd, int ret, struct error *err)
{
    pthread_mutex_lock(&sd->lock);
    ret = cause(sd, ret, err);
    pthread_mutex_unlock(&sd->lock);
    return ret;
}

void streams_dest_end(struct streams_dest *sd)
{
    pthread_mutex_lock(&sd->lock);
    bool before = sd->ended;
    sd->ended = true;
    pthread_mutex_unlock(&sd->lock);
    if (before)
        return;
    for (unsigned i = 0; i < sd->nr; i++)
        channel_shutdown(&sd->stream[i].channel);
    for (unsigned i = 0; i < sd->nr; i++) {
        struct stream *s = &sd->stream[i];
        if (s->started)
            pthread_join(s->thread, NULL);
        channel_close(&s->channel);
        wire_record_free(&s->record);
        free(s->buffer);
        sd->intake->nr_seen += s->intake.nr_seen;
        sd->intake->nr_damaged += s->intake.nr_damaged;
        sd->intake->nr_data += s->intake.nr_data;
        sd->intake->nr_zero += s->intake.nr_zero;
    }
    sd->main->moved = NULL;
}

void streams_dest_free(struct streams_dest *sd)
{
    if (!sd)
        return;
    streams_dest_end(sd);
    pthread_cond_destroy(&sd->changed);
    pthread_mutex_destroy(&sd->lock);
    pthread_rwlock_destroy(&sd->placing);
    free(sd);
}
