// SPDX-License-Identifier: Apache-2.0
// What a thread of another process does: runs, waits for a CPU, or sleeps; and for how long it ran.
//
// With an in-kernel local APIC a halted vCPU sleeps inside KVM_RUN, and nobody is told. The
// kernel's context-switch records (perf_event_open(2), `context_switch`) say so within tens of
// microseconds. Three descriptors, since a record cannot choose whom it wakes:
//  - `log` holds all records, and wakes nobody;
//  - `out` wakes the poller when the thread goes to sleep (the tracepoint sched_switch; where there
//    is none, also when it is preempted);
//  - `in` wakes it whenever it gets on a CPU, or off it. Only while the thread sleeps: a poller
//    that wakes on the watched thread's own CPU drives it away and so makes the next record, for
//    ever.
// Without the right to open those (CAP_PERFMON), /proc/<pid>/task/<tid> is read instead, which must
// be asked for again and again (sched_watch_polls).
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/error.h"

// What wakes the poller.
enum sched_watch_wakes {
    WAKES_NEVER,
    WAKES_OUT,    // going to sleep
    WAKES_OUT_IN, // ... and getting on a CPU
};

struct sched_watch_ring {
    int fd; // -1: none
    void *map;
};

struct sched_watch {
    pid_t pid, tid;
    struct sched_watch_ring log, out, in; // none: by /proc
    int schedstat_fd, stat_fd;            // of /proc
    enum sched_watch_wakes wakes;
    bool on_cpu;
    bool asleep;       // left its CPU by itself; false: preempted, or waits to be put there
    bool fresh;        // by records: none tells yet how long it has run; its schedstat does
    uint64_t since_ns; // of on_cpu, CLOCK_MONOTONIC
    uint64_t sure_ns;  // by records: when the kernel's own count was last looked at
    uint64_t base_ns;  // CPU time before that
    uint64_t seen_ns;  // CPU time by /proc at the last look
};

#define SCHED_WATCH_NONE \
    ((struct sched_watch) {.log = {-1}, .out = {-1}, .in = {-1}, .schedstat_fd = -1, .stat_fd = -1})

// -errno; -ESRCH: no such thread in that process.
int sched_watch_open(struct sched_watch *w, pid_t pid, pid_t tid, bool perf, struct error *err);
void sched_watch_close(struct sched_watch *w);
// A descriptor that keeps the kernel's tracepoint in use, or -1. The last one in a host to be
// closed waits, in close(2), for all CPUs: some 40 ms in which a daemon would serve nobody.
int sched_watch_anchor(void);
static inline bool sched_watch_polls(const struct sched_watch *w)
{
    return w->log.fd < 0;
}
// Brings `on_cpu`, `asleep` and the rest up to date.
void sched_watch_read(struct sched_watch *w, uint64_t now_ns);
// CPU time that the thread had, ns, to some microseconds a switch; corrected each second, so now
// and then a little less than the last time. After sched_watch_read.
uint64_t sched_watch_cpu(const struct sched_watch *w, uint64_t now_ns);
// What wakes the poller of out.fd and in.fd; after sched_watch_open: WAKES_OUT.
void sched_watch_listen(struct sched_watch *w, enum sched_watch_wakes wakes);
// Asks the kernel whether the thread sleeps (or is stopped) right now, not what it did last.
bool sched_watch_sleeps(const struct sched_watch *w);
