// SPDX-License-Identifier: Apache-2.0
// How much a VM uses of what it was given: read once every USAGE_PERIOD_S, so that "idle for an
// hour" can be said without anybody watching.
#pragma once

#include <jansson.h>

#include "vmm/error.h"
#include "vmm/loop.h"

struct vm;

enum {
    USAGE_PERIOD_S = 10,
    USAGE_IDLE_PERMILLE = 30, // of one CPU, all vCPUs together: less than that is idle
};

struct usage {
    struct loop_timer timer;
    struct vm *vm;
    uint64_t start_ns, at_ns; // CLOCK_MONOTONIC
    uint64_t vcpu_ns;         // CPU time of the vCPU threads at at_ns
    // usage_show may look from another thread.
    _Atomic uint64_t busy_at_ns;              // end of the last period that was not idle
    _Atomic uint32_t permille, peak_permille; // of one CPU, in the last period and in the busiest
    int statm_fd;                             // /proc/self/statm, -1 before usage_open
};

// The file stays open: the process may not see /proc later, or not from each thread.
int usage_open(struct usage *u, struct error *err);
void usage_close(struct usage *u);
// Loop's thread. Again for a guest that is rolled back: the VM is another one then.
int usage_start(struct usage *u, struct vm *vm, struct error *err);
void usage_stop(struct usage *u);
// Adds uptime, CPU, idle time, resident memory.
void usage_show(struct usage *u, json_t *out);
