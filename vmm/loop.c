// SPDX-License-Identifier: Apache-2.0
#include "vmm/loop.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "vmm/ring.h"
#include "vmm/util.h"

// Room for what thousands of watched sockets say at once. Without it the kernel ends their polls,
// and arming those of sockets that stay readable would fill the queue again, for ever.
enum { RING_ENTRIES = 64, COMPLETIONS = 8192 };

struct io_uring_sqe *loop_sqe(struct loop *loop, struct loop_op *op)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&loop->ring);
    if (!sqe && io_uring_submit(&loop->ring) >= 0)
        sqe = io_uring_get_sqe(&loop->ring);
    if (sqe) {
        memset(sqe, 0, sizeof(*sqe));
        io_uring_sqe_set_data(sqe, op);
    }
    return sqe;
}

// --- watches

static int watch_arm(struct loop_watch *w)
{
    struct io_uring_sqe *sqe = loop_sqe(w->loop, &w->op);
    if (!sqe)
        return -EBUSY;
    io_uring_prep_poll_multishot(sqe, w->fd, w->events);
    io_uring_sqe_set_data(sqe, &w->op);
    w->armed = true;
    return 0;
}

static void watch_finish(struct loop_watch *w)
{
    w->loop->closing--;
    w->closing = false;
    w->loop = NULL;
    if (w->closed)
        w->closed(w); // may free w
}

static void watch_done(struct loop_op *op, int res, uint32_t flags)
{
    struct loop_watch *w = container_of(op, struct loop_watch, op);
    if (!(flags & IORING_CQE_F_MORE))
        w->armed = false;
    if (w->closing) {
        if (!w->armed)
            watch_finish(w);
        return;
    }
    // Unwatching inside fn must not finish (and free) the watch under our feet.
    w->in_fn = true;
    w->fn(w, res >= 0 ? (uint32_t)res : POLLERR);
    w->in_fn = false;
    if (w->armed)
        return;
    // The kernel ends a multishot poll now and then (full completion queue): arm it again.
    if (w->closing)
        watch_finish(w);
    else
        watch_arm(w);
}

int loop_watch(struct loop *loop, struct loop_watch *watch, int fd, uint32_t events,
               void (*fn)(struct loop_watch *, uint32_t), struct error *err)
{
    *watch = (struct loop_watch) {
        .op = {watch_done}, .loop = loop, .fd = fd, .events = events, .fn = fn};
    if (watch_arm(watch))
        return error_set(err, -EBUSY, "event loop: no room to watch fd %d", fd);
    return 0;
}

static void ignore_done(struct loop_op *op, int res, uint32_t flags)
{
}

static struct loop_op ignore_op = {ignore_done};

void loop_unwatch(struct loop_watch *watch, void (*closed)(struct loop_watch *))
{
    if (!watch->loop || watch->closing)
        return;
    watch->closed = closed;
    watch->fd = -1;
    watch->closing = true;
    watch->loop->closing++;
    if (!watch->armed) {
        if (!watch->in_fn)
            watch_finish(watch);
        return;
    }
    struct io_uring_sqe *sqe = loop_sqe(watch->loop, &ignore_op);
    if (sqe) {
        io_uring_prep_cancel(sqe, &watch->op, 0);
        io_uring_sqe_set_data(sqe, &ignore_op);
        // At once, so that the caller may close the fd.
        io_uring_submit(&watch->loop->ring);
    }
}

// --- timers

static void timer_ready(struct loop_watch *watch, uint32_t revents)
{
    struct loop_timer *t = container_of(watch, struct loop_timer, watch);
    uint64_t ticks;
    if (read(t->fd, &ticks, sizeof(ticks)) == sizeof(ticks))
        t->fn(t);
}

int loop_timer_init(struct loop *loop, struct loop_timer *timer, void (*fn)(struct loop_timer *),
                    struct error *err)
{
    timer->fn = fn;
    timer->fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (timer->fd < 0)
        return error_errno(err, "timerfd_create");
    int ret = loop_watch(loop, &timer->watch, timer->fd, POLLIN, timer_ready, err);
    if (ret)
        close(timer->fd);
    return ret;
}

void loop_timer_set(struct loop_timer *timer, uint64_t first_ns, uint64_t every_ns)
{
    if (!first_ns && every_ns)
        first_ns = 1; // 0 would mean "off"
    struct itimerspec spec = {
        .it_value = {(time_t)(first_ns / 1000000000u), (long)(first_ns % 1000000000u)},
        .it_interval = {(time_t)(every_ns / 1000000000u), (long)(every_ns % 1000000000u)}};
    timerfd_settime(timer->fd, 0, &spec, NULL);
}

void loop_timer_close(struct loop_timer *timer)
{
    loop_unwatch(&timer->watch, NULL);
    close(timer->fd);
    timer->fd = -1;
}

// --- calls from other threads

static void wake_ready(struct loop_watch *watch, uint32_t revents)
{
    struct loop *loop = watch->loop;
    uint64_t count;
    if (read(loop->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    pthread_mutex_lock(&loop->lock);
    struct loop_call *call = loop->calls;
    loop->calls = NULL;
    loop->calls_tail = &loop->calls;
    pthread_mutex_unlock(&loop->lock);
    while (call) {
        struct loop_call *next = call->next; // fn may free the call
        call->fn(call->arg);
        call = next;
    }
}

static void wake(struct loop *loop)
{
    uint64_t one = 1;
    // EAGAIN means the counter is full, so the loop is awake already.
    if (write(loop->wake_fd, &one, sizeof(one)) < 0)
        return;
}

void loop_call(struct loop *loop, struct loop_call *call)
{
    call->next = NULL;
    pthread_mutex_lock(&loop->lock);
    *loop->calls_tail = call;
    loop->calls_tail = &call->next;
    pthread_mutex_unlock(&loop->lock);
    wake(loop);
}

// --- the loop

int loop_create(struct loop **out, struct error *err)
{
    struct loop *loop = calloc(1, sizeof(*loop));
    if (!loop)
        return error_set(err, -ENOMEM, "no memory for the event loop");
    static const uint8_t ops[] = {IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL};
    int ret = ring_create(&loop->ring, RING_ENTRIES, COMPLETIONS);
    if (ret) {
        free(loop);
        return error_set(err, ret,
                         "event loop: io_uring_setup: %s (see /proc/sys/kernel/io_uring_disabled)",
                         strerror(-ret));
    }
    ret = ring_open(&loop->ring, ops, ARRAY_SIZE(ops), false, err);
    if (ret) {
        io_uring_queue_exit(&loop->ring);
        free(loop);
        return ret;
    }
    pthread_mutex_init(&loop->lock, NULL);
    loop->calls_tail = &loop->calls;
    loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->wake_fd < 0)
        ret = error_errno(err, "event loop: eventfd");
    else
        ret = loop_watch(loop, &loop->wake, loop->wake_fd, POLLIN, wake_ready, err);
    if (ret) {
        loop_destroy(loop);
        return ret;
    }
    *out = loop;
    return 0;
}

void loop_destroy(struct loop *loop)
{
    if (!loop)
        return;
    while (loop->closing && !loop_turn(loop, true, NULL))
        ; // cancelled polls come home, and their watches are freed
    io_uring_queue_exit(&loop->ring);
    if (loop->wake_fd >= 0)
        close(loop->wake_fd);
    pthread_mutex_destroy(&loop->lock);
    free(loop);
}

static int submit_and_wait(struct loop *loop)
{
    enum { BUSY_TURNS = 64 };
    const struct timespec moment = {0};
    struct io_uring_cqe *first;
    if (loop->waiting && loop_pending(loop) && !(++loop->busy % BUSY_TURNS))
        ppoll(NULL, 0, &moment, loop->waiting);
    return io_uring_submit_and_wait_timeout(&loop->ring, &first, 1, NULL, (void *)loop->waiting);
}

int loop_turn(struct loop *loop, bool wait, struct error *err)
{
    int ret = wait ? submit_and_wait(loop) : io_uring_submit(&loop->ring);
    if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
        return error_set(err, ret, "event loop: io_uring_enter: %s", strerror(-ret));
    // Only what is there now: something that always completes at once (a device that a guest keeps
    // busy) must not keep this turn from its end, where new requests are submitted and `stop` is
    // looked at.
    unsigned ready = io_uring_cq_ready(&loop->ring);
    struct io_uring_cqe *cqe;
    for (unsigned i = 0; i < (ready ? ready : 1) && !io_uring_peek_cqe(&loop->ring, &cqe); i++) {
        struct loop_op *op = io_uring_cqe_get_data(cqe);
        int res = cqe->res;
        uint32_t flags = cqe->flags;
        io_uring_cqe_seen(&loop->ring, cqe);
        op->done(op, res, flags);
    }
    return 0;
}

int loop_run(struct loop *loop, struct error *err)
{
    loop->thread = pthread_self();
    int ret = 0;
    while (!ret && !atomic_load(&loop->stop))
        ret = loop_turn(loop, true, err);
    atomic_store(&loop->stop, false); // may run again
    return ret;
}

void loop_stop(struct loop *loop)
{
    atomic_store(&loop->stop, true);
    wake(loop);
}
