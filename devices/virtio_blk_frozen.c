// SPDX-License-Identifier: Apache-2.0
// A disk's overlay as it is at an instant, for a snapshot of a guest that goes on.
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "devices/blk_frozen.h"
#include "devices/virtio_blk_parts.h"
#include "vmm/vm.h"

bool blk_is_overlay(struct device *dev, const char *path)
{
    return !strcmp(blk_of_device(dev)->config.overlay, path);
}

// By its name: an error of the kernel's is then still told to the device's own flush, which must
// fail with it.
void blk_settle(struct device *dev)
{
    autoclose int fd = open(blk_of_device(dev)->config.overlay, O_RDONLY | O_CLOEXEC);
    if (fd >= 0)
        fdatasync(fd);
}

int blk_freeze(struct device *dev, int to, struct blk_frozen **f, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    int ret = b->engine.frozen ? error_set(err, -EBUSY, "%s is being copied", b->overlay.file.path)
              : b->engine.in_flight ? error_set(err, -EBUSY, "%s: %u requests without an answer",
                                                b->overlay.file.path, b->engine.in_flight)
                                    : blk_frozen_create(f, &b->overlay, to, err);
    if (!ret)
        b->engine.frozen = *f;
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

void blk_freeze_end(struct device *dev, struct blk_frozen *f)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    b->engine.frozen = NULL;
    pthread_mutex_unlock(&dev->lock);
    blk_frozen_free(f);
}
