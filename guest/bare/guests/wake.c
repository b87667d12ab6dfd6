// SPDX-License-Identifier: Apache-2.0
// Sleeps (hlt) until its timer, for ever, and tells how late it woke. Parameters: period_us between
// two wakes; n wakes per report; loops of work (ring 3) after each; rounds in `rate` (0 = for
// ever).
#include "../rt.h"

#define VECTOR    0x50
#define BUCKET_US 10

enum { BUCKETS = 4096 }; // the last holds all that is later

static volatile uint64_t woken_at;
static uint32_t buckets[BUCKETS];
static uint64_t period_us, wakes, work, khz;

struct result {
    uint64_t p50, p99, max;
};

static void on_timer(struct trap_frame *frame)
{
    (void)frame;
    woken_at = rdtsc();
}

// Ring 3, where it costs nothing.
static uint64_t evaluate(void *arg)
{
    struct result *r = arg;
    uint64_t seen = 0;
    *r = (struct result) {0, 0, 0};
    for (uint64_t i = 0; i < BUCKETS; i++) {
        uint64_t before = seen, us = (i + 1) * BUCKET_US;
        seen += buckets[i];
        if (before < wakes - wakes / 2 && seen >= wakes - wakes / 2)
            r->p50 = us;
        if (before < wakes - wakes / 100 && seen >= wakes - wakes / 100)
            r->p99 = us;
        if (buckets[i])
            r->max = us;
        buckets[i] = 0;
    }
    return 0;
}

static uint64_t labour(void *arg)
{
    (void)arg;
    for (volatile uint64_t i = 0; i < work; i++)
        ;
    return 0;
}

static void sleep_once(void)
{
    uint64_t deadline = rdtsc() + period_us * khz / 1000;
    woken_at = 0;
    timer_oneshot(VECTOR, (uint32_t)(period_us * 1000)); // KVM's local APIC counts ns
    while (!woken_at)
        irq_wait();
    uint64_t late = woken_at > deadline ? (woken_at - deadline) * 1000 / khz : 0; // us
    uint64_t bucket = late / BUCKET_US;
    buckets[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (work)
        ring3_run(labour, NULL);
}

void guest_main(void)
{
    struct result result;
    period_us = guest_param(UCALL_P_PERIOD_US, 5000);
    wakes = guest_param(UCALL_P_N, 200);
    work = guest_param(UCALL_P_LOOPS, 0);
    uint64_t rounds = guest_param(UCALL_P_RATE, 0);
    khz = tsc_khz();
    GUEST_ASSERT(khz && wakes);
    irq_init();
    trap_handler_set(VECTOR, on_timer);
    GUEST_SYNC(1);
    for (uint64_t round = 0; !rounds || round < rounds; round++) {
        for (uint64_t i = 0; i < wakes; i++)
            sleep_once();
        ring3_run(evaluate, &result);
        guest_value(UCALL_V_WAKE_P50, result.p50, 0);
        guest_value(UCALL_V_WAKE_P99, result.p99, 0);
        guest_value(UCALL_V_WAKE_MAX, result.max, 0);
    }
}
