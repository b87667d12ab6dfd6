// SPDX-License-Identifier: Apache-2.0
// What the scheduler did, kept: the newest events in a ring of fixed size. Pictures and JSON are
// made from it, for the simulator and the daemon alike.
#pragma once

#include <jansson.h>
#include <stddef.h>

#include "sched/credit.h"

struct record {
    uint64_t at_ns;
    int64_t credit_ns;
    int64_t was_ns;    // CREDIT_EV_CREDIT: before the accounting
    uint32_t vm, vcpu; // ids
    uint8_t kind;      // enum credit_event_kind
    uint8_t pcpu, from;
    uint8_t class, state;
};

struct record_log {
    struct record *ring;
    size_t size, nr; // nr: ever recorded; the newest min(nr, size) are there
};

int record_init(struct record_log *log, size_t size); // 0 or -ENOMEM
void record_free(struct record_log *log);
// For credit_params.trace; trace_arg is the log.
void record_event(void *log, const struct credit_event *event);

size_t record_count(const struct record_log *log);
// The i-th of those that are there, the oldest first.
const struct record *record_at(const struct record_log *log, size_t i);

// {"at_ns": ..., "event": "run", "vm": ..., "vcpu": ..., "pcpu": ..., "credit": ..., "class": ...}
// of each in [from_ns, to_ns).
json_t *record_json(const struct record_log *log, uint64_t from_ns, uint64_t to_ns);
