// SPDX-License-Identifier: Apache-2.0
#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { EVENT_PANICKED = 1 << 0, EVENT_CRASH_LOADED = 1 << 1 };

struct pvpanic {
    struct device dev;
    struct log_limit limit;
};

static uint64_t pvpanic_read(void *dev, uint64_t offset, unsigned size)
{
    return EVENT_PANICKED | EVENT_CRASH_LOADED;
}

static void pvpanic_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct pvpanic *p = container_of((struct device *)dev, struct pvpanic, dev);
    if (value & EVENT_PANICKED)
        vm_request_stop(p->dev.vm, VM_STOP_PANIC, 0, "the guest kernel panicked");
    else if (value & EVENT_CRASH_LOADED)
        log_limited(&p->dev.vm->log, &p->limit, LOG_WARN,
                    "the guest kernel panicked and goes on in its crash kernel");
}

static const struct bus_ops pvpanic_ops = {pvpanic_read, pvpanic_write};

static int pvpanic_realize(struct device *dev, const void *config, struct error *err)
{
    struct bus_range range = {PORT_PVPANIC, 1, "pvpanic", &pvpanic_ops, dev, &dev->lock};
    return bus_add(&dev->vm->pio, &range, err);
}

const struct device_class pvpanic_class = {
    .name = "pvpanic", .size = sizeof(struct pvpanic), .realize = pvpanic_realize};
