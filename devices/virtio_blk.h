// SPDX-License-Identifier: Apache-2.0
// The block device (virtio 1.2, 5.2) over a raw file or a block device, with or without a
// copy-on-write overlay. Raw is raw: nothing in the image is interpreted, and only the option says
// that a file is an overlay.
//
// I/O. Each device has an io_uring of its own (devices/blk_engine.h), used under its lock by
// whoever holds that: the loop starts requests and collects completions, and a vCPU that resets the
// device, or the thread that pauses the VM, can wait for what is in flight without the loop. They
// wait BLK_PATIENCE_MS at most. Storage that answers later than that does not keep the VM from
// being paused or stopped: a pause then leaves requests in flight, and only saving is refused.
//
// What a guest may rely on: a write that was answered is durable once a flush that came later was
// answered with success. When a flush has failed, the kernel may have dropped what was not written;
// every later flush fails, too, until the VM ends. State is saved only with everything durable.
//
// Lock. A writable image is locked (OFD lock) against every other opener that takes locks; a
// read-only one, and the base of an overlay, may be shared with readers. When a VM is saved (it is
// paused) it lends its image, so that a destination can continue it (blk_image.h): loading saved
// state takes the lock, and fails when somebody else has it. Whoever resumes takes it as well.
// Resume cannot fail: a device that finds its image taken for BLK_TAKE_BACK_MS answers every
// request with an error, and says so in the log.
//
// Rate limits. Requests that find no tokens stay in the ring (the first of them, already taken, in
// the device), in the order in which they came, whatever their queue.
//
// `ferry set VM disk0.KEY=VALUE`:
//   size=SIZE    the disk grows to SIZE, and the file with it where it has not; size=host takes the
//                size that the file or block device has now
//   shrink=SIZE  cuts the file off; not with an overlay
//   bps, iops, burst-bytes, burst-ops: see devices/rate_limit.h
#pragma once

#include "devices/blk_image.h"
#include "devices/rate_limit.h"
#include "devices/virtio.h"

enum {
    BLK_SERIAL_MAX = 20, // bytes, no terminator in the guest's view
    BLK_QUEUES_MAX = 16,
    BLK_PATIENCE_MS = 5000,
    BLK_TAKE_BACK_MS = 1000,
};

struct virtio_blk_config {
    struct virtio_attach attach; // first
    char path[BLK_PATH_MAX];
    char overlay[BLK_PATH_MAX]; // empty: none; then `path` is the base
    char serial[BLK_SERIAL_MAX + 1];
    struct rate_limit_config limit;
    unsigned queues; // 1 to BLK_QUEUES_MAX; 0 = 1
    bool read_only;
    bool cached; // always through the page cache
    int fd;      // of `path`, which cannot be opened any more; 0: it can
    // Of one that arrives: its image may come with the guest (vmm/disk.h), so an empty file will
    // do, or none; with `overwrite` any.
    bool comes, overwrite;
};

// "FILE[,ro][,overlay=FILE][,serial=TEXT][,queues=N][,cached][,packed][,bps=SIZE][,iops=N]
// [,burst-bytes=SIZE][,burst-ops=N]"
int virtio_blk_parse(const char *text, struct virtio_blk_config *config, struct error *err);

extern const struct device_class virtio_blk_class; // its config: struct virtio_blk_config
