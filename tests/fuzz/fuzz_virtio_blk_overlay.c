// SPDX-License-Identifier: Apache-2.0
// Disk requests on a copy-on-write overlay over a base of 64 KiB that ends within a cluster.
#include "devices/virtio_blk.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fuzz/fuzz_virtio.h"

enum { DISK = 64 * 1024 - 512 };

static void *config(void)
{
    struct virtio_blk_config *c = calloc(1, sizeof(*c));
    int base = memfd_create("base", 0), overlay = memfd_create("overlay", 0);
    if (!c || base < 0 || overlay < 0 || ftruncate(base, DISK))
        abort();
    c->queues = 2;
    snprintf(c->path, sizeof(c->path), "/proc/self/fd/%d", base);
    snprintf(c->overlay, sizeof(c->overlay), "/proc/self/fd/%d", overlay);
    return c;
}

FUZZ_VIRTIO(&virtio_blk_class, config, NULL)
