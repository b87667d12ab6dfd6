// SPDX-License-Identifier: Apache-2.0
// A file or block device that holds a disk: opening, size, alignment of O_DIRECT, lock. Nothing in
// it is interpreted here.
//
// Lock. OFD locks on the whole file: exclusive for who writes, shared for who reads. They keep out
// every other opener that takes locks, in this process, too.
//
// A guest that moves takes its image along without a moment in which a third VM could have it: its
// source lends the image (nobody may use it then, and the source keeps its claim), its destination
// borrows it. If the move fails, the destination unlocks it and the source takes it back.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"

enum { BLK_SECTOR = 512, BLK_PATH_MAX = 1024 };

struct blk_image {
    char path[BLK_PATH_MAX];
    bool read_only, block_device;
    bool blocks;       // I/O without waiting is not known to work on its file system
    int fd, direct_fd; // direct_fd -1: page cache only
    uint32_t memory_align, offset_align; // of direct_fd, bytes, powers of two
    uint64_t device, inode;
};

struct blk_image_mode {
    bool read_only;
    bool cached; // no direct_fd
    bool create; // an empty file, if there is none
    int fd;      // the image, opened already, stays the caller's; 0: it is opened by its name
};

// Opens, and does not lock. On error nothing is left open. blk_image_close may be called on an
// image that was zeroed and never opened.
int blk_image_open(struct blk_image *i, const char *path, const struct blk_image_mode *mode,
                   struct error *err);
void blk_image_close(struct blk_image *i);

int blk_image_lock(struct blk_image *i, struct error *err); // -EBUSY: somebody else's
// The same, for who continues a guest: also good is an image that another has lent.
int blk_image_lock_lent(struct blk_image *i, struct error *err);
void blk_image_lend(struct blk_image *i); // after the last write, with everything durable
void blk_image_unlock(struct blk_image *i);

int blk_image_bytes(struct blk_image *i, uint64_t *bytes, struct error *err); // what it has now
// As blk_image_bytes, and good for a disk: a multiple of BLK_SECTOR, not 0.
int blk_image_disk_size(struct blk_image *i, uint64_t *bytes, struct error *err);
int blk_image_truncate(struct blk_image *i, uint64_t bytes, struct error *err); // files only

// Smallest alignment from 512 to 4096 bytes with which O_DIRECT reads the file's beginning; 0: none
// of them. For kernels before 6.1, which do not tell.
uint32_t blk_direct_probe(int direct_fd);
