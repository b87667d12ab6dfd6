// SPDX-License-Identifier: Apache-2.0
#include "sched/policy.h"

#include <sched.h>
#include <stdbool.h>

#include "vmm/util.h"

int sched_policy_set(pid_t tid, enum sched_policy policy)
{
    enum { BOOST_PRIORITY = 1 };
    struct thread_attr attr;
    int ret = thread_attr_get(tid, &attr);
    if (ret)
        return ret;
    bool ours = attr.policy == SCHED_FIFO && attr.priority == BOOST_PRIORITY;
    if (attr.policy != SCHED_OTHER && attr.policy != SCHED_IDLE && !ours)
        return 0; // somebody gave it another policy
    const bool first = policy == SCHED_POLICY_BOOST || policy == SCHED_POLICY_LEAVING;
    attr.policy = policy == SCHED_POLICY_LAST ? SCHED_IDLE : first ? SCHED_FIFO : SCHED_OTHER;
    attr.priority = first ? BOOST_PRIORITY : 0;
    attr.flags = THREAD_RESET_ON_FORK;
    attr.runtime = policy == SCHED_POLICY_PROMPT ? THREAD_SHORTEST_SLICE : 0;
    return thread_attr_set(tid, &attr);
}
