// SPDX-License-Identifier: Apache-2.0
#include "vmm/life.h"

#include <errno.h>

#include "vmm/util.h"

#define B LIFE_BIT

static const struct {
    const char *name;
    unsigned next; // bits of the states that may follow
} states[LIFE_STATES] = {
    [LIFE_CREATED] = {"created", B(LIFE_STARTING) | B(LIFE_STOPPED) | B(LIFE_FAILED)},
    [LIFE_STARTING] = {"starting", B(LIFE_CREATED) | B(LIFE_RUNNING) | B(LIFE_PAUSED) |
                                       B(LIFE_STOPPED) | B(LIFE_FAILED)},
    [LIFE_RUNNING] = {"running", B(LIFE_STARTING) | B(LIFE_PAUSED) | B(LIFE_MIGRATING) |
                                     B(LIFE_SNAPSHOTTING) | B(LIFE_STOPPING) | B(LIFE_STOPPED) |
                                     B(LIFE_FAILED)},
    [LIFE_PAUSED] = {"paused", B(LIFE_STARTING) | B(LIFE_RUNNING) | B(LIFE_MIGRATING) |
                                   B(LIFE_SNAPSHOTTING) | B(LIFE_STOPPING) | B(LIFE_STOPPED) |
                                   B(LIFE_FAILED)},
    [LIFE_MIGRATING] = {"migrating", B(LIFE_RUNNING) | B(LIFE_PAUSED) | B(LIFE_STOPPING) |
                                         B(LIFE_STOPPED) | B(LIFE_FAILED)},
    [LIFE_SNAPSHOTTING] = {"snapshotting", B(LIFE_RUNNING) | B(LIFE_PAUSED) | B(LIFE_STOPPING) |
                                               B(LIFE_STOPPED) | B(LIFE_FAILED)},
    [LIFE_STOPPING] = {"stopping", B(LIFE_STOPPED) | B(LIFE_FAILED)},
    [LIFE_STOPPED] = {"stopped", 0},
    [LIFE_FAILED] = {"failed", 0},
};

#undef B

void life_init(struct life *life)
{
    *life = (struct life) {.state = LIFE_CREATED};
    pthread_mutex_init(&life->lock, NULL);
}

void life_destroy(struct life *life)
{
    pthread_mutex_destroy(&life->lock);
}

enum life_state life_get(struct life *life)
{
    pthread_mutex_lock(&life->lock);
    enum life_state state = life->state;
    pthread_mutex_unlock(&life->lock);
    return state;
}

const char *life_name(enum life_state state)
{
    return states[state].name;
}

bool life_allows(enum life_state from, enum life_state to)
{
    return states[from].next & LIFE_BIT(to);
}

static void change(struct life *life, enum life_state to)
{
    enum life_state from = life->state;
    if (to == LIFE_MIGRATING || to == LIFE_SNAPSHOTTING)
        life->back = from;
    life->state = to;
    if (life->changed)
        life->changed(from, to, life->arg);
}

int life_move(struct life *life, enum life_state to, struct error *err)
{
    pthread_mutex_lock(&life->lock);
    enum life_state from = life->state;
    bool allowed = life_allows(from, to);
    if (allowed)
        change(life, to);
    pthread_mutex_unlock(&life->lock);
    return allowed ? 0
                   : error_set(err, -EPERM, "the VM is %s: it cannot become %s", life_name(from),
                               life_name(to));
}

void life_return(struct life *life)
{
    pthread_mutex_lock(&life->lock);
    if (life->state == LIFE_MIGRATING || life->state == LIFE_SNAPSHOTTING)
        change(life, life->back);
    pthread_mutex_unlock(&life->lock);
}
