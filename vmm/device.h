// SPDX-License-Identifier: Apache-2.0
// What a device is: an ops table and its saved fields. Adding one touches one file and one row of
// the board's table (devices/board.c).
#pragma once

#include <jansson.h>
#include <pthread.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/state.h"

struct vm;
struct device;
struct disk_ops;

struct device_class {
    const char *name; // also its section name in saved state
    size_t size;      // of the struct that starts with `struct device`
    // Claims ports, windows, lines; `config` is the class's own struct (NULL = defaults).
    int (*realize)(struct device *dev, const void *config, struct error *err);
    void (*reset)(struct device *dev); // to power-on values; may be NULL
    // With the vCPUs parked: stops touching guest memory and the outside, so that saved fields are
    // whole; resume undoes it. May be NULL.
    int (*quiesce)(struct device *dev, struct error *err);
    void (*resume)(struct device *dev);
    void (*unrealize)(struct device *dev); // frees what realize took; vCPUs and loop have ended
    const struct state_table *state;       // NULL: nothing to save
    const struct disk_ops *disk;           // vmm/disk.h; NULL: it is no disk
    // For the person outside, in the loop's thread without the lock; may be NULL. `show` adds what
    // `ferry info` tells. `set` changes one thing; -ENOENT: no such key.
    void (*show)(struct device *dev, json_t *out);
    int (*set)(struct device *dev, const char *key, const char *value, struct error *err);
};

struct device {
    const struct device_class *class;
    struct vm *vm;
    uint32_t instance;
    pthread_mutex_t lock; // the bus takes it around each access
    struct device *next;
};

// Allocates, realizes and adds a device to the VM; `*out` may be NULL. Before vm_start only.
int device_add(struct vm *vm, const struct device_class *class, const void *config,
               struct device **out, struct error *err);
