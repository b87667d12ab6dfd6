// SPDX-License-Identifier: Apache-2.0
// The scheduler of a host: `ferry sched daemon`. Gives each pCPU's turns to one vCPU thread at a
// time, by the rules of sched/credit.h, to VMs that register at its socket (sched/proto.h).
//
// One thread. It waits for: messages, doorbells, context switches of the threads
// (sched/watch.h) and the next deadline. What a VM can make it do per 10 ms is bounded.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sched/credit.h"
#include "sched/proto.h"
#include "vmm/error.h"
#include "vmm/log.h"

struct sched_daemon;

struct sched_daemon_config {
    const char *socket;      // path; its folder exists
    mode_t mode;             // of the socket; 0 = 0600: VMs of this user (and root's) alone
    struct sched_mask pcpus; // empty: all this process may use, up to 64
    uint64_t slice_ns, tick_ns, ratelimit_ns; // 0: 5 ms, 10 ms or half a slice, 1 ms
    enum credit_placement placement;
    bool weight_per_vm;
    bool no_records;  // read /proc although the kernel's records could be had
    bool no_boost;    // threads that wake get no real-time priority for it
    unsigned max_vms; // 0 = 1024
    // What the weights of a user's vCPUs may add up to, of users other than root and this
    // process's; 0: anything.
    uint32_t user_weight;
    const struct log *log;
    uint64_t (*clock)(void); // NULL: CLOCK_MONOTONIC; another for tests, ns
};

int sched_daemon_create(struct sched_daemon **d, const struct sched_daemon_config *config,
                        struct error *err);
// Until sched_daemon_stop. The calling thread gets a real-time priority, if it may.
int sched_daemon_run(struct sched_daemon *d, struct error *err);
void sched_daemon_stop(struct sched_daemon *d); // any thread, or a signal handler
// All threads run freely from then on. NULL is fine.
void sched_daemon_destroy(struct sched_daemon *d);
