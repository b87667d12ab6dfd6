// SPDX-License-Identifier: Apache-2.0
// The memory oracle: each CPU walks its own pages in ring 3 and adds 1 to the first byte of each,
// for ever. Stopped at any moment, the first bytes along a CPU's pages (its ranges in index order)
// are equal, or drop by one exactly once (mod 256): any other picture means lost or stale memory.
// All bytes start at 0.
//
// Parameters: pages (default 1024, all CPUs together), base (lowest address, default any; ranges
// span holes), loops (0 = for ever), period_us (least time per loop). Values: RANGES,
// RANGE_BASE/PAGES/CPU[range], HEARTBEAT[cpu] (loops completed; at least as new as the last page),
// CPUS. Then GUEST_SYNC(1) from CPU 0: every page has been written and is 0; the walk begins when
// it returns.
#include "../rt.h"

#define SLICE_RANGES 16

struct slice {
    struct ram_range ranges[SLICE_RANGES];
    unsigned count;
    volatile uint64_t heartbeat;
};

static struct slice slices[CPU_MAX];
static uint64_t loops, period_cycles;
static uint32_t zeroed, go;

// Multiplies by `keep` (0 or 1), adds `amount`.
static void pages_update(const struct slice *slice, uint8_t keep, uint8_t amount)
{
    for (unsigned i = 0; i < slice->count; i++) {
        volatile uint8_t *p = (volatile uint8_t *)slice->ranges[i].base;
        volatile uint8_t *end = p + slice->ranges[i].bytes;
        for (; p < end; p += PAGE_SIZE)
            *p = (uint8_t)(*p * keep + amount);
    }
}

static uint64_t walk(void *arg)
{
    struct slice *slice = arg;
    pages_update(slice, 0, 0);
    __atomic_fetch_add(&zeroed, 1, __ATOMIC_RELEASE);
    if (slice == &slices[0]) {
        while (__atomic_load_n(&zeroed, __ATOMIC_ACQUIRE) < cpu_count)
            pause();
        GUEST_SYNC(1);
        __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
    }
    while (!__atomic_load_n(&go, __ATOMIC_ACQUIRE))
        pause();
    for (uint64_t loop = 0; !loops || loop < loops; loop++) {
        uint64_t start = rdtsc();
        pages_update(slice, 1, 1);
        slice->heartbeat++;
        while (rdtsc() - start < period_cycles)
            pause();
    }
    return 0;
}

static void run(void *arg)
{
    (void)arg;
    ring3_run(walk, &slices[cpu_self()->index]);
}

static unsigned slices_carve(uint64_t pages, uint64_t base)
{
    unsigned announced = 0;
    for (unsigned cpu = 0; cpu < cpu_count; cpu++) {
        struct slice *slice = &slices[cpu];
        uint64_t share = pages / cpu_count + (cpu < pages % cpu_count);
        slice->count = ram_take(share, base, slice->ranges, SLICE_RANGES);
        for (unsigned i = 0; i < slice->count; i++, announced++) {
            guest_value(UCALL_V_RANGE_BASE, slice->ranges[i].base, announced);
            guest_value(UCALL_V_RANGE_PAGES, slice->ranges[i].bytes / PAGE_SIZE, announced);
            guest_value(UCALL_V_RANGE_CPU, cpu, announced);
            share -= slice->ranges[i].bytes / PAGE_SIZE;
        }
        GUEST_ASSERT_EQ(share, 0); // enough RAM for what was asked
        guest_value(UCALL_V_HEARTBEAT, (uintptr_t)&slice->heartbeat, cpu);
    }
    return announced;
}

void guest_main(void)
{
    uint64_t pages = guest_param(UCALL_P_PAGES, 1024);
    uint64_t base = guest_param(UCALL_P_BASE, 0);
    uint64_t period_us = guest_param(UCALL_P_PERIOD_US, 0);
    loops = guest_param(UCALL_P_LOOPS, 0);
    if (period_us)
        period_cycles = period_us * tsc_khz() / 1000;

    unsigned ranges = slices_carve(pages, base);
    guest_value(UCALL_V_RANGES, ranges, 0);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    cpus_start(run, NULL);
    run(NULL);
    cpus_join();
}
