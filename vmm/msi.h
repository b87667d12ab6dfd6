// SPDX-License-Identifier: Apache-2.0
// Interrupt messages by irqfd: each has a line number (GSI) beyond the I/O APIC's, and KVM's
// routing table says which message that line sends. KVM takes the table as a whole only, so the VM
// keeps one, with the irqchip's own lines in front as KVM sets them up by itself.
//
// Any thread; a change makes KVM wait for its readers (0.1 ms and more), so equal ones are dropped.
#pragma once

#include <stdint.h>

#include "vmm/error.h"

struct vm;
struct msi_routes;

enum { MSI_ROUTES_MAX = 1024 }; // messages of a VM

// `nr` lines for messages, from *gsi on; they are the caller's as long as the VM lives. Before
// vm_start only. -ENOSPC beyond MSI_ROUTES_MAX.
int vm_msi_alloc(struct vm *vm, unsigned nr, unsigned *gsi, struct error *err);
// What the line sends from now on. -EINVAL: not a message to local APICs; the line is as before.
int vm_msi_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data, struct error *err);
void msi_routes_free(struct msi_routes *routes); // NULL is fine
