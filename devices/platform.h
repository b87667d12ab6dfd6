// SPDX-License-Identifier: Apache-2.0
// The small fixed devices of the board, each in its own file.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/device.h"

// i8042.c: a keyboard controller without keyboard. Reset works (command 0xfe, or output port bit 0
// cleared), the self-test passes, and both ports test as broken, so probing ends at once.
extern const struct device_class i8042_class;

// rtc.c: an MC146818 that shows the host's UTC plus what the guest set, and CMOS memory with the
// sizes of RAM. Raises no interrupts.
struct rtc_config {
    int64_t (*now)(void *arg); // UTC, microseconds since 1970; NULL = the host's clock
    void *arg;
};
extern const struct device_class rtc_class;

// power.c: ACPI sleep control and the generic event device; see devices/acpi.h.
struct power_config {
    int (*irq_set)(struct vm *vm, unsigned gsi, unsigned level); // NULL = vm_irq_set; for tests
};
extern const struct device_class power_class;
void power_button(struct device *dev);   // any thread
bool power_listened(struct device *dev); // the guest's driver takes its interrupt; any thread
void power_event(struct device *dev, uint8_t events); // ACPI_EVENT_*; any thread

// vmgenid.c: 128 random bits that differ after each restore of a saved state, so that a guest does
// not use its random numbers and unique names twice (Microsoft, "Virtual Machine Generation ID").
enum { VMGENID_LEN = 16 };
extern const struct device_class vmgenid_class;
// A copy of the guest continues: a new id, and the guest is told. After its state was loaded,
// before it runs. A live migration is no copy.
int vmgenid_renew(struct device *dev, struct device *power, struct error *err);

// pvpanic.c: the guest kernel's panic notifier (QEMU's docs/specs/pvpanic).
extern const struct device_class pvpanic_class;

// debug_exit.c: any write ends the VM with the value written.
extern const struct device_class debug_exit_class;

// mark.c: the first write says when the guest ran its first instructions.
struct mark_config {
    uint64_t start_ns; // CLOCK_MONOTONIC when the process started
    int fd;            // where to print "ferry: first guest instruction after N ns"; -1 = nowhere
};
extern const struct device_class mark_class;
// CLOCK_MONOTONIC of the first write, 0 = none yet. Any thread.
uint64_t mark_time_ns(struct device *dev);
