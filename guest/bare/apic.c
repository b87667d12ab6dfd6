// SPDX-License-Identifier: Apache-2.0
// Firmware tables, local and I/O APIC, legacy PIC and PIT.
#include "internal.h"

#define LAPIC_TPR           0x80
#define LAPIC_EOI           0xb0
#define LAPIC_SVR           0xf0
#define LAPIC_ICR_LOW       0x300
#define LAPIC_ICR_HIGH      0x310
#define LAPIC_LVT_TIMER     0x320
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_DIVIDE  0x3e0
#define ICR_PENDING         0x1000
#define ICR_ASSERT          0x4000
#define ICR_INIT            0x500
#define ICR_STARTUP         0x600
#define LVT_MASKED          0x10000
#define LVT_PERIODIC        0x20000
#define LVT_DEADLINE        0x40000
#define MSR_TSC_DEADLINE    0x6e0

// Legacy IRQ -> global interrupt, and its polarity/trigger bits for the redirection entry.
struct irq_route {
    uint32_t gsi;
    uint32_t flags;
};

static struct irq_route irq_routes[16];
static uint64_t ioapic_gpa = 0xfec00000;

static void lapic_write(unsigned reg, uint32_t value)
{
    mmio_write32(LAPIC_GPA + reg, value);
}

static uint32_t lapic_read(unsigned reg)
{
    return mmio_read32(LAPIC_GPA + reg);
}

// --- firmware tables ---------------------------------------------------------------------

static void cpu_found(uint32_t apic_id, uint32_t boot_apic_id)
{
    if (apic_id == boot_apic_id || apic_id >= 255 || cpu_count == CPU_MAX)
        return;
    cpus[cpu_count].index = cpu_count;
    cpus[cpu_count++].apic_id = apic_id;
}

// MPS INTI flags (ACPI 6.4 table 5.26): polarity 3 = active low, trigger 3 = level.
static uint32_t inti_flags(unsigned flags)
{
    return ((flags & 3) == 3 ? 1u << 13 : 0) | ((flags >> 2 & 3) == 3 ? 1u << 15 : 0);
}

static uint32_t le32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t le64(const uint8_t *p)
{
    return le32(p) | (uint64_t)le32(p + 4) << 32;
}

// ACPI 6.4, 5.2.12.
static void madt_read(const uint8_t *madt, uint32_t boot_apic_id)
{
    const uint8_t *end = madt + le32(madt + 4);
    for (const uint8_t *e = madt + 44; e + 2 <= end && e[1] >= 2; e += e[1]) {
        if (e[0] == 0 && (le32(e + 4) & 1))
            cpu_found(e[3], boot_apic_id);
        else if (e[0] == 9 && (le32(e + 8) & 1))
            cpu_found(le32(e + 4), boot_apic_id);
        else if (e[0] == 1 && le32(e + 8) == 0)
            ioapic_gpa = le32(e + 4);
        else if (e[0] == 2 && e[3] < 16)
            irq_routes[e[3]] = (struct irq_route) {le32(e + 4), inti_flags(e[8])};
    }
}

static const uint8_t *memory_find(uint64_t from, uint64_t to, const char *signature, size_t n)
{
    for (uint64_t p = from; p + n <= to; p += 16)
        if (*(const uint32_t *)p == *(const uint32_t *)signature &&
            !memcmp((const void *)p, signature, n))
            return (const uint8_t *)p;
    return NULL;
}

const uint8_t *acpi_find(const char *name)
{
    const uint8_t *rsdp =
        boot_rsdp ? (const uint8_t *)boot_rsdp : memory_find(0xe0000, 0x100000, "RSD PTR ", 8);
    if (!rsdp)
        return NULL;
    bool wide = rsdp[15] >= 2 && le64(rsdp + 24);
    const uint8_t *root = (const uint8_t *)(wide ? le64(rsdp + 24) : le32(rsdp + 16));
    unsigned step = wide ? 8 : 4;
    for (unsigned at = 36; at + step <= le32(root + 4); at += step) {
        const uint8_t *table = (const uint8_t *)(wide ? le64(root + at) : le32(root + at));
        if (!memcmp(table, name, 4))
            return table;
    }
    return NULL;
}

// MultiProcessor Specification 1.4, chapter 4.
static bool mp_read(uint32_t boot_apic_id)
{
    const uint8_t *pointer = memory_find(0x9fc00, 0xa0000, "_MP_", 4);
    if (!pointer)
        pointer = memory_find(0xf0000, 0x100000, "_MP_", 4);
    if (!pointer || !le32(pointer + 4))
        return false;
    const uint8_t *table = (const uint8_t *)(uint64_t)le32(pointer + 4);
    unsigned entries = table[34] | table[35] << 8;
    const uint8_t *e = table + 44;
    for (unsigned i = 0; i < entries; i++) {
        if (e[0] == 0 && (e[3] & 1))
            cpu_found(e[1], boot_apic_id);
        else if (e[0] == 2 && (e[3] & 1))
            ioapic_gpa = le32(e + 4);
        else if (e[0] == 3 && e[1] == 0 && e[5] < 16)
            irq_routes[e[5]] = (struct irq_route) {e[7], inti_flags(e[2])};
        e += e[0] == 0 ? 20 : 8;
    }
    return true;
}

void firmware_tables_read(void)
{
    uint32_t boot_apic_id = lapic_read(0x20) >> 24;
    for (unsigned i = 0; i < 16; i++)
        irq_routes[i].gsi = i;
    cpus[0].apic_id = boot_apic_id;
    cpu_by_apic_id[boot_apic_id] = &cpus[0];
    cpu_count = 1;

    const uint8_t *madt = acpi_find("APIC");
    bool known = madt || mp_read(boot_apic_id);
    if (madt)
        madt_read(madt, boot_apic_id);
    uint64_t wanted = guest_param(UCALL_P_CPUS, cpu_count);
    GUEST_ASSERT(wanted >= 1 && wanted <= CPU_MAX);
    if (known)
        GUEST_ASSERT(wanted <= cpu_count);
    for (uint32_t id = 0; !known && cpu_count < wanted; id++)
        cpu_found(id, boot_apic_id);
    cpu_count = (unsigned)wanted;
}

// --- local APIC --------------------------------------------------------------------------

void lapic_eoi(void)
{
    lapic_write(LAPIC_EOI, 0);
}

void lapic_enable(void)
{
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_SVR, 0x100 | VECTOR_SPURIOUS);
}

void irq_init(void)
{
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    lapic_enable();
}

void ipi_wait(void)
{
    while (lapic_read(LAPIC_ICR_LOW) & ICR_PENDING)
        pause();
}

static void icr_write(uint32_t apic_id, uint32_t command)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, command);
}

void ipi_send(uint32_t apic_id, unsigned vector)
{
    icr_write(apic_id, ICR_ASSERT | vector);
}

void lapic_init_ap(uint32_t apic_id)
{
    icr_write(apic_id, ICR_ASSERT | ICR_INIT);
    ipi_wait();
}

void lapic_start_ap(uint32_t apic_id, unsigned page)
{
    icr_write(apic_id, ICR_ASSERT | ICR_STARTUP | page);
    ipi_wait();
}

bool tsc_deadline_present(void)
{
    return cpuid(1, 0).ecx >> 24 & 1 && guest_param(UCALL_P_DEADLINE, 1);
}

static void timer_start(uint32_t lvt, uint32_t ticks)
{
    lapic_write(LAPIC_LVT_TIMER, lvt);
    lapic_write(LAPIC_TIMER_DIVIDE, 0xb); // by 1
    lapic_write(LAPIC_TIMER_INITIAL, ticks);
}

void timer_oneshot(unsigned vector, uint32_t ticks)
{
    timer_start(vector, ticks);
}

void timer_periodic(unsigned vector, uint32_t ticks)
{
    timer_start(vector | LVT_PERIODIC, ticks);
}

void timer_deadline(unsigned vector, uint64_t tsc)
{
    lapic_write(LAPIC_LVT_TIMER, vector | LVT_DEADLINE);
    wrmsr(MSR_TSC_DEADLINE, tsc);
}

void timer_stop(void)
{
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
    lapic_write(LAPIC_TIMER_INITIAL, 0);
}

// --- I/O APIC and PIT --------------------------------------------------------------------

static void ioapic_write(unsigned reg, uint32_t value)
{
    mmio_write32(ioapic_gpa, reg);
    mmio_write32(ioapic_gpa + 0x10, value);
}

void ioapic_route(unsigned irq, unsigned vector, uint32_t apic_id)
{
    const struct irq_route *route = &irq_routes[irq];
    unsigned reg = 0x10 + 2 * route->gsi;
    ioapic_write(reg + 1, apic_id << 24);
    ioapic_write(reg, vector | route->flags);
}

void ioapic_route_gsi(unsigned gsi, unsigned vector, uint32_t apic_id)
{
    ioapic_write(0x10 + 2 * gsi + 1, apic_id << 24);
    ioapic_write(0x10 + 2 * gsi, vector); // edge, active high
}

void ioapic_mask(unsigned irq)
{
    ioapic_write(0x10 + 2 * irq_routes[irq].gsi, LVT_MASKED);
}

void pit_periodic(uint16_t divisor)
{
    outb(0x43, 0x34); // channel 0, low then high byte, mode 2
    outb(0x40, (uint8_t)divisor);
    outb(0x40, (uint8_t)(divisor >> 8));
}
