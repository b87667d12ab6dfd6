// SPDX-License-Identifier: Apache-2.0
// The virtio-mmio transport (virtio 1.2, 4.2; version 2 only): a window of registers and one edge
// line for each device. Guests find the windows in the ACPI tables (board_config.virtio), or, when
// they do not use ACPI, by virtio_mmio_cmdline on their command line.
#pragma once

#include <stdint.h>

#include "devices/acpi.h"
#include "devices/virtio.h"
#include "vmm/layout.h"

enum {
    VIRTIO_MMIO_LEN = 0x1000, // bytes of a window
    VIRTIO_MMIO_MAX = 32,     // windows
    VIRTIO_MMIO_TEXT = 48,    // bytes of command line for each
};

struct virtio_mmio_wiring { // how doorbells and interrupts reach KVM
    int (*irqfd)(struct vm *vm, unsigned gsi, int event_fd, int resample_fd, struct error *err);
    int (*doorbell)(struct vm *vm, uint64_t addr, uint32_t value, int event_fd, struct error *err);
    // Take them back; NULL: nothing to do.
    int (*irqfd_off)(struct vm *vm, unsigned gsi, int event_fd, struct error *err);
    int (*doorbell_off)(struct vm *vm, uint64_t addr, uint32_t value, int event_fd,
                        struct error *err);
    // A write of `value` at `addr` acknowledges an interrupt and need not exit. NULL: it exits.
    int (*ack)(struct vm *vm, uint64_t addr, uint32_t value, int event_fd, struct error *err);
};

struct virtio_mmio_place {
    uint64_t base;
    unsigned gsi;
    const struct virtio_mmio_wiring *wiring; // NULL = KVM; for tests
};

extern const struct virtio_transport virtio_mmio_transport; // its place: struct virtio_mmio_place

// Window and line of the i-th device, i < VIRTIO_MMIO_MAX. Devices may share a line: it is an edge,
// and a driver asks its own interrupt status.
struct acpi_virtio_mmio virtio_mmio_window(unsigned i);

// " virtio_mmio.device=4K@0x...:line" for each window, into `text` of `size` bytes
// (nr * VIRTIO_MMIO_TEXT + 1 is enough). -ENOSPC when it does not fit.
int virtio_mmio_cmdline(const struct acpi_virtio_mmio *windows, unsigned nr, char *text,
                        size_t size, struct error *err);
