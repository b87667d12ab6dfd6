// SPDX-License-Identifier: Apache-2.0
#include <stdatomic.h>
#include <stdio.h>

#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

struct mark {
    struct device dev;
    struct mark_config config;
    _Atomic uint64_t first_ns;
};

static void mark_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct mark *m = container_of((struct device *)dev, struct mark, dev);
    uint64_t now = time_ns(), none = 0;
    if (!atomic_compare_exchange_strong(&m->first_ns, &none, now) || m->config.fd < 0)
        return;
    dprintf(m->config.fd, "ferry: first guest instruction after %llu ns\n",
            (unsigned long long)(now - m->config.start_ns));
}

static const struct bus_ops mark_ops = {NULL, mark_write};

static int mark_realize(struct device *dev, const void *config, struct error *err)
{
    struct mark *m = container_of(dev, struct mark, dev);
    const struct mark_config *c = config;
    m->config = c ? *c : (struct mark_config) {.fd = -1};
    struct bus_range range = {PORT_MARK, 1, "mark", &mark_ops, dev, NULL};
    return bus_add(&dev->vm->pio, &range, err);
}

uint64_t mark_time_ns(struct device *dev)
{
    return atomic_load(&container_of(dev, struct mark, dev)->first_ns);
}

const struct device_class mark_class = {
    .name = "mark", .size = sizeof(struct mark), .realize = mark_realize};
