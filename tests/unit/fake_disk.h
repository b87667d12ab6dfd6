// SPDX-License-Identifier: Apache-2.0
// A disk in memory as vmm/disk.h has it, with or without an overlay: for tests and fuzzers.
#pragma once

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "devices/blk_absent.h"
#include "vmm/device.h"
#include "vmm/disk.h"
#include "vmm/vm.h"

enum { FAKE_UNITS_MAX = 1024 };

struct fake_disk {
    struct device dev; // first
    struct vm *vm;     // of which it is the only device
    uint64_t size;
    uint8_t *bytes;
    bool overlay, read_only;
    bool has[FAKE_UNITS_MAX]; // units that are not holes, or that the overlay has
    _Atomic uint64_t *written;
    int refuse;                 // what expect, read and write say
    uint8_t since[DISK_ID_LEN]; // what info says, and what it will keep
    uint64_t changed;           // the first 64 blocks
    unsigned synced, forgotten; // calls
    uint64_t read_bytes, write_bytes;
    struct blk_absent *absent;
    // Called in the middle of a read: the guest goes on meanwhile.
    void (*reading)(struct fake_disk *f, uint64_t offset);
};

static inline struct fake_disk *fake_of(struct device *dev)
{
    return (struct fake_disk *)dev;
}

static inline void fake_info(struct device *dev, struct disk_info *info)
{
    struct fake_disk *f = fake_of(dev);
    *info = (struct disk_info) {.path = "fake",
                                .size = f->size,
                                .read_only = f->read_only,
                                .overlay = f->overlay,
                                .base_size = f->overlay ? f->size : 0};
    memcpy(info->since, f->since, DISK_ID_LEN);
}

static inline int fake_base_sum(struct device *dev, uint32_t *sum, struct error *err)
{
    *sum = 0xba5e;
    return 0;
}

static inline int fake_watch(struct device *dev, _Atomic uint64_t *written, struct error *err)
{
    fake_of(dev)->written = written;
    return 0;
}

static inline int fake_data(struct device *dev, uint64_t offset, uint64_t *from, uint64_t *to,
                            struct error *err)
{
    struct fake_disk *f = fake_of(dev);
    uint64_t unit = offset / DISK_UNIT, units = (f->size + DISK_UNIT - 1) / DISK_UNIT;
    while (unit < units && !f->has[unit])
        unit++;
    *from = unit * DISK_UNIT > offset ? unit * DISK_UNIT : offset;
    while (unit < units && f->has[unit])
        unit++;
    *to = unit * DISK_UNIT < f->size ? unit * DISK_UNIT : f->size;
    *from = *from < *to ? *from : *to;
    return 0;
}

static inline int fake_read(struct device *dev, uint64_t offset, void *data, uint64_t len,
                            struct error *err)
{
    struct fake_disk *f = fake_of(dev);
    if (f->refuse)
        return error_set(err, f->refuse, "the fake disk refuses");
    if (offset > f->size || len > f->size - offset)
        abort();
    memcpy(data, f->bytes + offset, len);
    f->read_bytes += len;
    if (f->reading)
        f->reading(f, offset);
    return 0;
}

static inline int fake_expect(struct device *dev, const struct disk_info *disk, uint32_t base_sum,
                              bool *kept, struct error *err)
{
    struct fake_disk *f = fake_of(dev);
    if (f->refuse || disk->size != f->size || disk->overlay != f->overlay)
        return error_set(err, f->refuse ? f->refuse : -EINVAL, "the fake disk refuses");
    *kept = *f->since && !memcmp(f->since, disk->since, DISK_ID_LEN);
    return 0;
}

static inline void fake_changed(struct device *dev, uint64_t *blocks)
{
    *blocks |= fake_of(dev)->changed;
}

static inline void fake_named(struct device *dev, const uint8_t id[DISK_ID_LEN])
{
    memcpy(fake_of(dev)->since, id, DISK_ID_LEN);
}

static inline int fake_write(struct device *dev, uint64_t offset, const void *data, uint64_t len,
                             struct error *err)
{
    struct fake_disk *f = fake_of(dev);
    if (f->refuse)
        return error_set(err, f->refuse, "the fake disk refuses");
    if (offset > f->size || len > f->size - offset || !len) // whoever calls has checked that
        abort();
    for (uint64_t unit = offset / DISK_UNIT; unit <= (offset + len - 1) / DISK_UNIT; unit++)
        f->has[unit] = true;
    if (data)
        memcpy(f->bytes + offset, data, len);
    else
        memset(f->bytes + offset, 0, len);
    f->write_bytes += len;
    return 0;
}

static inline int fake_sync(struct device *dev, struct error *err)
{
    fake_of(dev)->synced++;
    return fake_of(dev)->refuse ? error_set(err, fake_of(dev)->refuse, "no sync") : 0;
}

static inline void fake_forget(struct device *dev)
{
    fake_of(dev)->forgotten++;
}

static inline void fake_ring(void *arg, unsigned queue)
{
}

static inline int fake_lack(struct device *dev, uint64_t *missing, int wake_fd, struct error *err)
{
    struct fake_disk *f = fake_of(dev);
    blk_absent_free(f->absent);
    f->absent = blk_absent_create(missing, f->size, wake_fd, fake_ring, f);
    return f->absent ? 0 : error_set(err, -ENOMEM, "no memory");
}

static inline unsigned fake_wanted(struct device *dev, uint64_t *blocks, unsigned max, bool again)
{
    if (again)
        blk_absent_again(fake_of(dev)->absent);
    return blk_absent_wanted(fake_of(dev)->absent, blocks, max);
}

static inline bool fake_fill_begin(struct device *dev, uint64_t block)
{
    return blk_absent_fill_begin(fake_of(dev)->absent, block);
}

static inline void fake_fill_end(struct device *dev, uint64_t block, bool written)
{
    blk_absent_fill_end(fake_of(dev)->absent, block, written);
}

static inline uint64_t fake_missing(struct device *dev, uint64_t *copy)
{
    return blk_absent_missing(fake_of(dev)->absent, copy);
}

static inline void fake_lack_end(struct device *dev)
{
    blk_absent_wake_fd(fake_of(dev)->absent, -1);
}

static const struct disk_ops fake_ops = {.info = fake_info,
                                         .base_sum = fake_base_sum,
                                         .watch = fake_watch,
                                         .data = fake_data,
                                         .read = fake_read,
                                         .expect = fake_expect,
                                         .write = fake_write,
                                         .sync = fake_sync,
                                         .changed = fake_changed,
                                         .left = fake_named,
                                         .arrived = fake_named,
                                         .forget = fake_forget,
                                         .lack = fake_lack,
                                         .wanted = fake_wanted,
                                         .fill_begin = fake_fill_begin,
                                         .fill_end = fake_fill_end,
                                         .missing = fake_missing,
                                         .lack_end = fake_lack_end};
static const struct device_class fake_class = {.name = "fake", .disk = &fake_ops};

static inline struct fake_disk *fake_new(uint64_t size, bool overlay)
{
    struct fake_disk *f = calloc(1, sizeof(*f));
    f->vm = calloc(1, sizeof(*f->vm));
    f->bytes = calloc(1, size);
    if (size > FAKE_UNITS_MAX * (uint64_t)DISK_UNIT)
        abort();
    f->size = size;
    f->overlay = overlay;
    f->dev = (struct device) {.class = &fake_class, .vm = f->vm};
    f->vm->devices = &f->dev;
    return f;
}

static inline void fake_free(struct fake_disk *f)
{
    blk_absent_free(f->absent);
    free(f->vm);
    free(f->bytes);
    free(f);
}

// The guest writes: the disk first, then the bits, as a device does.
static inline void fake_guest(struct fake_disk *f, uint64_t offset, int byte, uint64_t len)
{
    memset(f->bytes + offset, byte, len);
    for (uint64_t unit = offset / DISK_UNIT; unit <= (offset + len - 1) / DISK_UNIT; unit++)
        f->has[unit] = true;
    for (uint64_t block = offset / DISK_BLOCK;
         f->written && block <= (offset + len - 1) / DISK_BLOCK; block++)
        atomic_fetch_or(&f->written[block / 64], 1ull << block % 64);
}
