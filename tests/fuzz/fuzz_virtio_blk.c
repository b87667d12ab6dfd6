// SPDX-License-Identifier: Apache-2.0
// Disk requests, on a disk of 64 KiB with two queues.
#include "devices/virtio_blk.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fuzz/fuzz_virtio.h"

enum { DISK = 64 * 1024 };

static void *config(void)
{
    struct virtio_blk_config *c = calloc(1, sizeof(*c));
    int fd = memfd_create("disk", 0);
    if (!c || fd < 0 || ftruncate(fd, DISK))
        abort();
    c->queues = 2;
    snprintf(c->path, sizeof(c->path), "/proc/self/fd/%d", fd);
    return c;
}

FUZZ_VIRTIO(&virtio_blk_class, config, NULL)
