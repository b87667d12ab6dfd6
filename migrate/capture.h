// SPDX-License-Identifier: Apache-2.0
// Guest memory as it was at one instant, while the guest goes on.
//
//   capture_create    guest runs     pages are write-protected ("armed"); a write takes the
//                                    protection away again, so what is hot is bare at the end
//   capture_freeze    guest paused   the instant: only the bare pages are protected once more,
//                                    and pages that do not exist yet are zero for good
//   capture_drain     guest runs     every page goes to the sink; a write to one that has not been
//                                    taken waits until it has been copied aside (16 MiB of such
//                                    copies at most, then the guest waits for the sink)
//   capture_free                     no trace is left, at whatever point
//
// So the pause depends on what the guest writes, not on how much memory it has: arming 1 GiB takes
// the kernel some 20 ms. All writers are seen: vCPUs, the VMM, KVM and io_uring, since they fault
// alike; memory that the kernel holds pinned is not, so devices must be quiescent at the freeze.
// Needs userfaultfd with write protection (Linux 5.7; memfd and huge pages 5.19).
#pragma once

#include <stdint.h>

#include "vmm/error.h"
#include "vmm/ram.h"

struct capture;

// Where the pages go; called in capture_drain's thread, each page once. An error ends the drain.
struct capture_sink {
    int (*pages)(void *context, uint64_t first, uint64_t count, const void *data,
                 struct error *err);
    int (*zero)(void *context, uint64_t first, uint64_t count, struct error *err);
    void *context;
};

struct capture_counts {
    uint64_t armed;  // pages protected before the pause
    uint64_t bare;   // pages protected within it
    uint64_t aside;  // pages the guest wrote to before they were taken
    uint64_t faults; // all faults since the freeze
    uint64_t waits;  // faults that waited for the sink
    uint64_t arm_ns, freeze_ns;
};

// `pages` (NULL: all) are those that will be wanted, as far as is known. Discards of memory are
// blocked from here on. -EOPNOTSUPP, -EPERM: not with this kernel, memory or these rights; the
// caller copies while the guest is paused.
int capture_create(struct capture **c, struct ram *ram, const uint64_t *pages, struct error *err);

// The VM is paused. `pages` (NULL: all) is what the drain will give.
int capture_freeze(struct capture *c, const uint64_t *pages, struct error *err);

int capture_drain(struct capture *c, const struct capture_sink *sink, const _Atomic bool *cancelled,
                  struct error *err);

// Pages not yet taken, for progress. Any thread.
uint64_t capture_left(struct capture *c);
void capture_counts(struct capture *c, struct capture_counts *counts);

// NULL is fine. Not while a drain is under way.
void capture_free(struct capture *c);
