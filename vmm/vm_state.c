// SPDX-License-Identifier: Apache-2.0
// The saved state that KVM keeps for the VM as a whole: interrupt controllers, PIT, clock.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm/vm.h"
#include "vmm/vm_internal.h"

struct vm_kernel_state {
    struct vm *vm;
    struct kvm_irqchip pic[2], ioapic;
    struct kvm_pit_state2 pit;
    uint64_t clock_ns; // kvmclock
};

static int irqchip_each(struct vm_kernel_state *k, unsigned long request, struct error *err)
{
    k->pic[0].chip_id = KVM_IRQCHIP_PIC_MASTER;
    k->pic[1].chip_id = KVM_IRQCHIP_PIC_SLAVE;
    k->ioapic.chip_id = KVM_IRQCHIP_IOAPIC;
    struct kvm_irqchip *chips[] = {&k->pic[0], &k->pic[1], &k->ioapic};
    for (size_t i = 0; i < ARRAY_SIZE(chips); i++)
        if (ioctl(k->vm->fd, request, chips[i]))
            return error_errno(err, "%s of chip %u",
                               request == KVM_GET_IRQCHIP ? "KVM_GET_IRQCHIP" : "KVM_SET_IRQCHIP",
                               chips[i]->chip_id);
    return 0;
}

static int irqchip_save(void *object, struct error *err)
{
    return irqchip_each(object, KVM_GET_IRQCHIP, err);
}

static int irqchip_load(void *object, uint16_t version, struct error *err)
{
    return irqchip_each(object, KVM_SET_IRQCHIP, err);
}

static int pit_save(void *object, struct error *err)
{
    struct vm_kernel_state *k = object;
    return ioctl(k->vm->fd, KVM_GET_PIT2, &k->pit) ? error_errno(err, "KVM_GET_PIT2") : 0;
}

static int pit_load(void *object, uint16_t version, struct error *err)
{
    struct vm_kernel_state *k = object;
    return ioctl(k->vm->fd, KVM_SET_PIT2, &k->pit) ? error_errno(err, "KVM_SET_PIT2") : 0;
}

int vm_clock_get(const struct vm *vm, uint64_t *ns)
{
    struct kvm_clock_data data = {0};
    if (ioctl(vm->fd, KVM_GET_CLOCK, &data))
        return -errno;
    *ns = data.clock;
    return 0;
}

int vm_clock_set(const struct vm *vm, uint64_t ns)
{
    // Flags 0: the clock goes on from `ns` now; the time in between is not the guest's.
    struct kvm_clock_data data = {.clock = ns};
    return ioctl(vm->fd, KVM_SET_CLOCK, &data) ? -errno : 0;
}

static int clock_save(void *object, struct error *err)
{
    struct vm_kernel_state *k = object;
    k->clock_ns = k->vm->paused_clock_ns;
    return 0;
}

// Resuming sets the clock to what it was when the guest was paused, here or on another host.
static int clock_load(void *object, uint16_t version, struct error *err)
{
    struct vm_kernel_state *k = object;
    k->vm->paused_clock_ns = k->clock_ns;
    return 0;
}

static const struct state_field irqchip_fields[] = {
    STATE_FIELD_BYTES(struct vm_kernel_state, pic, 1),
    STATE_FIELD_BYTES(struct vm_kernel_state, ioapic, 1),
};
static const struct state_field pit_fields[] = {
    STATE_FIELD_BYTES(struct vm_kernel_state, pit, 1),
};
static const struct state_field clock_fields[] = {
    STATE_FIELD_INT(struct vm_kernel_state, clock_ns, 1),
};

// The irqchip first: loading a vCPU's local APIC may raise what the I/O APIC holds.
static const struct state_table tables[] = {
    {"irqchip", 1, 1, ARRAY_SIZE(irqchip_fields), irqchip_fields, irqchip_save, irqchip_load},
    {"pit", 1, 1, ARRAY_SIZE(pit_fields), pit_fields, pit_save, pit_load},
    {"clock", 1, 1, ARRAY_SIZE(clock_fields), clock_fields, clock_save, clock_load},
};

int vm_kernel_state_create(struct vm *vm, struct error *err)
{
    struct vm_kernel_state *k = calloc(1, sizeof(*k));
    if (!k)
        return error_set(err, -ENOMEM, "no memory for the VM's state");
    k->vm = vm;
    vm->kernel_state = k;
    for (size_t i = 0; i < ARRAY_SIZE(tables); i++) {
        int ret = state_register(&vm->state, &tables[i], 0, k, err);
        if (ret)
            return ret;
    }
    return 0;
}
