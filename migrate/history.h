// SPDX-License-Identifier: Apache-2.0
// What happened when in a migration, for its report: a bounded list of events. Any thread.
#pragma once

#include <pthread.h>
#include <stdint.h>

enum { HISTORY_MAX = 16 * 1024 };

enum history_kind {
    HISTORY_ROUND,  // a: bytes sent, b: bytes dirtied meanwhile, c: ns it took
    HISTORY_PUSH,   // a: first page, b: pages, of one run sent unasked
    HISTORY_DEMAND, // a: page asked for, b: 1 when it had to be sent, 0 when it was under way
};

struct history_event {
    uint64_t ns; // since the beginning
    uint32_t kind;
    uint64_t a, b, c;
};

struct history {
    pthread_mutex_t lock;
    uint64_t start;
    struct history_event *events; // NULL: nothing is kept
    unsigned nr;
    uint64_t dropped; // did not fit
};

void history_init(struct history *h);
// From now on events are kept; without memory none are.
void history_start(struct history *h);
void history_add(struct history *h, enum history_kind kind, uint64_t a, uint64_t b, uint64_t c);
void history_free(struct history *h);
