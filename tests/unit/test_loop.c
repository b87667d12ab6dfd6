// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vmm/loop.h"
#include "vmm/util.h"

static struct loop *loop_new(void)
{
    struct loop *loop;
    struct error err;
    ck_assert_msg(!loop_create(&loop, &err), "%s", err.text);
    return loop;
}

static void run(struct loop *loop)
{
    struct error err;
    ck_assert_msg(!loop_run(loop, &err), "%s", err.text);
}

// --- watches

struct reader {
    struct loop_watch watch; // first, so that callbacks can cast
    int fds[2];
    unsigned calls, bytes, stop_after;
    uint32_t revents;
    bool closed, free_when_closed;
};

static void reader_closed(struct loop_watch *watch)
{
    struct reader *r = (struct reader *)watch;
    r->closed = true;
    if (r->free_when_closed)
        free(r);
}

static void reader_ready(struct loop_watch *watch, uint32_t revents)
{
    struct reader *r = (struct reader *)watch;
    char buffer[256];
    ssize_t n;
    r->calls++;
    r->revents |= revents;
    while ((n = read(r->fds[0], buffer, sizeof(buffer))) > 0)
        r->bytes += (unsigned)n;
    if (r->bytes >= r->stop_after)
        loop_stop(watch->loop);
}

static void reader_open(struct reader *r, struct loop *loop, unsigned stop_after)
{
    struct error err;
    r->stop_after = stop_after;
    ck_assert_int_eq(pipe2(r->fds, O_CLOEXEC | O_NONBLOCK), 0);
    ck_assert_int_eq(loop_watch(loop, &r->watch, r->fds[0], POLLIN, reader_ready, &err), 0);
}

START_TEST(watch_sees_every_write)
{
    struct loop *loop = loop_new();
    struct reader r = {0};
    reader_open(&r, loop, 1);
    for (unsigned n = 1; n <= 500; n++) {
        ck_assert_int_eq(write(r.fds[1], "x", 1), 1);
        r.stop_after = n;
        run(loop);
        ck_assert_uint_eq(r.bytes, n);
    }
    ck_assert_uint_eq(r.revents & POLLIN, POLLIN);
    loop_destroy(loop);
    close(r.fds[0]);
    close(r.fds[1]);
}
END_TEST

START_TEST(watch_sees_what_was_there_before)
{
    struct loop *loop = loop_new();
    struct reader r = {.stop_after = 1};
    struct error err;
    ck_assert_int_eq(pipe2(r.fds, O_CLOEXEC | O_NONBLOCK), 0);
    ck_assert_int_eq(write(r.fds[1], "early", 5), 5);
    ck_assert_int_eq(loop_watch(loop, &r.watch, r.fds[0], POLLIN, reader_ready, &err), 0);
    run(loop);
    ck_assert_uint_eq(r.bytes, 5);
    loop_destroy(loop);
    close(r.fds[0]);
    close(r.fds[1]);
}
END_TEST

START_TEST(unwatched_is_not_called_again)
{
    struct loop *loop = loop_new();
    struct reader *r = calloc(1, sizeof(*r)), other = {0};
    struct error err;
    reader_open(r, loop, 1000);
    reader_open(&other, loop, 1);
    ck_assert_int_eq(write(r->fds[1], "x", 1), 1); // ready, and unwatched before the loop looks
    int out = r->fds[1], in = r->fds[0];
    loop_unwatch(&r->watch, reader_closed);
    loop_unwatch(&r->watch, reader_closed); // once is enough
    close(in);                              // at once: the header allows it
    while (!r->closed)
        ck_assert_int_eq(loop_turn(loop, true, &err), 0);
    ck_assert_uint_eq(r->calls, 0);
    free(r);
    ck_assert_int_eq(write(other.fds[1], "x", 1), 1);
    run(loop); // the other one still works
    ck_assert_uint_eq(other.bytes, 1);
    loop_destroy(loop);
    close(out);
    close(other.fds[0]);
    close(other.fds[1]);
}
END_TEST

static void unwatch_and_free(struct loop_watch *watch, uint32_t revents)
{
    struct reader *r = (struct reader *)watch;
    r->free_when_closed = true;
    loop_stop(watch->loop);
    loop_unwatch(watch, reader_closed);
}

START_TEST(unwatch_inside_its_callback)
{
    // _i: the poll is still armed, or the kernel has ended it (a closed fd): then `closed` may come
    // before the callback returns.
    struct loop *loop = loop_new();
    struct error err;
    struct reader *r = calloc(1, sizeof(*r));
    ck_assert_int_eq(pipe2(r->fds, O_CLOEXEC | O_NONBLOCK), 0);
    int out = r->fds[1], in = r->fds[0];
    ck_assert_int_eq(write(out, "x", 1), 1);
    if (_i) {
        close(in);
        close(out);
    }
    ck_assert_int_eq(loop_watch(loop, &r->watch, in, POLLIN, unwatch_and_free, &err), 0);
    run(loop);
    ck_assert_int_eq(loop_turn(loop, false, &err), 0);
    ck_assert_int_eq(loop_turn(loop, false, &err), 0);
    loop_destroy(loop);
    if (!_i) {
        close(in);
        close(out);
    }
}
END_TEST

// More events at once than the completion queue holds.
START_TEST(many_watches)
{
    enum { MANY = 400 };
    struct loop *loop = loop_new();
    struct error err;
    static struct reader readers[MANY];
    memset(readers, 0, sizeof(readers));
    for (unsigned i = 0; i < MANY; i++)
        reader_open(&readers[i], loop, 1000);
    for (unsigned round = 1; round <= 3; round++) {
        for (unsigned i = 0; i < MANY; i++)
            ck_assert_int_eq(write(readers[i].fds[1], "x", 1), 1);
        for (unsigned i = 0; i < MANY; i++)
            while (readers[i].bytes < round)
                ck_assert_int_eq(loop_turn(loop, true, &err), 0);
    }
    loop_destroy(loop);
    for (unsigned i = 0; i < MANY; i++) {
        close(readers[i].fds[0]);
        close(readers[i].fds[1]);
    }
}
END_TEST

// --- timers

struct ticker {
    struct loop_timer timer;
    struct loop *loop;
    unsigned ticks, stop_after;
};

static void tick(struct loop_timer *timer)
{
    struct ticker *t = container_of(timer, struct ticker, timer);
    if (++t->ticks == t->stop_after)
        loop_stop(t->loop);
}

START_TEST(timers)
{
    struct loop *loop = loop_new();
    struct error err;
    struct ticker t = {.loop = loop, .stop_after = 1};
    ck_assert_int_eq(loop_timer_init(loop, &t.timer, tick, &err), 0);
    uint64_t start = time_ns();
    loop_timer_set(&t.timer, 5000000, 0);
    run(loop);
    ck_assert_uint_ge(time_ns() - start, 5000000); // never early
    ck_assert_uint_eq(t.ticks, 1);

    t.stop_after = 6;
    loop_timer_set(&t.timer, 1000000, 1000000);
    run(loop);
    ck_assert_uint_eq(t.ticks, 6);

    loop_timer_set(&t.timer, 0, 0); // off: another timer rings, this one does not
    struct ticker other = {.loop = loop, .stop_after = 1};
    ck_assert_int_eq(loop_timer_init(loop, &other.timer, tick, &err), 0);
    loop_timer_set(&other.timer, 10000000, 0);
    run(loop);
    ck_assert_uint_eq(t.ticks, 6);

    t.stop_after = 8; // "at once, and then again and again"
    loop_timer_set(&t.timer, 0, 1000000);
    run(loop);
    ck_assert_uint_eq(t.ticks, 8);

    loop_timer_close(&t.timer);
    loop_timer_close(&other.timer);
    loop_turn(loop, false, &err);
    loop_destroy(loop);
}
END_TEST

// --- calls

struct counted {
    struct loop_call call;
    struct caller *caller;
    unsigned number;
};

struct caller {
    struct loop *loop;
    pthread_t thread;
    unsigned next; // only the loop's thread touches it
    pthread_t seen_in;
    unsigned *left;
};

enum { CALLERS = 4, CALLS = 5000 };

static void counted_run(void *arg)
{
    struct counted *c = arg;
    ck_assert_uint_eq(c->number, c->caller->next); // in the order of its thread
    c->caller->next++;
    c->caller->seen_in = pthread_self();
    if (!--*c->caller->left)
        loop_stop(c->caller->loop);
    free(c);
}

static void *caller_main(void *arg)
{
    struct caller *caller = arg;
    for (unsigned i = 0; i < CALLS; i++) {
        struct counted *c = malloc(sizeof(*c));
        *c = (struct counted) {.call = {.fn = counted_run}, .caller = caller, .number = i};
        c->call.arg = c;
        loop_call(caller->loop, &c->call);
    }
    return NULL;
}

START_TEST(calls_from_threads)
{
    struct loop *loop = loop_new();
    struct caller callers[CALLERS] = {0};
    unsigned left = CALLERS * CALLS;
    for (unsigned i = 0; i < CALLERS; i++) {
        callers[i].loop = loop;
        callers[i].left = &left;
        ck_assert_int_eq(pthread_create(&callers[i].thread, NULL, caller_main, &callers[i]), 0);
    }
    run(loop);
    for (unsigned i = 0; i < CALLERS; i++) {
        pthread_join(callers[i].thread, NULL);
        ck_assert_uint_eq(callers[i].next, CALLS);
        ck_assert(pthread_equal(callers[i].seen_in, pthread_self()));
    }
    loop_destroy(loop);
}
END_TEST

static void call_again(void *arg)
{
    struct counted *c = arg;
    if (++c->number < 100)
        loop_call(c->caller->loop, &c->call); // from within itself
    else
        loop_stop(c->caller->loop);
}

START_TEST(call_queues_itself)
{
    struct loop *loop = loop_new();
    struct caller caller = {.loop = loop};
    struct counted c = {.call = {.fn = call_again}, .caller = &caller};
    c.call.arg = &c;
    loop_call(loop, &c.call);
    run(loop);
    ck_assert_uint_eq(c.number, 100);
    loop_destroy(loop);
}
END_TEST

static void *stop_main(void *arg)
{
    loop_stop(arg);
    return NULL;
}

START_TEST(stop)
{
    struct loop *loop = loop_new();
    loop_stop(loop); // before: ends the next run
    run(loop);
    for (unsigned i = 0; i < 200; i++) {
        pthread_t thread;
        ck_assert_int_eq(pthread_create(&thread, NULL, stop_main, loop), 0);
        run(loop);
        pthread_join(thread, NULL);
    }
    loop_destroy(loop);
    loop_destroy(NULL);
}
END_TEST

static void ring_again(struct loop_watch *watch, uint32_t revents)
{
    struct reader *r = (struct reader *)watch;
    if (write(r->fds[1], "x", 1) != 1) // the next completion is there before this one is done
        ck_abort_msg("write: %s", strerror(errno));
    if (++r->calls == r->stop_after)
        loop_stop(watch->loop);
}

static void ringer_open(struct reader *r, struct loop *loop)
{
    struct error err;
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r->fds), 0);
    ck_assert(!loop_watch(loop, &r->watch, r->fds[0], POLLIN, ring_again, &err));
}

static void ringer_end(struct reader *r, struct loop *loop)
{
    loop_unwatch(&r->watch, NULL);
    loop_destroy(loop);
    close(r->fds[0]);
    close(r->fds[1]);
}

// As a guest does that keeps its device busy. Checked: it hangs when a turn takes all completions
// that come meanwhile.
START_TEST(stop_while_always_busy)
{
    struct loop *loop = loop_new();
    struct reader r = {.stop_after = 100};
    ringer_open(&r, loop);
    ck_assert_int_eq(write(r.fds[1], "x", 1), 1);
    run(loop);
    ck_assert_uint_ge(r.calls, r.stop_after);
    ringer_end(&r, loop);
}
END_TEST

static struct loop *signalled;

static void stop_by_signal(int sig)
{
    loop_stop(signalled);
}

// Blocked, but for while the loop waits: so the handler never runs in the middle of anything else,
// and yet it runs, with 0: nothing else to do, 1: something always. Checked: 1 hangs without the
// look in between.
START_TEST(signals_while_it_waits)
{
    sigset_t set, waiting;
    struct reader r = {.stop_after = 100000000};
    signalled = loop_new();
    signal(SIGUSR1, stop_by_signal);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    ck_assert(!sigprocmask(SIG_BLOCK, &set, &waiting));
    signalled->waiting = &waiting;
    ringer_open(&r, signalled);
    if (_i)
        ck_assert_int_eq(write(r.fds[1], "x", 1), 1);
    raise(SIGUSR1);
    run(signalled);
    ck_assert_uint_lt(r.calls, r.stop_after);
    ringer_end(&r, signalled);
}
END_TEST

START_TEST(loops_leak_nothing)
{
    int before = dup(0);
    for (unsigned i = 0; i < 100; i++) {
        struct loop *loop = loop_new();
        struct error err;
        struct ticker t = {.loop = loop};
        ck_assert_int_eq(loop_timer_init(loop, &t.timer, tick, &err), 0);
        loop_timer_close(&t.timer);
        loop_destroy(loop);
    }
    int after = dup(0);
    ck_assert_int_eq(after, before + 1);
    close(before);
    close(after);
}
END_TEST

// --- what the ring is for

struct opened {
    struct loop_op op;
    struct loop *loop;
    int res;
};

static void opened_done(struct loop_op *op, int res, uint32_t flags)
{
    struct opened *o = container_of(op, struct opened, op);
    o->res = res;
    loop_stop(o->loop);
}

START_TEST(ring_opens_no_files)
{
    struct loop *loop = loop_new();
    struct opened o = {.op = {opened_done}, .loop = loop};
    struct io_uring_sqe *sqe = loop_sqe(loop, &o.op);
    io_uring_prep_openat(sqe, AT_FDCWD, "/dev/null", O_RDONLY, 0);
    io_uring_sqe_set_data(sqe, &o.op);
    run(loop);
    ck_assert_int_eq(o.res, -EACCES);
    loop_destroy(loop);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("loop");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, ring_opens_no_files);
    tcase_add_test(tc, watch_sees_every_write);
    tcase_add_test(tc, watch_sees_what_was_there_before);
    tcase_add_test(tc, unwatched_is_not_called_again);
    tcase_add_loop_test(tc, unwatch_inside_its_callback, 0, 2);
    tcase_add_test(tc, many_watches);
    tcase_add_test(tc, timers);
    tcase_add_test(tc, calls_from_threads);
    tcase_add_test(tc, call_queues_itself);
    tcase_add_test(tc, stop);
    tcase_add_test(tc, stop_while_always_busy);
    tcase_add_loop_test(tc, signals_while_it_waits, 0, 2);
    tcase_add_test(tc, loops_leak_nothing);
    Suite *suite = suite_create("loop");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
