// SPDX-License-Identifier: Apache-2.0
// Takes an exception that nobody handles, to see it reported (UCALL_ABORT).
// Parameters: n: 0 page fault, write to FAULT_ADDRESS (vector 14, error 2 in ring 0, 6 in ring 3);
// 1 undefined instruction (6); 2 general protection (13, error 0); ring (0 or 3).
// GUEST_SYNC(1, n) comes first.
#include "../rt.h"

#define FAULT_ADDRESS (600 * GIB) // outside the mapping
#define NOT_CANONICAL (1ul << 63)

static uint64_t fault(void *arg)
{
    uint64_t kind = *(uint64_t *)arg;
    if (kind == 0)
        *(volatile uint64_t *)FAULT_ADDRESS = 1;
    else if (kind == 1)
        __asm__ volatile("ud2" ::: "memory");
    else
        *(volatile uint64_t *)NOT_CANONICAL = 1;
    return 0;
}

void guest_main(void)
{
    uint64_t kind = guest_param(UCALL_P_N, 0);
    GUEST_ASSERT(kind <= 2);
    guest_sync(1, kind);
    if (guest_param(UCALL_P_RING, 0) == 3)
        ring3_run(fault, &kind);
    else
        fault(&kind);
    GUEST_ASSERT(!"the exception came");
}
