// SPDX-License-Identifier: Apache-2.0
// The MP table (Intel MultiProcessor Specification 1.4) for kernels without ACPI: processors, one
// ISA bus, the I/O APIC, and which line enters it where.
//
// Line n is I/O APIC pin n for all of them, the timer's (0) too: KVM's default GSI routing is the
// identity (unlike a PC's board, which wires the timer to pin 2). Line 2, the cascade of the two
// 8259s, is none. Lines 16-23 do not exist on a real ISA bus; they are listed so that such kernels
// can use the virtio windows' lines, edge and active high. devices/acpi.h says the same.
#pragma once

#include "vmm/error.h"
#include "vmm/ram.h"

enum { MPTABLE_CPUS_MAX = 254 }; // APIC ids are one byte, the I/O APIC takes one, 255 is "all"

// Writes to [LAYOUT_MPTABLE, LAYOUT_MPTABLE_END); APIC ids 0 .. cpus-1, 0 boots. -EINVAL for a
// number of CPUs it cannot describe, -EFAULT without RAM there.
int mptable_build(struct ram *ram, unsigned cpus, struct error *err);
