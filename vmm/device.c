// SPDX-License-Identifier: Apache-2.0
#include "vmm/device.h"

#include <errno.h>
#include <stdlib.h>

#include "vmm/disk.h"
#include "vmm/vm.h"

static uint32_t next_instance(const struct vm *vm, const struct device_class *class)
{
    uint32_t n = 0;
    for (const struct device *d = vm->devices; d; d = d->next)
        n += d->class == class;
    return n;
}

int device_add(struct vm *vm, const struct device_class *class, const void *config,
               struct device **out, struct error *err)
{
    struct device *dev = calloc(1, class->size);
    if (!dev)
        return error_set(err, -ENOMEM, "no memory for device %s", class->name);
    dev->class = class;
    dev->vm = vm;
    dev->instance = next_instance(vm, class);
    pthread_mutex_init(&dev->lock, NULL);
    int ret = class->realize(dev, config, err);
    if (!ret && class->state)
        ret = state_register(&vm->state, class->state, dev->instance, dev, err);
    if (ret) {
        // What realize took before it failed is its own to undo; bus ranges vanish with the VM.
        pthread_mutex_destroy(&dev->lock);
        free(dev);
        return error_prefix(err, "device %s", class->name);
    }
    struct device **tail = &vm->devices;
    while (*tail)
        tail = &(*tail)->next;
    *tail = dev;
    if (out)
        *out = dev;
    return 0;
}

struct device *disk_of_overlay(struct vm *vm, const char *overlay)
{
    for (struct device *d = vm->devices; d; d = d->next)
        if (d->class->disk && d->class->disk->is_overlay(d, overlay))
            return d;
    return NULL;
}
