// SPDX-License-Identifier: Apache-2.0
// n byte-wide port accesses, for the cost of an exit. Parameters: n (1000), port (0x80), write (1),
// ring (0). Values: TSC_DELTA (all n together), COUNT, TSC_KHZ.
#include "../rt.h"

struct work {
    uint64_t n;
    uint16_t port;
    bool write;
    uint64_t cycles;
};

static uint64_t exits(void *arg)
{
    struct work *work = arg;
    uint64_t start = rdtsc();
    if (work->write)
        for (uint64_t i = work->n; i; i--)
            outb(work->port, 0);
    else
        for (uint64_t i = work->n; i; i--)
            inb(work->port);
    work->cycles = rdtsc() - start;
    return 0;
}

void guest_main(void)
{
    struct work work = {
        .n = guest_param(UCALL_P_N, 1000),
        .port = (uint16_t)guest_param(UCALL_P_PORT, 0x80),
        .write = guest_param(UCALL_P_WRITE, 1),
    };
    uint64_t khz = tsc_khz();
    if (guest_param(UCALL_P_RING, 0) == 3)
        ring3_run(exits, &work);
    else
        exits(&work);
    guest_value(UCALL_V_TSC_DELTA, work.cycles, 0);
    guest_value(UCALL_V_COUNT, work.n, 0);
    guest_value(UCALL_V_TSC_KHZ, khz, 0);
}
