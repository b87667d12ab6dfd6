// SPDX-License-Identifier: Apache-2.0
// What the watch of a thread says of it, beside what the thread knows itself.
#include <check.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sched/watch.h"
#include "vmm/util.h"

enum { MS = 1000000 };

struct sleeper {
    pthread_t thread;
    _Atomic pid_t tid;
    sem_t go, done;
    unsigned naps; // to take when it is told to go; 0: end
};

static void *sleeper_main(void *arg)
{
    struct sleeper *s = arg;
    atomic_store(&s->tid, (pid_t)syscall(SYS_gettid));
    for (;;) {
        sem_post(&s->done);
        sem_wait(&s->go);
        if (!s->naps)
            return NULL;
        for (unsigned i = 0; i < s->naps; i++)
            usleep(1);
    }
}

static void sleeper_start(struct sleeper *s, struct sched_watch *w)
{
    struct error err;
    sem_init(&s->go, 0, 0);
    sem_init(&s->done, 0, 0);
    ck_assert_int_eq(pthread_create(&s->thread, NULL, sleeper_main, s), 0);
    sem_wait(&s->done);
    ck_assert_int_eq(sched_watch_open(w, getpid(), s->tid, true, &err), 0);
}

static void sleeper_end(struct sleeper *s, struct sched_watch *w)
{
    sched_watch_close(w);
    s->naps = 0;
    sem_post(&s->go);
    pthread_join(s->thread, NULL);
}

static void wait_asleep(const struct sched_watch *w)
{
    while (!sched_watch_sleeps(w))
        usleep(100);
}

static uint64_t cpu_of(pthread_t thread)
{
    struct timespec t;
    clockid_t clock;
    ck_assert_int_eq(pthread_getcpuclockid(thread, &clock), 0);
    ck_assert_int_eq(clock_gettime(clock, &t), 0);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

// A thread switches so often while nobody reads that records are lost, then sleeps. Wherever in its
// doings the kept ones end, the watch finds out that it sleeps, and stops counting. (Without
// `doubt` in watch.c the thread is taken for one that runs after nearly half of the numbers.)
START_TEST(lost_records)
{
    struct sleeper s = {.naps = 400};
    struct sched_watch w;
    sleeper_start(&s, &w);
    printf(sched_watch_polls(&w) ? "by /proc: no records to be had here\n" : "by records\n");
    uint64_t now = time_ns();
    for (unsigned extra = 0; extra < 4; extra++) {
        s.naps = 400 + extra;
        sem_post(&s.go);
        sem_wait(&s.done);
        wait_asleep(&w);
        // No wait: time goes on in what the watch is told.
        now = now > time_ns() ? now : time_ns();
        for (unsigned looks = 0; looks < 6; looks++)
            sched_watch_read(&w, now += 60 * MS);
        ck_assert(w.asleep);
        ck_assert(!w.on_cpu);
        uint64_t said = sched_watch_cpu(&w, now);
        ck_assert_uint_eq(sched_watch_cpu(&w, now + 1000 * MS), said);
        ck_assert_uint_le(said, cpu_of(s.thread) + 100 * MS); // some naps are taken for work
    }
    sleeper_end(&s, &w);
}
END_TEST

// With all records read in time, it is off by some microseconds for each switch; a second later, by
// nothing.
START_TEST(exact)
{
    struct sleeper s = {.naps = 1};
    struct sched_watch w;
    sleeper_start(&s, &w);
    for (unsigned i = 0; i < 500; i++) {
        sem_post(&s.go);
        sem_wait(&s.done);
        wait_asleep(&w);
        sched_watch_read(&w, time_ns());
    }
    uint64_t now = time_ns(), before = sched_watch_cpu(&w, now);
    sched_watch_read(&w, now + 1100 * MS);
    printf("  %llu us of CPU time; %lld us off by records\n",
           (unsigned long long)cpu_of(s.thread) / 1000,
           ((long long)before - (long long)cpu_of(s.thread)) / 1000);
    if (!sched_watch_polls(&w))
        ck_assert_uint_eq(sched_watch_cpu(&w, now + 1100 * MS), cpu_of(s.thread));
    sleeper_end(&s, &w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sched_watch");
    TCase *tc = tcase_create("records");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, lost_records);
    tcase_add_test(tc, exact);
    suite_add_tcase(s, tc);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
