// SPDX-License-Identifier: Apache-2.0
// Slows a guest that writes faster than the link takes: it stands still for a share of each period.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "vmm/vm.h"

struct throttle {
    struct vm *vm;
    pthread_t thread;
    bool started;
    pthread_mutex_t lock; // guards percent, period_us, stop
    pthread_cond_t changed;
    unsigned percent, period_us;
    bool stop;
};

// Short, so that nobody inside loses a connection; long against the cost of stopping (a kick).
#define THROTTLE_PERIOD_US 20000

// The first call starts a thread. -errno: the guest is as fast as before.
int throttle_set(struct throttle *t, struct vm *vm, unsigned percent, unsigned period_us);
// The guest has all of its time again. Harmless when nothing was set.
void throttle_end(struct throttle *t);
