// SPDX-License-Identifier: Apache-2.0
// The block device (virtio 1.2, 5.2) over a raw file or a block device. Raw is raw: nothing in the
// image is interpreted.
//
// I/O. Each device has an io_uring of its own, used under its lock by whoever holds that: the loop
// starts requests and collects completions, and a vCPU that resets the device, or the thread that
// pauses the VM, can wait for what is in flight without the loop. Aligned requests go past the page
// cache (O_DIRECT) where the file system can do that, others through it.
//
// What a guest may rely on: a write that was answered is durable once a flush that came later was
// answered with success. When a flush has failed, the kernel may have dropped what was not written;
// every later flush fails, too, until the VM ends.
//
// Lock. A writable image is locked (OFD lock) against every other opener that takes locks; a
// read-only one may be shared with readers. When a VM is saved its lock is given up (the VM is
// paused), so that a destination can continue it; whoever does continue, there or here, takes the
// lock on resume. Loading saved state fails when the image is locked by somebody then. Resume
// cannot fail: a device that finds its image taken answers every request with an error, and says so
// in the log.
#pragma once

#include "devices/virtio.h"

enum {
    BLK_SECTOR = 512,
    BLK_SERIAL_MAX = 20, // bytes, no terminator in the guest's view
    BLK_QUEUES_MAX = VIRTIO_QUEUES_MAX,
    BLK_PATH_MAX = 1024,
};

struct virtio_blk_config {
    struct virtio_attach attach; // first
    char path[BLK_PATH_MAX];
    char serial[BLK_SERIAL_MAX + 1];
    unsigned queues; // 1 to BLK_QUEUES_MAX; 0 = 1
    bool read_only;
    bool cached; // always through the page cache
};

// "FILE[,ro][,serial=TEXT][,queues=N][,cached][,packed]"
int virtio_blk_parse(const char *text, struct virtio_blk_config *config, struct error *err);

extern const struct device_class virtio_blk_class; // its config: struct virtio_blk_config
