// SPDX-License-Identifier: Apache-2.0
// How fast time goes: kvmclock and the TSC frequency.
#include "internal.h"

#define MSR_KVM_SYSTEM_TIME      0x4b564d01
#define KVM_CPUID_FEATURES       0x40000001
#define KVM_FEATURE_CLOCKSOURCE2 (1u << 3)
#define PIT_HZ                   1193182u

static _Alignas(64) struct kvmclock clock_pages[CPU_MAX];

struct kvmclock *kvmclock_enable(void)
{
    struct cpuid base = cpuid(0x40000000, 0);
    if (base.ebx != 0x4b4d564b || !(cpuid(KVM_CPUID_FEATURES, 0).eax & KVM_FEATURE_CLOCKSOURCE2))
        return NULL;
    struct kvmclock *clock = &clock_pages[cpu_self()->index];
    wrmsr(MSR_KVM_SYSTEM_TIME, (uintptr_t)clock | 1);
    return clock;
}

uint64_t kvmclock_ns(const struct kvmclock *clock)
{
    const volatile struct kvmclock *page = clock;
    for (;;) {
        uint32_t version = page->version;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        uint64_t delta = rdtsc() - page->tsc_timestamp;
        delta = page->tsc_shift < 0 ? delta >> -page->tsc_shift : delta << page->tsc_shift;
        uint64_t ns = page->system_time +
                      (uint64_t)((unsigned __int128)delta * page->tsc_to_system_mul >> 32);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        // Odd: KVM is writing it.
        if (!(version & 1) && version == page->version)
            return ns;
    }
}

// Counts TSC cycles while PIT channel 2 runs down 10 ms (mode 0: output rises at zero).
static uint64_t pit_tsc_khz(void)
{
    unsigned count = PIT_HZ / 100;
    outb(0x61, (uint8_t)((inb(0x61) & ~2u) | 1));
    outb(0x43, 0xb0);
    outb(0x42, (uint8_t)count);
    outb(0x42, (uint8_t)(count >> 8));
    uint64_t start = rdtsc();
    for (unsigned tries = 0; !(inb(0x61) & 0x20); tries++)
        if (tries == 1000000)
            return 0;
    return (rdtsc() - start) / 10;
}

uint64_t tsc_khz(void)
{
    uint64_t khz = guest_param(UCALL_P_TSC_KHZ, 0);
    if (khz)
        return khz;
    if (cpuid(0, 0).eax >= 0x15) {
        struct cpuid c = cpuid(0x15, 0);
        if (c.eax && c.ebx && c.ecx)
            return (uint64_t)c.ecx * c.ebx / c.eax / 1000;
    }
    struct kvmclock *clock = kvmclock_enable();
    if (clock) {
        kvmclock_ns(clock);
        uint64_t scaled = (1000000ull << 32) / clock->tsc_to_system_mul;
        return clock->tsc_shift < 0 ? scaled << -clock->tsc_shift : scaled >> clock->tsc_shift;
    }
    return pit_tsc_khz();
}
