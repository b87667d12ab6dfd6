// SPDX-License-Identifier: Apache-2.0
#include "sched/policy.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

int sched_policy_set(pid_t tid, enum sched_policy policy)
{
    enum { RESET_ON_FORK = 1, SHORTEST_SLICE_NS = 100 * 1000, BOOST_PRIORITY = 1 };
    struct { // sched_setattr(2)
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attr = {.size = sizeof(attr)};
    if (syscall(SYS_sched_getattr, tid, &attr, (unsigned)sizeof(attr), 0))
        return -errno;
    bool ours = attr.policy == SCHED_FIFO && attr.priority == BOOST_PRIORITY;
    if (attr.policy != SCHED_OTHER && attr.policy != SCHED_IDLE && !ours)
        return 0; // somebody gave it another policy
    attr.policy = policy == SCHED_POLICY_LAST    ? SCHED_IDLE
                  : policy == SCHED_POLICY_BOOST ? SCHED_FIFO
                                                 : SCHED_OTHER;
    attr.priority = policy == SCHED_POLICY_BOOST ? BOOST_PRIORITY : 0;
    attr.flags = RESET_ON_FORK;
    attr.runtime = policy == SCHED_POLICY_PROMPT ? SHORTEST_SLICE_NS : 0;
    return syscall(SYS_sched_setattr, tid, &attr, 0) ? -errno : 0;
}
