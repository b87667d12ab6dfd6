// SPDX-License-Identifier: Apache-2.0
// Dispatch of port and memory-mapped accesses to devices.
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

struct bus_ops {
    // `offset` counts from the range's base; `size` is 1, 2, 4 or 8 and offset + size stays
    // within the range. A read of nothing in particular returns all ones.
    uint64_t (*read)(void *dev, uint64_t offset, unsigned size);
    void (*write)(void *dev, uint64_t offset, unsigned size, uint64_t value);
};

struct bus_range {
    uint64_t base, len;
    const char *name;
    const struct bus_ops *ops;
    void *dev;
    pthread_mutex_t *lock; // taken around each call; NULL where the device needs none
};

// Filled before the vCPUs start, then only read: no lock of its own.
struct bus {
    const char *name;         // "port", "mmio"
    struct bus_range *ranges; // sorted by base
    unsigned nr, cap;
};

// -EEXIST on overlap, -EINVAL on an empty or wrapping range.
int bus_add(struct bus *bus, const struct bus_range *range, struct error *err);
void bus_free(struct bus *bus);

// False when no device answers: reads then give all ones.
bool bus_read(const struct bus *bus, uint64_t addr, unsigned size, uint64_t *value);
bool bus_write(const struct bus *bus, uint64_t addr, unsigned size, uint64_t value);

const struct bus_range *bus_find(const struct bus *bus, uint64_t addr);
