// SPDX-License-Identifier: Apache-2.0
#include "devices/acpi.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "devices/aml.h"
#include "vmm/layout.h"

enum {
    CPUS_MAX = 4096,
    VIRTIO_MAX = 256, // names V000 .. V0FF
    TABLE_ALIGN = 16,
};

#define PACKED __attribute__((packed))

struct PACKED rsdp { // 5.2.5.3
    char signature[8];
    uint8_t checksum; // of the first 20 bytes
    char oem_id[6];
    uint8_t revision;
    uint32_t rsdt;
    uint32_t length;
    uint64_t xsdt;
    uint8_t extended_checksum;
    uint8_t reserved[3];
};

struct PACKED header { // 5.2.6
    char signature[4];
    uint32_t length;
    uint8_t revision;
    uint8_t checksum;
    char oem_id[6];
    char oem_table_id[8];
    uint32_t oem_revision;
    char creator_id[4];
    uint32_t creator_revision;
};

struct PACKED gas { // 5.2.3.2
    uint8_t space;  // 1 = system I/O
    uint8_t bit_width, bit_offset;
    uint8_t access; // 1 = byte
    uint64_t address;
};

struct PACKED fadt { // 5.2.9; what hardware-reduced ACPI ignores stays zero
    struct header header;
    uint32_t facs, dsdt;
    uint8_t reserved0, profile;
    uint16_t sci;
    uint8_t legacy_blocks[61];
    uint16_t boot_arch;
    uint8_t reserved1;
    uint32_t flags;
    struct gas reset_reg;
    uint8_t reset_value;
    uint16_t arm_boot_arch;
    uint8_t minor_version;
    uint64_t x_facs, x_dsdt;
    struct gas legacy_x_blocks[8];
    struct gas sleep_control, sleep_status;
    uint64_t hypervisor_id;
};

_Static_assert(sizeof(struct rsdp) == 36, "ACPI 6.5 table 5.3");
_Static_assert(sizeof(struct header) == 36, "ACPI 6.5 table 5.4");
_Static_assert(offsetof(struct fadt, boot_arch) == 109, "ACPI 6.5 table 5.9");
_Static_assert(offsetof(struct fadt, x_dsdt) == 140, "ACPI 6.5 table 5.9");
_Static_assert(offsetof(struct fadt, sleep_control) == 244, "ACPI 6.5 table 5.9");
_Static_assert(sizeof(struct fadt) == 276, "ACPI 6.5 table 5.9");

// Boot architecture flags, table 5.10. Left clear: "legacy devices" (all are in the DSDT) and
// "8042" (only its reset is real; a driver that probes for a keyboard would wait in vain). CMOS RTC
// and MSI are there, so their "not" flags are clear too.
enum { BOOT_NO_VGA = 1 << 2 };

enum { // fixed feature flags, table 5.9.1
    FADT_WBINVD = 1 << 0,
    FADT_PROC_C1 = 1 << 2,
    FADT_POWER_BUTTON_IS_DEVICE = 1 << 4, // also "none"
    FADT_SLEEP_BUTTON_IS_DEVICE = 1 << 5,
    FADT_RTC_WAKE_NOT_FIXED = 1 << 6,
    FADT_RESET_REG = 1 << 10,
    FADT_HW_REDUCED = 1 << 20,
};

// The tables grow one after the other in the area, in place.
struct area {
    uint8_t *base; // of [LAYOUT_ACPI, LAYOUT_ACPI_END)
    size_t used;
};

#define AREA_SIZE (LAYOUT_ACPI_END - LAYOUT_ACPI)

// Room for a table, zeroed; NULL when full. Tables lie far apart enough for any alignment asked.
static void *area_take(struct area *area, size_t len)
{
    if (len > AREA_SIZE - area->used)
        return NULL;
    void *table = area->base + area->used;
    memset(table, 0, len);
    area->used = align_up(area->used + len, TABLE_ALIGN);
    return table;
}

static uint32_t area_gpa(const struct area *area, const void *table)
{
    return (uint32_t)(LAYOUT_ACPI + ((const uint8_t *)table - area->base));
}

static uint8_t checksum(const void *data, size_t len)
{
    uint8_t sum = 0;
    for (size_t i = 0; i < len; i++)
        sum = (uint8_t)(sum + ((const uint8_t *)data)[i]);
    return (uint8_t)-sum;
}

// The last step of each table: its checksum covers everything.
static void header_set(struct header *h, const char *signature, uint8_t revision, size_t length)
{
    memcpy(h->signature, signature, 4);
    h->length = (uint32_t)length;
    h->revision = revision;
    h->checksum = 0;
    memcpy(h->oem_id, "FERRY ", 6);
    memcpy(h->oem_table_id, "FERRYVM ", 8);
    h->oem_revision = 1;
    memcpy(h->creator_id, "FERY", 4);
    h->creator_revision = 1;
    h->checksum = checksum(h, length);
}

// --- DSDT
//
// Only what a kernel cannot find out otherwise: each device costs it a walk, a platform device and
// a driver probe (0.1 s where ring 0 is emulated). Processors are in the MADT, and the clock is at
// the ports every PC has.

static void dsdt_power(struct aml *aml)
{
    aml_name(aml, "_S5");
    size_t package = aml_package(aml, 4);
    aml_int(aml, ACPI_SLEEP_POWEROFF >> 2 & 7);
    for (unsigned i = 0; i < 3; i++)
        aml_int(aml, 0);
    aml_end(aml, package);
}

static void dsdt_com1(struct aml *aml)
{
    size_t device = aml_device(aml, "COM1");
    aml_name_eisa_id(aml, "_HID", "PNP0501");
    aml_name_int(aml, "_UID", 0);
    aml_name_string(aml, "_DDN", "COM1");
    size_t crs = aml_resources(aml);
    aml_resource_io(aml, PORT_COM1, 8);
    aml_resource_irq_edge(aml, GSI_COM1);
    aml_resources_end(aml, crs);
    aml_end(aml, device);
}

static void dsdt_pvpanic(struct aml *aml)
{
    size_t device = aml_device(aml, "PEVT");
    aml_name_string(aml, "_HID", "QEMU0001");
    size_t crs = aml_resources(aml);
    aml_resource_io(aml, PORT_PVPANIC, 1);
    aml_resources_end(aml, crs);
    aml_name_int(aml, "_STA", 0x0b); // present, enabled, working; not for a user interface
    aml_end(aml, device);
}

static void dsdt_power_button(struct aml *aml)
{
    size_t device = aml_device(aml, "PWRB");
    aml_name_eisa_id(aml, "_HID", "PNP0C0C");
    aml_end(aml, device);
}

static void dsdt_vmgenid(struct aml *aml)
{
    size_t device = aml_device(aml, "VGEN");
    aml_name_string(aml, "_HID", "FERY0001");
    aml_name_string(aml, "_CID", "VM_Gen_Counter");
    aml_name_string(aml, "_DDN", "VM_Gen_Counter");
    aml_name(aml, "ADDR");
    size_t package = aml_package(aml, 2); // low, high half
    aml_int(aml, LAYOUT_VMGENID);
    aml_int(aml, 0);
    aml_end(aml, package);
    aml_end(aml, device);
}

static void event_notify(struct aml *aml, unsigned event, const char *device)
{
    size_t when = aml_if(aml);
    aml_byte(aml, AML_AND);
    aml_byte(aml, AML_LOCAL0);
    aml_int(aml, event);
    aml_byte(aml, AML_NULL_NAME);
    aml_byte(aml, AML_NOTIFY);
    aml_path(aml, device);
    aml_int(aml, 0x80); // "pressed", "changed"
    aml_end(aml, when);
}

// _EVT reads the pending events once (that clears them) and tells whom they concern.
static void dsdt_event_device(struct aml *aml, const struct acpi_config *config)
{
    size_t device = aml_device(aml, "GED");
    aml_name_string(aml, "_HID", "ACPI0013");
    aml_name_int(aml, "_UID", 0);
    size_t crs = aml_resources(aml);
    aml_resource_irq_edge(aml, GSI_EVENT);
    aml_resources_end(aml, crs);

    aml_region_io(aml, "EREG", PORT_EVENT, 1);
    size_t field = aml_field(aml, "EREG", 0x41); // byte access, no lock, write as zeros
    aml_field_unit(aml, "EVTS", 8);
    aml_end(aml, field);

    size_t method = aml_method(aml, "_EVT", 1, true);
    aml_byte(aml, AML_STORE);
    aml_path(aml, "EVTS");
    aml_byte(aml, AML_LOCAL0);
    event_notify(aml, ACPI_EVENT_POWER_BUTTON, "PWRB");
    if (config->vmgenid)
        event_notify(aml, ACPI_EVENT_VMGENID, "VGEN");
    aml_end(aml, method);
    aml_end(aml, device);
}

static void dsdt_virtio(struct aml *aml, const struct acpi_config *config)
{
    for (unsigned i = 0; i < config->nr_virtio; i++) {
        const struct acpi_virtio_mmio *v = &config->virtio[i];
        char name[8];
        snprintf(name, sizeof(name), "V%03X", i & 0xfff);
        size_t device = aml_device(aml, name);
        aml_name_string(aml, "_HID", "LNRO0005");
        aml_name_int(aml, "_UID", i);
        aml_name_int(aml, "_CCA", 1);
        size_t crs = aml_resources(aml);
        aml_resource_memory32(aml, (uint32_t)v->base, v->len);
        aml_resource_irq_edge(aml, v->gsi);
        aml_resources_end(aml, crs);
        aml_end(aml, device);
    }
}

// The functions' windows and the one bus; all the rest a system reads from configuration space. No
// _PRT: functions have no interrupt pins. No _OSC: the bridge is not PCI Express, so there is
// nothing to hand over.
static void dsdt_pci(struct aml *aml, const struct acpi_config *config)
{
    if (!config->pci)
        return;
    size_t device = aml_device(aml, "PCI0");
    aml_name_eisa_id(aml, "_HID", "PNP0A03");
    aml_name_int(aml, "_UID", 0);
    size_t crs = aml_resources(aml);
    aml_resource_bus(aml, 0, 0);
    aml_resource_window32(aml, LAYOUT_PCI_MMIO, (uint32_t)(LAYOUT_PCI_END - LAYOUT_PCI_MMIO));
    aml_resources_end(aml, crs);
    aml_end(aml, device);
}

// 0 when it does not fit.
static uint32_t dsdt_build(struct area *area, const struct acpi_config *config)
{
    size_t room = AREA_SIZE - area->used;
    if (room < sizeof(struct header))
        return 0;
    struct header *h = (struct header *)(area->base + area->used);
    struct aml aml;
    aml_init(&aml, h + 1, room - sizeof(*h));
    dsdt_power(&aml);
    size_t scope = aml_scope(&aml, "_SB");
    dsdt_com1(&aml);
    dsdt_pvpanic(&aml);
    dsdt_power_button(&aml);
    if (config->vmgenid)
        dsdt_vmgenid(&aml);
    dsdt_event_device(&aml, config);
    dsdt_virtio(&aml, config);
    dsdt_pci(&aml, config);
    aml_end(&aml, scope);
    if (aml.overflow)
        return 0;
    size_t length = sizeof(*h) + aml.len;
    area->used = align_up(area->used + length, TABLE_ALIGN);
    header_set(h, "DSDT", 2, length); // 2: integers are 64-bit
    return area_gpa(area, h);
}

// --- fixed tables

static struct gas gas_port(uint16_t port)
{
    return (struct gas) {.space = 1, .bit_width = 8, .access = 1, .address = port};
}

static uint32_t fadt_build(struct area *area, uint32_t dsdt)
{
    struct fadt *f = area_take(area, sizeof(*f));
    if (!f)
        return 0;
    f->dsdt = dsdt;
    f->x_dsdt = dsdt;
    f->boot_arch = BOOT_NO_VGA;
    f->flags = FADT_WBINVD | FADT_PROC_C1 | FADT_POWER_BUTTON_IS_DEVICE |
               FADT_SLEEP_BUTTON_IS_DEVICE | FADT_RTC_WAKE_NOT_FIXED | FADT_RESET_REG |
               FADT_HW_REDUCED;
    f->reset_reg = gas_port(PORT_I8042_CMD);
    f->reset_value = ACPI_RESET_VALUE;
    f->sleep_control = gas_port(PORT_SLEEP);
    f->sleep_status = gas_port(PORT_SLEEP_STAT);
    memcpy(&f->hypervisor_id, "FERRY\0\0", 8);
    f->minor_version = 5;
    header_set(&f->header, "FACP", 6, sizeof(*f));
    return area_gpa(area, f);
}

struct PACKED madt { // 5.2.12
    struct header header;
    uint32_t lapic;
    uint32_t flags; // bit 0: two 8259s are there as well
};

struct PACKED madt_lapic {
    uint8_t type, length, uid, apic_id;
    uint32_t flags; // bit 0: enabled
};

struct PACKED madt_x2apic {
    uint8_t type, length;
    uint16_t reserved;
    uint32_t apic_id, flags, uid;
};

struct PACKED madt_ioapic {
    uint8_t type, length, id, reserved;
    uint32_t address, gsi_base;
};

struct PACKED madt_lapic_nmi {
    uint8_t type, length, uid; // 0xff: every processor
    uint16_t flags;
    uint8_t lint;
};

_Static_assert(sizeof(struct madt) == 44 && sizeof(struct madt_lapic) == 8 &&
                   sizeof(struct madt_x2apic) == 16 && sizeof(struct madt_ioapic) == 12 &&
                   sizeof(struct madt_lapic_nmi) == 6,
               "ACPI 6.5, 5.2.12");

enum { MADT_LAPIC = 0, MADT_IOAPIC = 1, MADT_LAPIC_NMI = 4, MADT_X2APIC = 9 };
enum { LAPIC_IDS = 255 }; // ids from here on need an x2APIC entry

static uint32_t madt_build(struct area *area, unsigned cpus)
{
    unsigned small = cpus < LAPIC_IDS ? cpus : LAPIC_IDS;
    size_t length = sizeof(struct madt) + small * sizeof(struct madt_lapic) +
                    (cpus - small) * sizeof(struct madt_x2apic) + sizeof(struct madt_ioapic) +
                    sizeof(struct madt_lapic_nmi);
    struct madt *m = area_take(area, length);
    if (!m)
        return 0;
    m->lapic = LAYOUT_LAPIC;
    m->flags = 1;
    struct madt_lapic *lapic = (struct madt_lapic *)(m + 1);
    for (unsigned i = 0; i < small; i++)
        *lapic++ = (struct madt_lapic) {MADT_LAPIC, sizeof(*lapic), (uint8_t)i, (uint8_t)i, 1};
    struct madt_x2apic *x2apic = (struct madt_x2apic *)lapic;
    for (unsigned i = small; i < cpus; i++)
        *x2apic++ = (struct madt_x2apic) {MADT_X2APIC, sizeof(*x2apic), 0, i, 1, i};
    struct madt_ioapic *ioapic = (struct madt_ioapic *)x2apic;
    *ioapic = (struct madt_ioapic) {MADT_IOAPIC, sizeof(*ioapic), 0, 0, LAYOUT_IOAPIC, 0};
    struct madt_lapic_nmi *nmi = (struct madt_lapic_nmi *)(ioapic + 1);
    *nmi = (struct madt_lapic_nmi) {MADT_LAPIC_NMI, sizeof(*nmi), 0xff, 0, 1};
    header_set(&m->header, "APIC", 5, length);
    return area_gpa(area, m);
}

struct PACKED mcfg { // PCI Firmware 3.3, 4.1.2
    struct header header;
    uint64_t reserved0;
    uint64_t base;
    uint16_t segment;
    uint8_t first_bus, last_bus;
    uint32_t reserved1;
};

_Static_assert(sizeof(struct mcfg) == 60, "PCI Firmware 3.3, 4.1.2");

static uint32_t mcfg_build(struct area *area)
{
    struct mcfg *m = area_take(area, sizeof(*m));
    if (!m)
        return 0;
    m->base = LAYOUT_ECAM;
    m->last_bus = (uint8_t)((LAYOUT_ECAM_END - LAYOUT_ECAM) / MiB - 1);
    header_set(&m->header, "MCFG", 1, sizeof(*m));
    return area_gpa(area, m);
}

// Tables at 0 are not there.
static uint32_t xsdt_build(struct area *area, const uint32_t *tables, unsigned nr)
{
    struct header *x = area_take(area, sizeof(*x) + nr * sizeof(uint64_t));
    if (!x)
        return 0;
    uint8_t *at = (uint8_t *)(x + 1);
    for (unsigned i = 0; i < nr; i++) {
        uint64_t gpa = tables[i];
        if (gpa)
            at = mempcpy(at, &gpa, sizeof(gpa));
    }
    header_set(x, "XSDT", 1, (size_t)(at - (uint8_t *)x));
    return area_gpa(area, x);
}

static void rsdp_set(struct rsdp *r, uint32_t xsdt)
{
    memcpy(r->signature, "RSD PTR ", 8);
    memcpy(r->oem_id, "FERRY ", 6);
    r->revision = 2;
    r->length = sizeof(*r);
    r->xsdt = xsdt;
    r->checksum = checksum(r, 20);
    r->extended_checksum = checksum(r, sizeof(*r));
}

static int config_check(const struct acpi_config *config, struct error *err)
{
    if (config->cpus == 0 || config->cpus > CPUS_MAX)
        return error_set(err, -EINVAL, "ACPI: %u CPUs; expected 1 to %d", config->cpus, CPUS_MAX);
    if (config->nr_virtio > VIRTIO_MAX)
        return error_set(err, -EINVAL, "ACPI: %u virtio devices; at most %d", config->nr_virtio,
                         VIRTIO_MAX);
    for (unsigned i = 0; i < config->nr_virtio; i++) {
        const struct acpi_virtio_mmio *v = &config->virtio[i];
        if (!v->len || !range_within(v->base, v->len, 4 * GiB))
            return error_set(err, -EINVAL, "ACPI: virtio device %u at 0x%llx+0x%x: not below 4 GiB",
                             i, (unsigned long long)v->base, v->len);
        if (v->gsi >= GSI_MAX)
            return error_set(err, -EINVAL, "ACPI: virtio device %u on line %u; the last is %d", i,
                             v->gsi, GSI_MAX - 1);
    }
    return 0;
}

int acpi_build(struct ram *ram, const struct acpi_config *config, uint64_t *rsdp, struct error *err)
{
    int ret = config_check(config, err);
    if (ret)
        return ret;
    struct area area = {.base = ram_at(ram, LAYOUT_ACPI, AREA_SIZE)};
    if (!area.base)
        return error_set(err, -EFAULT, "ACPI: no guest RAM at 0x%x", LAYOUT_ACPI);

    struct rsdp *root = area_take(&area, sizeof(*root));
    uint32_t dsdt = dsdt_build(&area, config);
    uint32_t fadt = fadt_build(&area, dsdt);
    uint32_t madt = madt_build(&area, config->cpus);
    uint32_t mcfg = config->pci ? mcfg_build(&area) : 0;
    const uint32_t tables[] = {fadt, madt, mcfg};
    uint32_t xsdt = xsdt_build(&area, tables, ARRAY_SIZE(tables));
    if (!dsdt || !fadt || !madt || !xsdt || (config->pci && !mcfg))
        return error_set(err, -ENOSPC, "ACPI: tables for %u CPUs and %u devices exceed %u bytes",
                         config->cpus, config->nr_virtio, AREA_SIZE);
    rsdp_set(root, xsdt);
    ram_mark_dirty(ram, LAYOUT_ACPI, area.used);
    *rsdp = LAYOUT_ACPI;
    return 0;
}
