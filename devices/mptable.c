// SPDX-License-Identifier: Apache-2.0
#include "devices/mptable.h"

#include <errno.h>
#include <string.h>

#include "vmm/layout.h"

#define PACKED __attribute__((packed))

struct PACKED floating { // 4.1
    char signature[4];
    uint32_t table;
    uint8_t paragraphs; // of 16 bytes
    uint8_t revision;
    uint8_t checksum;
    uint8_t features[5]; // [0] = 0: a table follows; [1] bit 7 = 0: virtual wire, not PIC mode
};

struct PACKED header { // 4.2
    char signature[4];
    uint16_t length;
    uint8_t revision;
    uint8_t checksum;
    char oem_id[8];
    char product_id[12];
    uint32_t oem_table;
    uint16_t oem_length;
    uint16_t entries;
    uint32_t lapic;
    uint16_t extended_length;
    uint8_t extended_checksum;
    uint8_t reserved;
};

struct PACKED processor { // 4.3.1
    uint8_t type, apic_id, apic_version;
    uint8_t flags; // bit 0 usable, bit 1 boot processor
    uint32_t signature, features;
    uint32_t reserved[2];
};

struct PACKED bus { // 4.3.2
    uint8_t type, id;
    char name[6];
};

struct PACKED ioapic { // 4.3.3
    uint8_t type, apic_id, version, flags;
    uint32_t address;
};

struct PACKED interrupt { // 4.3.4, 4.3.5
    uint8_t type, kind;
    uint16_t flags; // bits 0-1 polarity (1 high), 2-3 trigger (1 edge); 0 = as on the bus
    uint8_t source_bus, source_line, to_apic, to_pin;
};

_Static_assert(sizeof(struct floating) == 16 && sizeof(struct header) == 44 &&
                   sizeof(struct processor) == 20 && sizeof(struct bus) == 8 &&
                   sizeof(struct ioapic) == 8 && sizeof(struct interrupt) == 8,
               "MP specification 1.4, chapter 4");

enum { ENTRY_PROCESSOR, ENTRY_BUS, ENTRY_IOAPIC, ENTRY_IO_INTERRUPT, ENTRY_LOCAL_INTERRUPT };
enum { KIND_INT = 0, KIND_NMI = 1, KIND_EXTINT = 3 };
enum { FLAGS_BUS = 0, FLAGS_HIGH_EDGE = 1 | 1 << 2 };
enum { LAPIC_VERSION = 0x14, IOAPIC_VERSION = 0x11, ALL_APICS = 0xff };
enum { LINES_ISA = 16, LINE_CASCADE = 2 };

// The largest table: header, CPUs, bus, I/O APIC, its lines, two local entries.
_Static_assert(sizeof(struct floating) + sizeof(struct header) +
                       MPTABLE_CPUS_MAX * sizeof(struct processor) + sizeof(struct bus) +
                       sizeof(struct ioapic) + (GSI_MAX + 2) * sizeof(struct interrupt) <=
                   LAYOUT_MPTABLE_END - LAYOUT_MPTABLE,
               "the MP area is too small");

struct writer {
    uint8_t *at;
    uint16_t entries;
};

static void put(struct writer *w, const void *entry, size_t len)
{
    memcpy(w->at, entry, len);
    w->at += len;
    w->entries++;
}

static uint8_t checksum(const void *data, size_t len)
{
    uint8_t sum = 0;
    for (size_t i = 0; i < len; i++)
        sum = (uint8_t)(sum + ((const uint8_t *)data)[i]);
    return (uint8_t)-sum;
}

static void put_processors(struct writer *w, unsigned cpus)
{
    for (unsigned i = 0; i < cpus; i++) {
        struct processor p = {
            .type = ENTRY_PROCESSOR,
            .apic_id = (uint8_t)i,
            .apic_version = LAPIC_VERSION,
            .flags = i == 0 ? 3 : 1,
            .signature = 0x600,          // family 6: kernels ask CPUID
            .features = 1 << 0 | 1 << 9, // FPU, APIC
        };
        put(w, &p, sizeof(p));
    }
}

static void put_lines(struct writer *w, uint8_t ioapic_id)
{
    for (unsigned line = 0; line < GSI_MAX; line++) {
        if (line == LINE_CASCADE)
            continue;
        struct interrupt i = {
            .type = ENTRY_IO_INTERRUPT,
            .kind = KIND_INT,
            .flags = line < LINES_ISA ? FLAGS_BUS : FLAGS_HIGH_EDGE,
            .source_line = (uint8_t)line,
            .to_apic = ioapic_id,
            .to_pin = (uint8_t)line,
        };
        put(w, &i, sizeof(i));
    }
}

// LINT0 takes the 8259s (virtual wire), LINT1 the NMI, on every local APIC.
static void put_local(struct writer *w)
{
    static const uint8_t kinds[] = {KIND_EXTINT, KIND_NMI};
    for (unsigned lint = 0; lint < ARRAY_SIZE(kinds); lint++) {
        struct interrupt i = {
            .type = ENTRY_LOCAL_INTERRUPT,
            .kind = kinds[lint],
            .to_apic = ALL_APICS,
            .to_pin = (uint8_t)lint,
        };
        put(w, &i, sizeof(i));
    }
}

int mptable_build(struct ram *ram, unsigned cpus, struct error *err)
{
    if (cpus == 0 || cpus > MPTABLE_CPUS_MAX)
        return error_set(err, -EINVAL, "MP table: %u CPUs; expected 1 to %d", cpus,
                         MPTABLE_CPUS_MAX);
    uint8_t *area = ram_at(ram, LAYOUT_MPTABLE, LAYOUT_MPTABLE_END - LAYOUT_MPTABLE);
    if (!area)
        return error_set(err, -EFAULT, "MP table: no guest RAM at 0x%x", LAYOUT_MPTABLE);

    struct header *header = (struct header *)(area + sizeof(struct floating));
    struct writer w = {.at = (uint8_t *)(header + 1)};
    uint8_t ioapic_id = (uint8_t)cpus; // the first the processors leave free
    put_processors(&w, cpus);
    put(&w, &(struct bus) {.type = ENTRY_BUS, .id = 0, .name = "ISA   "}, sizeof(struct bus));
    put(&w, &(struct ioapic) {ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1, LAYOUT_IOAPIC},
        sizeof(struct ioapic));
    put_lines(&w, ioapic_id);
    put_local(&w);

    size_t length = (size_t)(w.at - (uint8_t *)header);
    *header = (struct header) {
        .signature = "PCMP",
        .length = (uint16_t)length,
        .revision = 4,
        .oem_id = "FERRY   ",
        .product_id = "FERRYVM     ",
        .entries = w.entries,
        .lapic = LAYOUT_LAPIC,
    };
    header->checksum = checksum(header, length);

    struct floating *f = (struct floating *)area;
    *f = (struct floating) {
        .signature = "_MP_",
        .table = LAYOUT_MPTABLE + sizeof(*f),
        .paragraphs = 1,
        .revision = 4,
    };
    f->checksum = checksum(f, sizeof(*f));
    ram_mark_dirty(ram, LAYOUT_MPTABLE, sizeof(*f) + length);
    return 0;
}
