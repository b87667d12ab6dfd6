// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

#include "migrate/receive_internal.h"

enum {
    VISITOR_MS = 5000, // for the hello of a second connection
    DROP_MS = 3000,    // for the end of a VM that will not run; the source waits longer
};

static bool has_dropped(const struct receive *r)
{
    return r->dropped;
}

// --- second connections of this migration, and questions, while the first one works

static void answer_query(struct receive *r, struct channel *c, const struct wire_hello *hello)
{
    struct wire_answer answer = {.answer = WIRE_ANSWER_UNKNOWN};
    enum owner_action action = OWNER_NONE;
    bool known = !memcmp(hello->id, r->report->id, WIRE_ID_LEN);
    if (known) {
        receive_owner_step(r, DEST_EV_QUERY, &action);
        answer.answer = action == OWNER_SAY_YES ? WIRE_ANSWER_YES : WIRE_ANSWER_NO;
        pthread_mutex_lock(&r->lock);
        if (action == OWNER_SAY_NO)
            channel_shutdown(&r->main); // a COMMIT under way has no effect any more
        pthread_mutex_unlock(&r->lock);
        // On a "no" the source goes on at once, and wants the images that are locked here.
        if (action == OWNER_SAY_NO)
            receive_wait_for(r, has_dropped, DROP_MS);
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

int receive_door_open(struct receive *r, struct error *err)
{
    int ret = pthread_create(&r->door, NULL, door_main, r);
    if (ret)
        return error_set(err, -ret, "cannot start a thread");
    r->door_started = true;
    return 0;
}

void receive_door_close(struct receive *r)
{
    if (!r->door_started)
        return;
    eventfd_write(r->stop_fd, 1);
    pthread_join(r->door, NULL);
    r->door_started = false;
}

// --- the first one

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

int receive_accept(struct receive *r, struct error *err)
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
