// SPDX-License-Identifier: Apache-2.0
// A disk as whoever moves it to another host sees it (migrate/blockmove.h): what it is, what the
// guest has written to it, its bytes. A block device's class names these calls (struct
// device_class). In any thread but the loop's; a device is asked by one at a time.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/util.h"

struct device;

enum {
    DISK_BLOCK = 64 * 1024, // bytes that a bit of `written` stands for
    DISK_UNIT = 4096,       // stretches begin at multiples of it, and end there or with the disk
};

#define DISK_SIZE_MAX (64ull << 40) // bytes

struct disk_info {
    const char *path; // of the file that is written, for messages
    uint64_t size;    // bytes of the disk
    bool read_only;
    bool overlay;       // only what it has is moved; its base is at both hosts:
    uint64_t base_size; // bytes of it
};

struct disk_ops {
    void (*info)(struct device *dev, struct disk_info *info);
    // A sum of what the base holds, the same for the same bytes whatever its holes: of all of it,
    // or of 1 GiB spread over it if there is more.
    int (*base_sum)(struct device *dev, uint32_t *sum, struct error *err);

    // The source's side. From now on the bit of each block that the guest changes is set, before
    // the guest hears that it has. NULL: no more. The disk's size is fixed meanwhile.
    int (*watch)(struct device *dev, _Atomic uint64_t *written, struct error *err);
    // The next stretch from `offset` on that is not a hole, or that the overlay has: [*from, *to),
    // perhaps empty; *to is beyond `offset`. What lies between `offset` and *from is not of any
    // interest.
    int (*data)(struct device *dev, uint64_t offset, uint64_t *from, uint64_t *to,
                struct error *err);
    // Of an overlay only a stretch that it has.
    int (*read)(struct device *dev, uint64_t offset, void *data, uint64_t len, struct error *err);

    // The destination's side, before the guest is loaded. Locks the image, and makes it an empty
    // one for this disk. -EEXIST: there is something in it already.
    int (*expect)(struct device *dev, const struct disk_info *disk, uint32_t base_sum,
                  struct error *err);
    // NULL: zeroes. The stretch was checked.
    int (*write)(struct device *dev, uint64_t offset, const void *data, uint64_t len,
                 struct error *err);
    int (*sync)(struct device *dev, struct error *err); // what was written is durable
    // It came to nothing: an image that was made is removed, one that was filled is emptied.
    void (*forget)(struct device *dev);
};
