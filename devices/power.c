// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <sys/ioctl.h>

#include "devices/acpi.h"
#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { SLEEP_ENABLE = 1 << 5, SLEEP_TYPE = 7 << 2 }; // ACPI 6.5, 4.8.3.7

struct power {
    struct device dev;
    int (*irq_set)(struct vm *vm, unsigned gsi, unsigned level);
    struct log_limit limit;
    uint8_t events; // ACPI_EVENT_*, pending
};

static struct power *power_of(void *dev)
{
    return container_of((struct device *)dev, struct power, dev);
}

static void event_pulse(struct power *p)
{
    p->irq_set(p->dev.vm, GSI_EVENT, 1);
    p->irq_set(p->dev.vm, GSI_EVENT, 0);
}

void power_event(struct device *dev, uint8_t events)
{
    struct power *p = power_of(dev);
    pthread_mutex_lock(&dev->lock);
    p->events |= events;
    event_pulse(p);
    pthread_mutex_unlock(&dev->lock);
}

void power_button(struct device *dev)
{
    power_event(dev, ACPI_EVENT_POWER_BUTTON);
}

// A driver unmasks the event's line in the I/O APIC when it begins, and masks it when it ends.
bool power_listened(struct device *dev)
{
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC};
    return !ioctl(dev->vm->fd, KVM_GET_IRQCHIP, &chip) &&
           !chip.chip.ioapic.redirtbl[GSI_EVENT].fields.mask;
}

static uint64_t sleep_read(void *dev, uint64_t offset, unsigned size)
{
    return 0; // control reads as idle; status: we never wake
}

static void sleep_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct power *p = power_of(dev);
    if (offset || !(value & SLEEP_ENABLE))
        return;
    if ((value & (SLEEP_TYPE | SLEEP_ENABLE)) == ACPI_SLEEP_POWEROFF)
        vm_request_stop(p->dev.vm, VM_STOP_POWEROFF, 0, "the guest powered off");
    else
        log_limited(&p->dev.vm->log, &p->limit, LOG_WARN,
                    "the guest asked for ACPI sleep type %u, which is not offered",
                    (unsigned)(value & SLEEP_TYPE) >> 2);
}

static uint64_t event_read(void *dev, uint64_t offset, unsigned size)
{
    struct power *p = power_of(dev);
    uint8_t events = p->events;
    p->events = 0;
    return events;
}

static const struct bus_ops sleep_ops = {sleep_read, sleep_write};
static const struct bus_ops event_ops = {event_read, NULL};

static void power_reset(struct device *dev)
{
    power_of(dev)->events = 0;
}

static int power_realize(struct device *dev, const void *config, struct error *err)
{
    const struct power_config *c = config;
    power_of(dev)->irq_set = c && c->irq_set ? c->irq_set : vm_irq_set;
    _Static_assert(PORT_SLEEP_STAT == PORT_SLEEP + 1, "one range");
    struct bus_range sleep = {PORT_SLEEP, 2, "power", &sleep_ops, dev, &dev->lock};
    struct bus_range event = {PORT_EVENT, 1, "power", &event_ops, dev, &dev->lock};
    int ret = bus_add(&dev->vm->pio, &sleep, err);
    return ret ? ret : bus_add(&dev->vm->pio, &event, err);
}

static int power_load(void *object, uint16_t version, struct error *err)
{
    struct power *p = object;
    uint8_t events = p->events;
    if (events & ~ACPI_EVENTS) {
        p->events = 0;
        return error_set(err, -EINVAL, "power: saved events 0x%02x, known are 0x%02x", events,
                         ACPI_EVENTS);
    }
    if (events)
        event_pulse(p); // the first one may not have been seen; a needless one is harmless
    return 0;
}

static const struct state_field power_fields[] = {
    STATE_FIELD_INT(struct power, events, 1),
};

static const struct state_table power_state = {.name = "power",
                                               .version = 1,
                                               .oldest = 1,
                                               .nr_fields = ARRAY_SIZE(power_fields),
                                               .fields = power_fields,
                                               .load = power_load};

const struct device_class power_class = {.name = "power",
                                         .size = sizeof(struct power),
                                         .realize = power_realize,
                                         .reset = power_reset,
                                         .state = &power_state};
