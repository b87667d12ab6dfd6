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
    pthread_mutex_t lock; // guards percent, stop
    pthread_cond_t changed;
    unsigned percent;
    bool stop;
};

// The first call starts a thread. -errno: the guest is as fast as before.
int throttle_set(struct throttle *t, struct vm *vm, unsigned percent);
// The guest has all of its time again. Harmless when nothing was set.
void throttle_end(struct throttle *t);
