// SPDX-License-Identifier: Apache-2.0
#include "migrate/throttle.h"

#include <errno.h>

// Under the lock, which is given up meanwhile.
static void wait_us(struct throttle *t, unsigned us)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += us * 1000l;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    while (!t->stop && pthread_cond_timedwait(&t->changed, &t->lock, &end) != ETIMEDOUT)
        ;
}

static void *throttle_main(void *arg)
{
    struct throttle *t = arg;
    thread_prompt();
    pthread_mutex_lock(&t->lock);
    while (!t->stop) {
        unsigned still = t->period_us / 100 * t->percent, rest = t->period_us - still;
        vm_hold(t->vm, true);
        wait_us(t, still);
        vm_hold(t->vm, false);
        wait_us(t, rest);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

int throttle_set(struct throttle *t, struct vm *vm, unsigned percent, unsigned period_us)
{
    if (t->started) {
        pthread_mutex_lock(&t->lock);
        t->percent = percent;
        t->period_us = period_us;
        pthread_mutex_unlock(&t->lock);
        return 0;
    }
    *t = (struct throttle) {.vm = vm, .percent = percent, .period_us = period_us};
    pthread_mutex_init(&t->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&t->changed, &attr);
    pthread_condattr_destroy(&attr);
    int ret = pthread_create(&t->thread, NULL, throttle_main, t);
    t->started = !ret;
    if (ret) {
        pthread_cond_destroy(&t->changed);
        pthread_mutex_destroy(&t->lock);
    }
    return -ret;
}

void throttle_end(struct throttle *t)
{
    if (!t->started)
        return;
    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
    pthread_join(t->thread, NULL);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    t->started = false;
}
