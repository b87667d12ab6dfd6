// SPDX-License-Identifier: Apache-2.0
// Counts interrupts that the host raises: legacy IRQ 5 (vector 0x70) and messages to vector 0x71.
// Parameter n (10): of each kind. COUNTER[0], COUNTER[1]: where they are counted; then
// GUEST_SYNC(1). Ends when both have come n times.
#include "../rt.h"

#define VECTOR_LINE    0x70
#define VECTOR_MESSAGE 0x71
#define IRQ_LINE       5

static volatile uint64_t lines, messages;

static void on_line(struct trap_frame *frame)
{
    (void)frame;
    lines++;
}

static void on_message(struct trap_frame *frame)
{
    (void)frame;
    messages++;
}

void guest_main(void)
{
    uint64_t n = guest_param(UCALL_P_N, 10);
    irq_init();
    trap_handler_set(VECTOR_LINE, on_line);
    trap_handler_set(VECTOR_MESSAGE, on_message);
    ioapic_route(IRQ_LINE, VECTOR_LINE, cpu_self()->apic_id);
    guest_value(UCALL_V_COUNTER, (uintptr_t)&lines, 0);
    guest_value(UCALL_V_COUNTER, (uintptr_t)&messages, 1);
    GUEST_SYNC(1);
    while (lines < n || messages < n)
        irq_wait();
    GUEST_ASSERT_EQ(lines, n);
    GUEST_ASSERT_EQ(messages, n);
}
