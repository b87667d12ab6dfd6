// SPDX-License-Identifier: Apache-2.0
#include "vmm/msi.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "vmm/layout.h"
#include "vmm/vm.h"

enum {
    LINES_ISA = 16, // also reach the two 8259s, eight each
    LINES = GSI_MAX,
    FIXED = LINES + LINES_ISA, // entries of KVM's own table
};

struct msi_route {
    uint64_t address;
    uint32_t data;
    bool set;
};

struct msi_routes {
    pthread_mutex_t lock; // guards what follows
    unsigned nr;
    struct msi_route route[MSI_ROUTES_MAX];
    struct {
        struct kvm_irq_routing head;
        struct kvm_irq_routing_entry entries[FIXED + MSI_ROUTES_MAX];
    } table; // what KVM gets
};

int vm_msi_alloc(struct vm *vm, unsigned nr, unsigned *gsi, struct error *err)
{
    if (!vm->msi) {
        vm->msi = calloc(1, sizeof(*vm->msi));
        if (!vm->msi)
            return error_set(err, -ENOMEM, "no memory for interrupt messages");
        pthread_mutex_init(&vm->msi->lock, NULL);
    }
    if (nr > MSI_ROUTES_MAX - vm->msi->nr)
        return error_set(err, -ENOSPC, "%u more interrupt messages: %u of %d are taken", nr,
                         vm->msi->nr, MSI_ROUTES_MAX);
    *gsi = LINES + vm->msi->nr;
    vm->msi->nr += nr;
    return 0;
}

static struct kvm_irq_routing_entry line_entry(unsigned line, unsigned chip, unsigned pin)
{
    return (struct kvm_irq_routing_entry) {
        .gsi = line, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = {.irqchip = chip, .pin = pin}};
}

static int table_set(struct vm *vm, struct error *err)
{
    struct msi_routes *m = vm->msi;
    struct kvm_irq_routing_entry *e = m->table.entries;
    for (unsigned i = 0; i < LINES; i++)
        *e++ = line_entry(i, KVM_IRQCHIP_IOAPIC, i);
    for (unsigned i = 0; i < LINES_ISA; i++)
        *e++ = line_entry(i, i < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, i % 8);
    for (unsigned i = 0; i < m->nr; i++) {
        const struct msi_route *r = &m->route[i];
        if (r->set)
            *e++ = (struct kvm_irq_routing_entry) {
                .gsi = LINES + i,
                .type = KVM_IRQ_ROUTING_MSI,
                .u.msi = {(uint32_t)r->address, (uint32_t)(r->address >> 32), r->data}};
    }
    m->table.head.nr = (uint32_t)(e - m->table.entries);
    if (ioctl(vm->fd, KVM_SET_GSI_ROUTING, &m->table))
        return error_errno(err, "KVM_SET_GSI_ROUTING of %u entries", m->table.head.nr);
    return 0;
}

static int route_set(struct vm *vm, struct msi_route *r, const struct msi_route *wanted,
                     struct error *err)
{
    if (r->set && r->address == wanted->address && r->data == wanted->data)
        return 0;
    struct msi_route old = *r;
    *r = *wanted;
    int ret = table_set(vm, err);
    if (ret)
        *r = old;
    return ret;
}

int vm_msi_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data, struct error *err)
{
    const struct msi_route wanted = {address, data, true};
    struct msi_routes *m = vm->msi;
    if (!m || gsi < LINES || gsi - LINES >= m->nr)
        return error_set(err, -EINVAL, "line %u has no messages", gsi);
    if (address < LAYOUT_LAPIC || address >= LAYOUT_LAPIC_END)
        return error_set(err, -EINVAL, "message to 0x%llx: expected 0x%llx to 0x%llx",
                         (unsigned long long)address, (unsigned long long)LAYOUT_LAPIC,
                         (unsigned long long)LAYOUT_LAPIC_END - 1);
    pthread_mutex_lock(&m->lock);
    int ret = route_set(vm, &m->route[gsi - LINES], &wanted, err);
    pthread_mutex_unlock(&m->lock);
    return ret;
}

void msi_routes_free(struct msi_routes *routes)
{
    if (routes)
        pthread_mutex_destroy(&routes->lock);
    free(routes);
}
