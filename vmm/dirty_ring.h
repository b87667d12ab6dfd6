// SPDX-License-Identifier: Apache-2.0
// KVM's dirty rings (KVM_CAP_DIRTY_LOG_RING): each vCPU notes the pages it writes in a ring that
// this process maps: KVM's part of a sync costs as much as was written, whatever there is of
// memory. A vCPU whose ring is full leaves the guest until its notes have been read.
//
// A page is noted once and not again until KVM has been told that its note was read (reset): so
// harvest, then reset, then look at the page.
//
// One thread does both for everybody. Linux 6.16 and newer leave a reset early when the caller has
// a signal, or io_uring work, and up to 64 pages are then neither noted nor watched any more: that
// thread has all signals blocked and does nothing else.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/seccomp.h"

struct ram;
struct dirty_rings;

enum { DIRTY_RING_ENTRIES = 4096 }; // of each vCPU, 16 bytes each, pinned in the kernel

// Before the VM has vCPUs; `entries` a power of two. From now on the VM has no dirty bitmap.
// -ENOTSUP when KVM has no rings or not of this size.
int dirty_rings_create(struct dirty_rings **rings, int vm_fd, uint32_t entries,
                       enum seccomp_mode seccomp, struct error *err);
void dirty_rings_free(struct dirty_rings *rings); // harmless with NULL

// A vCPU's, after its creation. At most VM_MAX_VCPUS.
int dirty_rings_add(struct dirty_rings *rings, int vcpu_fd, struct error *err);

// Once, before the first harvest: starts the thread. `ram` and `bitmap` (ram_bitmap_words words)
// must outlive the rings.
int dirty_rings_start(struct dirty_rings *rings, const struct ram *ram, _Atomic uint64_t *bitmap,
                      struct error *err);
// Sets the bits (page indexes of `ram`) of everything noted so far, and resets. Bits that are set
// stay so on error. Any thread; the guest may run.
int dirty_rings_harvest(struct dirty_rings *rings, struct error *err);
