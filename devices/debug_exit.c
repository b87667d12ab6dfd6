// SPDX-License-Identifier: Apache-2.0
#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/vm.h"

static void debug_exit_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct device *d = dev;
    uint32_t status = size < 4 ? (uint32_t)(value & ((1u << 8 * size) - 1)) : (uint32_t)value;
    if (!offset)
        vm_request_stop(d->vm, VM_STOP_DEBUG_EXIT, status, "the guest ended with value %u (0x%x)",
                        status, status);
}

static const struct bus_ops debug_exit_ops = {NULL, debug_exit_write};

static int debug_exit_realize(struct device *dev, const void *config, struct error *err)
{
    struct bus_range range = {PORT_DEBUG_EXIT, 4, "debug-exit", &debug_exit_ops, dev, NULL};
    return bus_add(&dev->vm->pio, &range, err);
}

const struct device_class debug_exit_class = {
    .name = "debug-exit", .size = sizeof(struct device), .realize = debug_exit_realize};
