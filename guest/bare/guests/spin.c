// SPDX-License-Identifier: Apache-2.0
// All CPUs count for ever. Parameter ring=0: in ring 0 instead of ring 3; irqs=0/1; loops: stop
// there (0 = for ever).
#include "../rt.h"

// Own cache line, and page, each: they are written all the time.
static _Alignas(PAGE_SIZE) volatile uint64_t counters[CPU_MAX][PAGE_SIZE / 8];
static uint64_t ring, irqs, loops;

static uint64_t count(void *arg)
{
    volatile uint64_t *counter = arg;
    while (!loops || *counter < loops)
        ++*counter;
    return 0;
}

static void spin(void *arg)
{
    (void)arg;
    void *counter = (void *)counters[cpu_self()->index];
    if (irqs)
        irq_on();
    if (ring == 0)
        count(counter);
    else
        ring3_run(count, counter);
}

void guest_main(void)
{
    ring = guest_param(UCALL_P_RING, 3);
    irqs = guest_param(UCALL_P_IRQS, 0);
    loops = guest_param(UCALL_P_LOOPS, 0);
    for (unsigned i = 0; i < cpu_count; i++)
        guest_value(UCALL_V_COUNTER, (uintptr_t)counters[i], i);
    cpus_start(spin, NULL);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    GUEST_SYNC(1);
    spin(NULL);
    cpus_join();
}
