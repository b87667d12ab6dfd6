// SPDX-License-Identifier: Apache-2.0
#pragma once

// Runtime of the bare-metal test guests. A guest is one .c file with `guest_main`; see README.md.
// Everything is identity mapped and user accessible, so any function here also works in ring 3
// unless noted.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"
#include "ucall_abi.h"

#define PAGE_SIZE 4096ul
#define GIB       (1ul << 30)

// Provided by the guest; runs in ring 0 on CPU 0, interrupts off. Returning means guest_done(0).
void guest_main(void);

// --- talking to the host -----------------------------------------------------------------

extern bool ucall_present;

// One call; `args` in the order of ucall_abi.h. Returns `result`, UCALL_NONE without a ucall
// device.
uint64_t ucall(uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4);

// %s %d %u %x %c %p, %ld %lu %lx, field width and zero fill. At most 255 bytes per call.
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

uint64_t guest_sync(uint64_t stage, uint64_t value);
void guest_value(enum ucall_value id, uint64_t value, uint64_t index);
uint64_t guest_param(enum ucall_param id, uint64_t fallback);
void guest_stop(void);
_Noreturn void guest_done(uint64_t status);
_Noreturn void guest_assert_failed(const char *file, unsigned line, const char *expr, uint64_t a,
                                   uint64_t b);
_Noreturn void cpu_park(void);

#define GUEST_ASSERT(expr) ((expr) ? (void)0 : guest_assert_failed(__FILE__, __LINE__, #expr, 0, 0))
#define GUEST_ASSERT_EQ(a, b)                                                          \
    do {                                                                               \
        uint64_t assert_a = (uint64_t)(a), assert_b = (uint64_t)(b);                   \
        if (assert_a != assert_b)                                                      \
            guest_assert_failed(__FILE__, __LINE__, #a " == " #b, assert_a, assert_b); \
    } while (0)
#define GUEST_SYNC(stage) guest_sync((stage), 0)

// --- memory ------------------------------------------------------------------------------

struct ram_range {
    uint64_t base;
    uint64_t bytes;
};

#define RAM_RANGE_MAX 64
// Usable RAM of the boot memory map, in its order.
extern struct ram_range ram_ranges[RAM_RANGE_MAX];
extern unsigned ram_range_count;
extern unsigned boot_kind; // BOOT_LINUX64 or BOOT_PVH
extern uint64_t boot_rsdp; // 0 if the boot information has none
extern char boot_cmdline[4096];

// Carves `bytes` (rounded up to pages) of unused RAM at or above `from` and below `limit`; never
// freed, not zeroed. Ring 0, before the APs run or by one CPU only. Fails the guest when there is
// none.
void *ram_alloc(uint64_t bytes, uint64_t align, uint64_t from, uint64_t limit);

// Carves up to `pages` pages at or above `from`, across holes: fills `out`, returns the number of
// ranges; fewer pages than asked for when RAM runs out.
unsigned ram_take(uint64_t pages, uint64_t from, struct ram_range *out, unsigned max);

void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int byte, size_t n);
void *memmove(void *to, const void *from, size_t n);
int memcmp(const void *a, const void *b, size_t n);

// --- processors --------------------------------------------------------------------------

struct cpu {
    struct cpu *self;   // CPU_SELF: GS base points here
    uint64_t ring0_rsp; // CPU_RING0_RSP
    uint64_t rsp0;      // CPU_RSP0: ring 0 stack top
    uint64_t user_rsp;  // CPU_USER_RSP: ring 3 stack top
    uint32_t index;
    uint32_t apic_id;
    void *tss;
    void (*fn)(void *arg);
    void *arg;
    uint32_t online; // atomic: 1 running, 2 `fn` has returned and the CPU is parked
    uint64_t irqs;   // interrupts handled
};

extern struct cpu cpus[CPU_MAX];
// From MADT, MP table or the parameter `cpus`; CPU 0 is the one that booted.
extern unsigned cpu_count;

static inline struct cpu *cpu_self(void)
{
    struct cpu *cpu;
    __asm__ volatile("mov %%gs:0, %0" : "=r"(cpu));
    return cpu;
}

// Starts all other CPUs in parallel; each runs fn(arg) in ring 0 with its local APIC enabled and
// interrupts off. Returns when all are online. Ring 0.
void cpus_start(void (*fn)(void *arg), void *arg);
// Waits until `fn` has returned on all other CPUs.
void cpus_join(void);

// Runs fn(arg) in ring 3 on this CPU and returns its result. Interrupts keep their current state
// and are handled in ring 0 meanwhile. Ring 3 may use ports below 0x1000 and, after fpu_enable(),
// vector registers.
uint64_t ring3_run(uint64_t (*fn)(void *arg), void *arg);
// Makes x87/SSE and what CPUID offers of AVX/AVX-512 usable in ring 3 on this CPU; returns the XCR0
// that ring 3 has (3 when the host has no XSAVE). Ring 0.
uint64_t fpu_enable(void);

struct trap_frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
    uint64_t rdi, rsi, rbp, rbx, rdx, rcx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

// Ring 0, interrupts off. Vectors from 32 up are acknowledged (EOI) after the handler returns; an
// exception handler may change the frame (skip the instruction). Without a handler: report and
// park.
typedef void (*trap_fn)(struct trap_frame *frame);
void trap_handler_set(unsigned vector, trap_fn fn);

// --- interrupts --------------------------------------------------------------------------

void irq_init(
    void); // masks the PICs, enables this CPU's local APIC; cpus_start does the latter on each AP
void ipi_send(uint32_t apic_id, unsigned vector);
void ipi_wait(void); // until the last ICR command was accepted

bool tsc_deadline_present(void);
void timer_oneshot(unsigned vector, uint32_t ticks); // local APIC timer, divide by 1
void timer_periodic(unsigned vector, uint32_t ticks);
void timer_deadline(unsigned vector, uint64_t tsc);
void timer_stop(void);

// Routes legacy IRQ `irq` (0-15, MADT overrides applied) to `vector` on `apic_id`.
void ioapic_route(unsigned irq, unsigned vector, uint32_t apic_id);
// The same for an edge line of the I/O APIC itself.
void ioapic_route_gsi(unsigned gsi, unsigned vector, uint32_t apic_id);
void ioapic_mask(unsigned irq);
void pit_periodic(uint16_t divisor); // channel 0, mode 2, 1193182 Hz / divisor

void lapic_eoi(void);
void lapic_enable(void);

// The ACPI table with that signature, NULL if there is none.
const uint8_t *acpi_find(const char *name);
// Fills cpus[].apic_id and cpu_count, and what ioapic_route needs.
void firmware_tables_read(void);

// --- time --------------------------------------------------------------------------------

struct kvmclock { // KVM's pvclock_vcpu_time_info, 32 bytes
    uint32_t version;
    uint32_t pad0;
    uint64_t tsc_timestamp;
    uint64_t system_time; // ns
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad[2];
};

// Registers this CPU's page (MSR 0x4b564d01); NULL when CPUID does not offer it. Ring 0.
struct kvmclock *kvmclock_enable(void);
uint64_t kvmclock_ns(const struct kvmclock *clock);
// Parameter, CPUID 0x15, kvmclock (which it registers), PIT in that order; 0 unknown. Ring 0.
uint64_t tsc_khz(void);

// --- instructions ------------------------------------------------------------------------

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}
static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}
static inline uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
    return (uint64_t)high << 32 | low;
}
static inline void wrmsr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr"
                     :
                     : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory");
}
struct cpuid {
    uint32_t eax, ebx, ecx, edx;
};
static inline struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid c;
    __asm__ volatile("cpuid"
                     : "=a"(c.eax), "=b"(c.ebx), "=c"(c.ecx), "=d"(c.edx)
                     : "a"(leaf), "c"(subleaf));
    return c;
}
static inline void pause(void)
{
    __asm__ volatile("pause" ::: "memory");
}
static inline void irq_on(void)
{
    __asm__ volatile("sti" ::: "memory");
}
static inline void irq_off(void)
{
    __asm__ volatile("cli" ::: "memory");
}
// Sleeps until an interrupt; enables them in the same breath so that none is lost, and leaves them
// off.
static inline void irq_wait(void)
{
    __asm__ volatile("sti; hlt; cli" ::: "memory");
}
static inline uint32_t mmio_read32(uint64_t gpa)
{
    uint32_t value;
    __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(gpa) : "memory");
    return value;
}
static inline void mmio_write32(uint64_t gpa, uint32_t value)
{
    __asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(gpa) : "memory");
}
