// SPDX-License-Identifier: Apache-2.0
// Burns (ring 3) or sleeps, and tells its steal time now and then. Parameters: period_us between
// two reports; irqs=1: sleeps instead of burning; n reports (0 = for ever).
#include "../rt.h"

#define VECTOR         0x50
#define MSR_STEAL_TIME 0x4b564d03
#define CPUID_KVM      0x40000001
#define FEATURE_STEAL  (1u << 5)

struct steal_time { // KVM's
    volatile uint64_t steal;
    volatile uint32_t version;
    uint32_t flags;
    uint8_t preempted;
    uint8_t reserved[47];
};
static _Alignas(64) struct steal_time steal;
static uint64_t until;
static volatile bool woken;

static uint64_t burn(void *arg)
{
    (void)arg;
    while (rdtsc() < until)
        pause();
    return 0;
}

static void on_timer(struct trap_frame *frame)
{
    (void)frame;
    woken = true;
}

static uint64_t steal_read(void)
{
    uint32_t version;
    uint64_t ns;
    do {
        version = steal.version;
        ns = steal.steal;
    } while (version & 1 || version != steal.version);
    return ns;
}

void guest_main(void)
{
    uint64_t period_us = guest_param(UCALL_P_PERIOD_US, 200000);
    uint64_t reports = guest_param(UCALL_P_N, 0);
    bool sleeps = guest_param(UCALL_P_IRQS, 0);
    uint64_t khz = tsc_khz();
    GUEST_ASSERT(khz);
    GUEST_ASSERT(cpuid(CPUID_KVM, 0).eax & FEATURE_STEAL);
    wrmsr(MSR_STEAL_TIME, (uintptr_t)&steal | 1);
    irq_init();
    trap_handler_set(VECTOR, on_timer);
    GUEST_SYNC(1);
    for (uint64_t i = 0; !reports || i < reports; i++) {
        if (sleeps) {
            woken = false;
            timer_oneshot(VECTOR, (uint32_t)(period_us * 1000));
            while (!woken)
                irq_wait();
        } else {
            until = rdtsc() + period_us * khz / 1000;
            ring3_run(burn, NULL);
        }
        guest_value(UCALL_V_STEAL_NS, steal_read(), 0);
    }
}
