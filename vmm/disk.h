// SPDX-License-Identifier: Apache-2.0
// A disk as whoever moves it to another host (migrate/blockmove.h) or copies it for a snapshot
// (migrate/disks.h) sees it: what it is, what the guest has written to it, its bytes. A block
// device's class names these calls (struct device_class). In any thread but the loop's; a device
// is asked by one at a time.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/util.h"

struct device;
struct vm;
struct blk_frozen; // devices/blk_frozen.h

enum {
    DISK_BLOCK = 64 * 1024, // bytes that a bit of `written` stands for
    DISK_UNIT = 4096,       // stretches begin at multiples of it, and end there or with the disk
    DISK_ID_LEN = 16,       // of a move: the migration's
};

#define DISK_SIZE_MAX (64ull << 40) // bytes

struct disk_info {
    const char *path; // of the file that is written, for messages
    uint64_t size;    // bytes of the disk
    bool read_only;
    bool overlay;       // only what it has is moved; its base is at both hosts:
    uint64_t base_size; // bytes of it
    // The move by which it came here, if what has changed since then is known; else zeroes. At the
    // host it left then, it may still be as it was.
    uint8_t since[DISK_ID_LEN];
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

    // Sets the bits of blocks that have changed since the move of that name.
    void (*changed)(struct device *dev, uint64_t *blocks);
    // The guest runs elsewhere, with this image as it is: a later move back can build on it.
    void (*left)(struct device *dev, const uint8_t id[DISK_ID_LEN]);

    // The destination's side, before the guest is loaded. Locks the image, and makes it an empty
    // one for this disk; or it is the disk as it left by the move disk->since, and stays (*kept).
    // -EEXIST: there is something else in it.
    int (*expect)(struct device *dev, const struct disk_info *disk, uint32_t base_sum, bool *kept,
                  struct error *err);
    // NULL: zeroes. The stretch was checked.
    int (*write)(struct device *dev, uint64_t offset, const void *data, uint64_t len,
                 struct error *err);
    int (*sync)(struct device *dev, struct error *err); // what was written is durable
    // It is here, by this move, or `lack` knows what is not; the guest is about to run.
    void (*arrived)(struct device *dev, const uint8_t id[DISK_ID_LEN]);
    // It came to nothing: an image that was made is removed, one that was filled is emptied, one
    // that was kept can be kept again.
    void (*forget)(struct device *dev);

    // The guest runs here while blocks are still at the source (migrate/blockpost.h); overlays
    // cannot. Before the guest is loaded: `missing` has their bits (malloc'd, the device's from now
    // on). A request that needs one waits, and `wake_fd`, an eventfd, is written to. None of these
    // calls waits for the guest.
    int (*lack)(struct device *dev, uint64_t *missing, int wake_fd, struct error *err);
    // Blocks that are waited for and have not been named before (`again`: since now), at most
    // `max`.
    unsigned (*wanted)(struct device *dev, uint64_t *blocks, unsigned max, bool again);
    // Whether the block is missing and nobody fills it: then the caller does so, with `write`, and
    // calls fill_end. Else it is here, newer than anything that comes, or soon.
    bool (*fill_begin)(struct device *dev, uint64_t block);
    void (*fill_end)(struct device *dev, uint64_t block, bool written);
    // How many are missing; `copy`, if not NULL, gets their bits.
    uint64_t (*missing)(struct device *dev, uint64_t *copy);
    void (*lack_end)(struct device *dev); // nobody looks at wake_fd any more; harmless without lack

    // For a snapshot of a guest that goes on. Is `path` the overlay that it writes?
    bool (*is_overlay)(struct device *dev, const char *path);
    // Writes out what the host has of its overlay in memory, so that less is left for a pause.
    void (*settle)(struct device *dev);
    // With the VM paused and its state saved: from here on `to` becomes a copy of the overlay as it
    // is now, with each frozen_step (1: there may be more; from any thread). One at a time: -EBUSY.
    // freeze_end before the VM goes.
    int (*freeze)(struct device *dev, int to, struct blk_frozen **f, struct error *err);
    int (*frozen_step)(struct blk_frozen *f, struct error *err);
    void (*freeze_end)(struct device *dev, struct blk_frozen *f);
};

struct device *disk_of_overlay(struct vm *vm, const char *overlay); // NULL: none has it
