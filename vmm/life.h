// SPDX-License-Identifier: Apache-2.0
// The states in the life of a VM, as one table of allowed transitions (drawn in docs/control.md).
// Who changes what a VM does asks here first.
#pragma once

#include <pthread.h>
#include <stdbool.h>

#include "vmm/error.h"

enum life_state {
    LIFE_CREATED,  // takes configuration; no guest yet
    LIFE_STARTING, // from created, or again after a reset
    LIFE_RUNNING,
    LIFE_PAUSED,
    LIFE_MIGRATING,
    LIFE_SNAPSHOTTING,
    LIFE_STOPPING, // the guest was asked to end
    LIFE_STOPPED,
    LIFE_FAILED,
    LIFE_STATES,
};

#define LIFE_BIT(state) (1u << (state))

struct life {
    pthread_mutex_t lock;
    enum life_state state;
    enum life_state back; // where a migration or snapshot returns to
    // Called after each change, under the lock, in the thread that caused it. May be NULL.
    void (*changed)(enum life_state from, enum life_state to, void *arg);
    void *arg;
};

void life_init(struct life *life);
void life_destroy(struct life *life);
enum life_state life_get(struct life *life);
const char *life_name(enum life_state state);
bool life_allows(enum life_state from, enum life_state to);

// -EPERM: not from the state it is in; the text names both.
int life_move(struct life *life, enum life_state to, struct error *err);
// Ends LIFE_MIGRATING or LIFE_SNAPSHOTTING: back to the state before, unless it has ended
// meanwhile.
void life_return(struct life *life);
