// SPDX-License-Identifier: Apache-2.0
// All CPUs sleep for ever: for kick, stop and pause. Parameter irqs=0: with interrupts masked.
#include "../rt.h"

static void halt(void *arg)
{
    bool irqs = arg != NULL;
    for (;;)
        if (irqs)
            irq_wait();
        else
            cpu_park();
}

void guest_main(void)
{
    void *irqs = guest_param(UCALL_P_IRQS, 1) ? &cpu_count : NULL;
    cpus_start(halt, irqs);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    GUEST_SYNC(1);
    halt(irqs);
}
