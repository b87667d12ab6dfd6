// SPDX-License-Identifier: Apache-2.0
// How Linux treats a thread between the turns that we give it.
#pragma once

#include <sys/types.h>

enum sched_policy {
    SCHED_POLICY_PLAIN,   // as it was started
    SCHED_POLICY_PROMPT,  // sleeps mostly: gets its CPU soon when it wakes (Linux 6.12: short
                          // slices)
    SCHED_POLICY_BOOST,   // gets it at once (real-time), as long as the scheduler leaves it that
    SCHED_POLICY_LEAVING, // is to leave its CPU: goes first, since that takes no time
    SCHED_POLICY_LAST,    // does not give its turns back: only what nobody else wants
};

int sched_policy_set(pid_t tid, enum sched_policy policy); // 0 or -errno
