// SPDX-License-Identifier: Apache-2.0
// ACPI tables in guest RAM: RSDP, XSDT, FADT (hardware-reduced), MADT, MCFG, DSDT. ACPI 6.5.
//
// What the tables promise about devices, so that these must keep it:
//  - Sleep control: a write of (5 << 2 | 1 << 5) = 0x34 to PORT_SLEEP powers the machine off. Bit 7
//    (WAK_STS) of PORT_SLEEP_STAT is cleared by writing it back; it reads 0 (we never wake).
//  - Reset: 0xfe written to PORT_I8042_CMD. No other part of an i8042 is claimed to be there.
//  - Generic event device: a byte read from PORT_EVENT gives the pending events and clears them
//    (ACPI_EVENT_*). Whoever sets one pulses GSI_EVENT *after* setting it: edge, active high, no
//    acknowledgement. An event set while the guest reads raises a new edge, so none is lost.
//  - Generation id: the 16 bytes at LAYOUT_VMGENID; ACPI_EVENT_VMGENID after each change.
//  - pvpanic: a byte read from PORT_PVPANIC gives the events understood (Linux masks with it).
//  - virtio-mmio lines and COM1 are edge, active high too: an irqfd pulses its line, and a pulse
//    on a level-triggered pin would be lost while the guest still serves the one before.
//  - Interrupts: ISA line n is I/O APIC pin n, the timer's (0) too, as in KVM's default routing;
//    so no source override is needed. devices/mptable.c says the same.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/ram.h"

enum {
    ACPI_EVENT_POWER_BUTTON = 0x01,
    ACPI_EVENT_VMGENID = 0x02, // the generation id is another
    ACPI_EVENTS = ACPI_EVENT_POWER_BUTTON | ACPI_EVENT_VMGENID,
    ACPI_SLEEP_POWEROFF = 5 << 2 | 1 << 5, // SLP_TYP 5, SLP_EN
    ACPI_SLEEP_WAKE_STATUS = 1 << 7,
    ACPI_RESET_VALUE = 0xfe,
};

struct acpi_virtio_mmio {
    uint64_t base; // below 4 GiB
    uint32_t len;  // bytes
    uint32_t gsi;
};

struct acpi_config {
    unsigned cpus; // APIC ids 0 .. cpus-1
    const struct acpi_virtio_mmio *virtio;
    unsigned nr_virtio;
    bool pci;     // a host bridge (devices/pci.h): MCFG and a device of the DSDT
    bool vmgenid; // a generation id at LAYOUT_VMGENID
};

// Writes the tables to [LAYOUT_ACPI, LAYOUT_ACPI_END) and gives the RSDP's address. -EINVAL for a
// configuration that cannot be described, -ENOSPC when the tables do not fit, -EFAULT without RAM
// there.
int acpi_build(struct ram *ram, const struct acpi_config *config, uint64_t *rsdp,
               struct error *err);
