// SPDX-License-Identifier: Apache-2.0
// Dirties memory in ring 3 at a given rate and records the longest time it did not run.
// Parameters: mib (32, all CPUs together), rate (pages per second, all CPUs together; 0 = as fast
// as it goes), base, noise (0; memory that is filled with what cannot be packed before SYNC(1), in
// MiB; the first `mib` of it are then walked; ring 3, one CPU). Values: GAP[cpu] (struct
// ucall_gap), CPUS, RANGE_*, TSC_KHZ; then GUEST_SYNC(1) from CPU 0. Each visit writes the CPU's
// running page count to the first word of the page.
#include "../rt.h"

#define SLICE_RANGES 16

struct worker {
    _Alignas(64) struct ucall_gap gap;
    struct ram_range ranges[SLICE_RANGES];
    unsigned count;
    uint64_t walked; // pages of the ranges that are walked
    uint64_t last;   // TSC at the last look
    uint64_t due;    // TSC at which the next page may be written
};

static struct worker workers[CPU_MAX];
static uint64_t loops;
static uint64_t page_cycles; // least time per page of one CPU

static uint64_t look(struct worker *worker)
{
    volatile struct ucall_gap *gap = &worker->gap;
    uint64_t now = rdtsc();
    int64_t distance = (int64_t)(now - worker->last);
    worker->last = now;
    if (gap->reset) {
        gap->longest = 0;
        gap->reset = 0;
    } else if (distance > (int64_t)gap->longest) { // signed: another host's TSC may be behind
        gap->longest_at = now;
        gap->longest = (uint64_t)distance;
    }
    return now;
}

static void page_visit(struct worker *worker, uint64_t page)
{
    volatile struct ucall_gap *gap = &worker->gap;
    *(volatile uint64_t *)page = gap->total;
    gap->total++;
    worker->due += page_cycles;
    // No burst to make up for a time without running.
    uint64_t now = look(worker);
    if ((int64_t)(now - worker->due) > 64 * (int64_t)page_cycles)
        worker->due = now;
    while ((int64_t)(worker->due - look(worker)) > 0)
        ;
}

static void pages_visit(struct worker *worker)
{
    uint64_t left = worker->walked;
    for (unsigned i = 0; i < worker->count; i++) {
        uint64_t end = worker->ranges[i].base + worker->ranges[i].bytes;
        for (uint64_t page = worker->ranges[i].base; page < end && left; page += PAGE_SIZE, left--)
            page_visit(worker, page);
    }
}

// xorshift64: no two words alike.
static uint64_t noise_fill(void *arg)
{
    struct worker *worker = arg;
    uint64_t x = 0x9e3779b97f4a7c15;
    for (unsigned i = 0; i < worker->count; i++) {
        volatile uint64_t *p = (volatile uint64_t *)worker->ranges[i].base;
        volatile uint64_t *end = p + worker->ranges[i].bytes / sizeof(*p);
        while (p < end) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *p++ = x;
        }
    }
    return 0;
}

static uint64_t work(void *arg)
{
    struct worker *worker = arg;
    worker->due = worker->last = rdtsc();
    for (uint64_t loop = 0; !loops || loop < loops; loop++)
        pages_visit(worker);
    return 0;
}

static void run(void *arg)
{
    (void)arg;
    ring3_run(work, &workers[cpu_self()->index]);
}

static unsigned worker_carve(unsigned cpu, uint64_t pages, uint64_t walked, uint64_t base,
                             unsigned announced)
{
    struct worker *worker = &workers[cpu];
    worker->walked = walked;
    worker->count = ram_take(pages, base, worker->ranges, SLICE_RANGES);
    for (unsigned i = 0; i < worker->count; i++, announced++) {
        guest_value(UCALL_V_RANGE_BASE, worker->ranges[i].base, announced);
        guest_value(UCALL_V_RANGE_PAGES, worker->ranges[i].bytes / PAGE_SIZE, announced);
        guest_value(UCALL_V_RANGE_CPU, cpu, announced);
        pages -= worker->ranges[i].bytes / PAGE_SIZE;
    }
    GUEST_ASSERT_EQ(pages, 0);
    guest_value(UCALL_V_GAP, (uintptr_t)&worker->gap, cpu);
    return announced;
}

void guest_main(void)
{
    uint64_t pages = guest_param(UCALL_P_MIB, 32) * 256;
    uint64_t base = guest_param(UCALL_P_BASE, 0);
    uint64_t rate = guest_param(UCALL_P_RATE, 0);
    uint64_t khz = tsc_khz();
    loops = guest_param(UCALL_P_LOOPS, 0);
    if (rate)
        page_cycles = khz * 1000 * cpu_count / rate;
    uint64_t noise = guest_param(UCALL_P_NOISE, 0) * 256;
    uint64_t taken = noise > pages ? noise : pages;
    GUEST_ASSERT(pages >= cpu_count && (!rate || khz) && (!noise || cpu_count == 1));

    unsigned ranges = 0;
    for (unsigned cpu = 0; cpu < cpu_count; cpu++)
        ranges = worker_carve(cpu, taken / cpu_count, pages / cpu_count, base, ranges);
    guest_value(UCALL_V_RANGES, ranges, 0);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    guest_value(UCALL_V_TSC_KHZ, khz, 0);
    if (noise)
        ring3_run(noise_fill, &workers[0]);
    cpus_start(run, NULL);
    GUEST_SYNC(1);
    run(NULL);
    cpus_join();
}
