// SPDX-License-Identifier: Apache-2.0
// The event loop: one io_uring, one thread that waits on it.
//
// Everything asynchronous is a `struct loop_op`: prepare an SQE for it, and its `done` is called in
// the loop's thread with the result. Watching an fd, timers and calls from other threads are built
// on that.
#pragma once

#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

struct loop_op {
    // `res` as in a CQE (>= 0 or -errno); `flags` are the CQE's (IORING_CQE_F_MORE ...).
    void (*done)(struct loop_op *op, int res, uint32_t flags);
};

struct loop_call { // a call queued from any thread; owned by the caller until `fn` runs
    void (*fn)(void *arg);
    void *arg;
    struct loop_call *next;
};

struct loop_watch {
    struct loop_op op;
    struct loop *loop;
    int fd;
    uint32_t events; // POLLIN ...
    void (*fn)(struct loop_watch *watch, uint32_t revents);
    bool armed;
    bool closing;
    bool in_fn;
    void (*closed)(struct loop_watch *watch); // see loop_unwatch
};

struct loop_timer {
    struct loop_watch watch;
    int fd; // timerfd
    void (*fn)(struct loop_timer *timer);
};

struct loop {
    struct io_uring ring;
    pthread_t thread; // the one in loop_run
    int wake_fd;      // eventfd
    struct loop_watch wake;
    pthread_mutex_t lock; // guards `calls`
    struct loop_call *calls, **calls_tail;
    atomic_bool stop;
    unsigned closing; // watches whose end the kernel has not confirmed yet
    // The thread's signal mask while it waits, so that signals come only then (and, when it never
    // has to wait, now and then); NULL: as always. The caller's.
    const sigset_t *waiting;
    unsigned busy; // turns that need not wait
};

int loop_create(struct loop **loop, struct error *err);
void loop_destroy(struct loop *loop); // waits for watches that were closed

// Runs until loop_stop; handles everything in the calling thread. 0 or -errno.
int loop_run(struct loop *loop, struct error *err);
void loop_stop(struct loop *loop); // any thread; ends the running or the next loop_run
// Handles what is ready and, with `wait`, at least one completion. For tests and clean-up.
int loop_turn(struct loop *loop, bool wait, struct error *err);
// Whether something waits to be handled. Loop thread only.
static inline bool loop_pending(const struct loop *loop)
{
    return io_uring_cq_ready(&loop->ring);
}

// A free SQE for a poll or a cancel (the ring takes nothing else, see vmm/ring.h), tied to `op`
// (user_data set); submitted when control returns to the loop, or by io_uring_submit. Loop thread
// only. NULL only when the ring is broken.
struct io_uring_sqe *loop_sqe(struct loop *loop, struct loop_op *op);

// Any thread; runs `fn(arg)` in the loop's thread. `call` must live until then.
void loop_call(struct loop *loop, struct loop_call *call);

// Calls watch->fn whenever `events` show on fd, until loop_unwatch. Loop thread, or before
// loop_run.
int loop_watch(struct loop *loop, struct loop_watch *watch, int fd, uint32_t events,
               void (*fn)(struct loop_watch *, uint32_t), struct error *err);
// After this `fn` is not called again; the kernel may still hold the poll, so the memory of `watch`
// must live until `closed` (may be NULL when the watch outlives the loop) has been called.
void loop_unwatch(struct loop_watch *watch, void (*closed)(struct loop_watch *));

int loop_timer_init(struct loop *loop, struct loop_timer *timer, void (*fn)(struct loop_timer *),
                    struct error *err);
void loop_timer_set(struct loop_timer *timer, uint64_t first_ns, uint64_t every_ns); // 0, 0 = off
void loop_timer_close(struct loop_timer *timer); // the memory must outlive the loop's next turn
