// SPDX-License-Identifier: Apache-2.0
// Several page connections, the side that sends (wire.h): each is a migration of its own that knows
// a shard of the pages (pages.h), with its own packer, and sends in a thread of its own. A pass
// ends when all of them have sent what they have of `todo`; on the other side, when the ROUND of
// each has come.
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/outgoing.h"
#include "vmm/bitmap.h"

enum {
    PROGRESS_MS = 200,
    REASON_MS = 2000, // for the other side's word why it gave up
};

struct sender {
    struct streams_source *all;
    struct outgoing out;
    struct migrate_report report;
    pthread_t thread;
    bool started;
};

struct streams_source {
    unsigned nr;
    _Atomic uint64_t moved, earliest, taken; // channel.h; pages, of this pass
    pthread_mutex_t lock;                    // guards what follows
    pthread_cond_t changed;
    uint32_t pass;
    unsigned busy; // senders that have not ended it
    bool quit;
    int failure; // of the first that failed
    struct error err;
    struct sender sender[];
};

static int send_pass(struct sender *s, uint32_t pass, struct error *err)
{
    struct wire_round round = {.pass = pass, .data_pages = s->report.data_pages};
    s->out.packer.again = pass > 1;
    int ret = precopy_pass(&s->out, err);
    return ret ? ret
               : wire_put(&s->out.main.wire, WIRE_ROUND, 0, &round, sizeof(round), NULL, 0, err);
}

static void *sender_main(void *arg)
{
    struct sender *s = arg;
    struct streams_source *ss = s->all;
    char name[16];
    snprintf(name, sizeof(name), "pages%u", s->out.shard.index);
    pthread_setname_np(pthread_self(), name);
    pthread_mutex_lock(&ss->lock);
    for (uint32_t done = 0; !ss->quit;) {
        if (ss->pass == done) {
            pthread_cond_wait(&ss->changed, &ss->lock);
            continue;
        }
        done = ss->pass;
        pthread_mutex_unlock(&ss->lock);
        struct error err = {0};
        int ret = send_pass(s, done, &err);
        pthread_mutex_lock(&ss->lock);
        if (ret && !ss->failure) {
            ss->failure = ret;
            ss->err = err;
            for (unsigned i = 0; i < ss->nr; i++) // a pass without it is of no use
                channel_shutdown(&ss->sender[i].out.main);
        }
        ss->busy--;
        pthread_cond_broadcast(&ss->changed);
    }
    pthread_mutex_unlock(&ss->lock);
    return NULL;
}

// --- life

static int say_hello(struct sender *s, struct error *err)
{
    struct outgoing *out = &s->out;
    struct wire_hello hello, answer;
    wire_hello_fill(&hello, WIRE_STREAM, s->report.id);
    hello.stream = (uint16_t)out->shard.index;
    int ret = wire_put(&out->main.wire, WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0, err);
    if (!ret)
        ret = wire_expect(&out->main.wire, &out->record, WIRE_HELLO, err);
    if (!ret)
        ret = wire_hello_parse(&out->record, &answer, err);
    if (!ret && (memcmp(answer.id, hello.id, WIRE_ID_LEN) || answer.kind != hello.kind))
        ret = error_set(err, -EPROTO, "%s: answers for another migration", out->main.name);
    return ret;
}

static int sender_open(struct sender *s, struct error *err)
{
    struct outgoing *out = &s->out;
    const struct migrate_params *p = out->params;
    out->batch = malloc(sizeof(*out->batch));
    if (!out->batch)
        return error_set(err, -ENOMEM, "no memory for a page connection");
    page_presence_init(&out->presence);
    packer_init(&out->packer, &out->vm->ram, p->compress, p->delta_cache / s->all->nr);
    int ret = channel_connect_secure(&out->main, p->to, &p->security, out->m->cancel_fd,
                                     p->handshake_ms, err);
    if (!ret)
        ret = say_hello(s, err);
    if (ret)
        return error_prefix(err, "page connection %u", out->shard.index);
    out->main.timeout_ms = p->idle_ms;
    out->main.limit = &out->m->bandwidth;
    out->main.moved = &s->all->moved;
    out->main.earliest = &s->all->earliest;
    ret = pthread_create(&s->thread, NULL, sender_main, s);
    s->started = !ret;
    return ret ? error_set(err, -ret, "page connection: cannot start a thread") : 0;
}

int streams_open(struct outgoing *out, struct error *err)
{
    unsigned nr = outgoing_streams(out);
    if (!nr)
        return 0;
    if (out->version < 2)
        return error_set(err, -EPROTONOSUPPORT, "%s is too old for several connections",
                         out->main.name);
    struct streams_source *ss = calloc(1, sizeof(*ss) + nr * sizeof(ss->sender[0]));
    if (!ss)
        return error_set(err, -ENOMEM, "no memory for %u page connections", nr);
    out->streams = ss;
    ss->nr = nr;
    pthread_mutex_init(&ss->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&ss->changed, &attr);
    pthread_condattr_destroy(&attr);
    for (unsigned i = 0; i < nr; i++) {
        struct sender *s = &ss->sender[i];
        s->all = ss;
        memcpy(s->report.id, out->report->id, WIRE_ID_LEN);
        s->out = (struct outgoing) {.vm = out->vm,
                                    .params = out->params,
                                    .m = out->m,
                                    .report = &s->report,
                                    .main = {.fd = -1},
                                    .demand = {.fd = -1},
                                    .todo = out->todo,
                                    .presence = {.pagemap_fd = -1},
                                    .version = out->version,
                                    .shard = {.index = i, .count = nr},
                                    .taken = &ss->taken};
    }
    int ret = 0;
    for (unsigned i = 0; !ret && i < nr; i++)
        ret = sender_open(&ss->sender[i], err);
    if (!ret)
        out->main.moved = &ss->moved;
    return ret;
}

void streams_close(struct outgoing *out)
{
    struct streams_source *ss = out->streams;
    if (!ss)
        return;
    pthread_mutex_lock(&ss->lock);
    ss->quit = true;
    pthread_cond_broadcast(&ss->changed);
    pthread_mutex_unlock(&ss->lock);
    for (unsigned i = 0; i < ss->nr; i++) {
        struct sender *s = &ss->sender[i];
        if (s->started)
            pthread_join(s->thread, NULL);
        out->report->wire_bytes += s->out.main.wire.out;
        out->report->lz4_pages += s->out.packer.lz4_pages;
        out->report->lz4_bytes += s->out.packer.lz4_bytes;
        out->report->delta_pages += s->out.packer.delta_pages;
        out->report->delta_bytes += s->out.packer.delta_bytes;
        packer_free(&s->out.packer);
        page_presence_free(&s->out.presence);
        wire_record_free(&s->out.record);
        channel_close(&s->out.main);
        free(s->out.batch);
    }
    pthread_cond_destroy(&ss->changed);
    pthread_mutex_destroy(&ss->lock);
    free(ss);
    out->main.moved = NULL;
    out->streams = NULL;
}

// --- passes

uint32_t streams_passes(const struct outgoing *out)
{
    return out->streams ? out->streams->pass : 0; // only this thread begins one
}

uint64_t outgoing_bytes(const struct outgoing *out)
{
    return out->streams ? atomic_load(&out->streams->moved) : out->main.wire.out;
}

// The other side may have said on the main connection why it has hung up.
static int reason(struct outgoing *out, int ret, struct error *err)
{
    struct error said;
    if (ret == -ECANCELED)
        return ret;
    out->main.timeout_ms = REASON_MS;
    if (wire_expect(&out->main.wire, &out->record, WIRE_ROUND, &said) != -EREMOTEIO)
        return ret;
    *err = said;
    return -EREMOTEIO;
}

int streams_pass(struct outgoing *out, struct error *err)
{
    struct streams_source *ss = out->streams;
    uint64_t pages = bitmap_count(out->todo, out->vm->ram.pages);
    pthread_mutex_lock(&ss->lock);
    for (unsigned i = 0; i < ss->nr; i++)
        ss->sender[i].out.presence.hinted = out->presence.hinted;
    atomic_store(&ss->taken, 0);
    ss->pass++;
    ss->busy = ss->nr;
    pthread_cond_broadcast(&ss->changed);
    while (ss->busy) {
        struct timespec end = time_deadline(PROGRESS_MS);
        if (!pthread_cond_timedwait(&ss->changed, &ss->lock, &end) || out->owner != SOURCE_RUNNING)
            continue;
        pthread_mutex_unlock(&ss->lock);
        squeeze_look(out);
        outgoing_progress(out, MIGRATE_ROUNDS, (pages - atomic_load(&ss->taken)) * PAGE_SIZE);
        pthread_mutex_lock(&ss->lock);
    }
    int ret = ss->failure;
    if (ret)
        *err = ss->err;
    pthread_mutex_unlock(&ss->lock);
    for (unsigned i = 0; i < ss->nr; i++) {
        out->report->data_pages += ss->sender[i].report.data_pages;
        out->report->zero_pages += ss->sender[i].report.zero_pages;
        ss->sender[i].report.data_pages = ss->sender[i].report.zero_pages = 0;
        out->presence.nr_free += ss->sender[i].out.presence.nr_free;
        ss->sender[i].out.presence.nr_free = 0;
        ss->sender[i].out.presence.hinted = NULL; // the bitmap goes
    }
    return ret ? reason(out, ret, err) : 0;
}
