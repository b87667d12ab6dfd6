// SPDX-License-Identifier: Apache-2.0
// Listens for the power button, as an ACPI driver does: syncs 1 when it listens, prints each press.
// Then it powers off; with parameter n it does so at the n-th press only, with 0 never.
#include "../rt.h"

#define VECTOR_EVENT 0x70

static volatile uint64_t presses;

static void on_event(struct trap_frame *frame)
{
    (void)frame;
    if (inb(UCALL_EVENT_PORT))
        presses++;
}

void guest_main(void)
{
    uint64_t n = guest_param(UCALL_P_N, 1);
    irq_init();
    trap_handler_set(VECTOR_EVENT, on_event);
    ioapic_route_gsi(UCALL_EVENT_GSI, VECTOR_EVENT, cpu_self()->apic_id);
    GUEST_SYNC(1);
    for (uint64_t seen = 0; !n || seen < n;) {
        irq_wait();
        if (presses == seen)
            continue;
        seen = presses;
        guest_value(UCALL_V_COUNT, seen, 0);
    }
    outb(UCALL_SLEEP_PORT, UCALL_SLEEP_S5);
    cpu_park();
}
