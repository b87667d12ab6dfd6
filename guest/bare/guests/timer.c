// SPDX-License-Identifier: Apache-2.0
// Local APIC timer in all modes, PIT through the I/O APIC, kvmclock. Parameter n: interrupts per
// kind.
#include "../rt.h"

#define VECTOR_TIMER    0x50
#define VECTOR_PIT      0x51
#define VECTOR_DEADLINE 0x52

static volatile uint64_t timer_irqs, pit_irqs, deadline_irqs;

static void on_timer(struct trap_frame *frame)
{
    (void)frame;
    timer_irqs++;
}

static void on_deadline(struct trap_frame *frame)
{
    (void)frame;
    deadline_irqs++;
}

static void on_pit(struct trap_frame *frame)
{
    (void)frame;
    pit_irqs++;
}

static void count_to(const volatile uint64_t *count, uint64_t goal)
{
    while (*count < goal)
        irq_wait();
}

static void check_local_timer(uint64_t n)
{
    for (uint64_t i = 1; i <= n; i++) {
        timer_oneshot(VECTOR_TIMER, 100000);
        count_to(&timer_irqs, i);
        // More when the guest was moved: see the local APIC in vmm/vcpu_state.c.
        GUEST_ASSERT(timer_irqs >= i);
    }
    timer_periodic(VECTOR_TIMER, 1000000);
    count_to(&timer_irqs, 2 * n);
    timer_stop();
}

static uint64_t user_wait(void *arg)
{
    uint64_t goal = *(uint64_t *)arg;
    while (timer_irqs < goal)
        pause();
    return timer_irqs;
}

static void check_ring3(uint64_t n)
{
    uint64_t goal = timer_irqs + n;
    timer_periodic(VECTOR_TIMER, 1000000);
    irq_on();
    GUEST_ASSERT(ring3_run(user_wait, &goal) >= goal);
    irq_off();
    timer_stop();
}

// With a vector of its own. A tick of the periodic timer may come between the last look at the
// count and timer_stop, and stopping does not take it back from the local APIC's IRR: it is
// delivered in the first irq_wait here. Counted as the deadline's, it would look like one that came
// up to a period early (seen: 726,000 of 1,000,000 cycles, with 5,000,000 cycles spent before the
// stop).
static void check_deadline(uint64_t n)
{
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t deadline = rdtsc() + 1000000;
        timer_deadline(VECTOR_DEADLINE, deadline);
        count_to(&deadline_irqs, i);
        uint64_t now = rdtsc();
        GUEST_ASSERT_EQ(now < deadline ? deadline - now : 0, 0); // cycles it came too early
    }
    timer_stop();
}

static void check_pit(uint64_t n)
{
    ioapic_route(0, VECTOR_PIT, cpu_self()->apic_id);
    pit_periodic(11932); // 100 Hz
    count_to(&pit_irqs, n);
    ioapic_mask(0);
}

static void check_kvmclock(void)
{
    struct kvmclock *clock = kvmclock_enable();
    if (clock) {
        uint64_t last = kvmclock_ns(clock);
        for (unsigned i = 0; i < 1000; i++) {
            uint64_t now = kvmclock_ns(clock);
            GUEST_ASSERT(now >= last);
            last = now;
        }
        GUEST_ASSERT(last > 0);
    }
    guest_value(UCALL_V_KVMCLOCK, clock != NULL, 0);
}

void guest_main(void)
{
    uint64_t n = guest_param(UCALL_P_N, 3);
    irq_init();
    trap_handler_set(VECTOR_TIMER, on_timer);
    trap_handler_set(VECTOR_PIT, on_pit);
    trap_handler_set(VECTOR_DEADLINE, on_deadline);
    check_local_timer(n);
    check_ring3(n);
    if (tsc_deadline_present())
        check_deadline(n);
    if (guest_param(UCALL_P_IRQS, 1))
        check_pit(n);
    check_kvmclock();
    guest_value(UCALL_V_TIMER_IRQS, timer_irqs + deadline_irqs, 0);
    guest_value(UCALL_V_PIT_IRQS, pit_irqs, 0);
    guest_value(UCALL_V_TSC_KHZ, tsc_khz(), 0);
}
