// SPDX-License-Identifier: Apache-2.0
// The board every VM has: its platform devices in one table, and the firmware tables that describe
// them.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "devices/acpi.h"
#include "vmm/error.h"

struct console;
struct device;
struct mark_config;
struct pci_host;
struct rtc_config;
struct ucall_config;
struct vm;

struct board_config {
    struct console *console; // of COM1; NULL: output is discarded. Close it after vm_destroy
    bool debug_exit;         // PORT_DEBUG_EXIT
    const struct ucall_config *ucall; // NULL: no ucall device
    const struct mark_config *mark;   // NULL: no mark
    const struct rtc_config *rtc;     // NULL: the host's clock
    // Windows that the firmware tables shall list; their devices are added by the caller.
    const struct acpi_virtio_mmio *virtio;
    unsigned nr_virtio;
    bool pci; // a PCI host bridge; its functions are added by the caller
    bool vmgenid;
};

struct board {
    struct device *serial, *power;
    struct device *mark, *ucall; // NULL when not asked for
    struct device *vmgenid;      // the same
    struct pci_host *pci;        // NULL when not asked for
    uint64_t rsdp;               // GPA of the ACPI RSDP, for boot_config
};

// After vm_create, before the kernel is loaded and before vm_start. Devices belong to the VM. The
// escape commands of the console act on the VM from here on: quit = VM_STOP_HOST, power button.
// A VM that will load saved state needs the same
// configuration as the one saved; its firmware tables are overwritten with the guest's memory.
int board_create(struct vm *vm, const struct board_config *config, struct board *board,
                 struct error *err);
// vm_reset, and firmware tables as board_create made them (with the same configuration); the
// generation id stays.
int board_reset(struct vm *vm, const struct board_config *config, struct board *board,
                struct error *err);
