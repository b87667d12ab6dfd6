// SPDX-License-Identifier: Apache-2.0
// The generation id lives in guest memory only, in a page that the memory map reserves: a migration
// carries it along, and there is no state to save.
#include <errno.h>
#include <sys/random.h>

#include "devices/acpi.h"
#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

static int id_write(struct device *dev, struct error *err)
{
    uint8_t id[VMGENID_LEN];
    if (getrandom(id, sizeof(id), 0) != sizeof(id))
        return error_errno(err, "getrandom");
    if (ram_write(&dev->vm->ram, LAYOUT_VMGENID, id, sizeof(id)))
        return error_set(err, -EFAULT, "generation id: no guest RAM at 0x%x", LAYOUT_VMGENID);
    return 0;
}

int vmgenid_renew(struct device *dev, struct device *power, struct error *err)
{
    int ret = id_write(dev, err);
    if (!ret)
        power_event(power, ACPI_EVENT_VMGENID); // after the id: the guest looks when it hears
    return ret;
}

static int vmgenid_realize(struct device *dev, const void *config, struct error *err)
{
    return id_write(dev, err);
}

const struct device_class vmgenid_class = {
    .name = "vmgenid", .size = sizeof(struct device), .realize = vmgenid_realize};
