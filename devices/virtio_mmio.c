// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_mmio.h"

#include <errno.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "vmm/util.h"
#include "vmm/vm.h"

// Registers, 4.2.2. All are 32 bits wide and may only be used so.
enum {
    REG_MAGIC = 0x000,
    REG_VERSION = 0x004,
    REG_DEVICE_ID = 0x008,
    REG_VENDOR_ID = 0x00c,
    REG_FEATURES = 0x010,
    REG_FEATURES_SEL = 0x014,
    REG_DRIVER_FEATURES = 0x020,
    REG_DRIVER_FEATURES_SEL = 0x024,
    REG_QUEUE_SEL = 0x030,
    REG_QUEUE_SIZE_MAX = 0x034,
    REG_QUEUE_SIZE = 0x038,
    REG_QUEUE_READY = 0x044,
    REG_NOTIFY = 0x050,
    REG_ISR = 0x060,
    REG_ISR_ACK = 0x064,
    REG_STATUS = 0x070,
    REG_QUEUE_DESC = 0x080, // and the high half after it, as the next two
    REG_QUEUE_DRIVER = 0x090,
    REG_QUEUE_DEVICE = 0x0a0,
    REG_SHM_LEN = 0x0b0, // to 0x0bc: length and base of a shared memory region, all ones = none
    REG_SHM_END = 0x0c0,
    REG_GENERATION = 0x0fc,
    REG_CONFIG = 0x100,
};

enum { MAGIC = 0x74726976, VERSION = 2, VENDOR = 0x59525246 }; // "virt", modern, "FRRY"

struct virtio_mmio {
    struct virtio_mmio_place place;
    int irq_fd;
    int ack_fd; // counts acknowledgements of VIRTIO_ISR_QUEUE; -1: they exit
    bool irq_on;
    unsigned doorbells; // of the first so many queues, KVM has them
};

static void mmio_acknowledged(struct virtio *v);

static uint32_t register_read(struct virtio *v, uint64_t offset)
{
    struct virtqueue *vq = virtio_selected(v);
    switch (offset) {
    case REG_MAGIC:
        return MAGIC;
    case REG_VERSION:
        return VERSION;
    case REG_DEVICE_ID:
        return v->ops->id;
    case REG_VENDOR_ID:
        return VENDOR;
    case REG_FEATURES:
        return virtio_features_read(v);
    case REG_QUEUE_SIZE_MAX:
        return vq ? vq->size_max : 0;
    case REG_QUEUE_READY:
        return vq && vq->enabled;
    case REG_ISR:
        mmio_acknowledged(v);
        return v->isr;
    case REG_STATUS:
        return virtio_status_read(v);
    case REG_GENERATION:
        return v->generation;
    default:
        return offset >= REG_SHM_LEN && offset < REG_SHM_END ? ~0u : 0;
    }
}

static void address_write(struct virtio *v, uint64_t offset, uint32_t value)
{
    struct virtqueue *vq = virtio_configurable(v);
    if (!vq)
        return;
    uint64_t *slot = offset < REG_QUEUE_DRIVER   ? &vq->desc_gpa
                     : offset < REG_QUEUE_DEVICE ? &vq->driver_gpa
                                                 : &vq->device_gpa;
    *slot = offset & 4 ? (uint32_t)*slot | (uint64_t)value << 32 : (*slot & ~0xffffffffull) | value;
}

static void size_write(struct virtio *v, uint32_t value)
{
    struct virtqueue *vq = virtio_configurable(v);
    if (vq)
        vq->size = value <= UINT16_MAX ? (uint16_t)value : UINT16_MAX; // judged when it is enabled
}

static void register_write(struct virtio *v, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case REG_FEATURES_SEL:
        v->offered_sel = value;
        return;
    case REG_DRIVER_FEATURES:
        virtio_features_write(v, value);
        return;
    case REG_DRIVER_FEATURES_SEL:
        v->accepted_sel = value;
        return;
    case REG_QUEUE_SEL:
        v->queue_sel = value;
        return;
    case REG_QUEUE_SIZE:
        size_write(v, value);
        return;
    case REG_QUEUE_READY:
        virtio_queue_ready(v, value & 1);
        return;
    case REG_NOTIFY: // doorbells that KVM does not catch
        if (value < v->nr_queues)
            virtio_ring(v, value);
        return;
    case REG_ISR_ACK:
        v->isr &= (uint8_t)~value;
        return;
    case REG_STATUS:
        virtio_status_write(v, (uint8_t)value);
        return;
    case REG_QUEUE_DESC:
    case REG_QUEUE_DESC + 4:
    case REG_QUEUE_DRIVER:
    case REG_QUEUE_DRIVER + 4:
    case REG_QUEUE_DEVICE:
    case REG_QUEUE_DEVICE + 4:
        address_write(v, offset, value);
        return;
    }
}

static struct virtio *virtio_of(void *dev)
{
    return container_of((struct device *)dev, struct virtio, dev);
}

static uint64_t mmio_read(void *dev, uint64_t offset, unsigned size)
{
    struct virtio *v = virtio_of(dev);
    if (offset >= REG_CONFIG)
        return virtio_config_read(v, offset - REG_CONFIG, size);
    return size == 4 && offset % 4 == 0 ? register_read(v, offset) : 0;
}

static void mmio_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct virtio *v = virtio_of(dev);
    if (offset >= REG_CONFIG)
        virtio_config_write(v, offset - REG_CONFIG, size, value);
    else if (size == 4 && offset % 4 == 0)
        register_write(v, offset, (uint32_t)value);
}

static const struct bus_ops mmio_ops = {mmio_read, mmio_write};

// --- the transport

static int kvm_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int event_fd,
                        struct error *err)
{
    return vm_ioeventfd_value(vm, addr, value, event_fd, true, err);
}

static int kvm_doorbell_off(struct vm *vm, uint64_t addr, uint32_t value, int event_fd,
                            struct error *err)
{
    return vm_ioeventfd_value(vm, addr, value, event_fd, false, err);
}

static const struct virtio_mmio_wiring kvm_wiring = {vm_irqfd, kvm_doorbell, vm_irqfd_remove,
                                                     kvm_doorbell_off, kvm_doorbell};

// Without this each interrupt costs two exits: its status is read, then acknowledged (4.2.2). The
// device sees the second when it next looks. That is early enough: it looks after it has put into
// the ring what the next interrupt is about, and a driver reads the ring after it acknowledged.
static void ack_connect(struct virtio *v, struct virtio_mmio *m)
{
    if (!m->place.wiring->ack)
        return;
    m->ack_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->ack_fd >= 0 && m->place.wiring->ack(v->dev.vm, m->place.base + REG_ISR_ACK,
                                               VIRTIO_ISR_QUEUE, m->ack_fd, NULL)) {
        close(m->ack_fd);
        m->ack_fd = -1;
    }
}

static void mmio_acknowledged(struct virtio *v)
{
    struct virtio_mmio *m = v->transport_data;
    uint64_t count;
    if (m && m->ack_fd >= 0 && read(m->ack_fd, &count, sizeof(count)) == sizeof(count))
        v->isr &= (uint8_t)~VIRTIO_ISR_QUEUE;
}

static int wires_connect(struct virtio *v, struct virtio_mmio *m, struct error *err)
{
    const struct virtio_mmio_wiring *wiring = m->place.wiring;
    struct vm *vm = v->dev.vm;
    int ret = wiring->irqfd(vm, m->place.gsi, m->irq_fd, -1, err);
    if (ret)
        return ret;
    m->irq_on = true;
    for (; m->doorbells < v->nr_queues && !ret; m->doorbells += !ret)
        ret = wiring->doorbell(vm, m->place.base + REG_NOTIFY, m->doorbells,
                               v->bells[m->doorbells]->fd, err);
    return ret;
}

// A VM that has ended takes them with it; one by one each would cost up to some ms.
static void wires_cut(struct virtio *v, struct virtio_mmio *m)
{
    const struct virtio_mmio_wiring *wiring = m->place.wiring;
    struct vm *vm = v->dev.vm;
    if (m->irq_on && wiring->irqfd_off)
        wiring->irqfd_off(vm, m->place.gsi, m->irq_fd, NULL);
    for (unsigned i = 0; i < m->doorbells && wiring->doorbell_off; i++)
        wiring->doorbell_off(vm, m->place.base + REG_NOTIFY, i, v->bells[i]->fd, NULL);
    if (m->ack_fd >= 0 && wiring->doorbell_off)
        wiring->doorbell_off(vm, m->place.base + REG_ISR_ACK, VIRTIO_ISR_QUEUE, m->ack_fd, NULL);
}

static int mmio_attach(struct virtio *v, const void *place, struct error *err)
{
    struct virtio_mmio *m = calloc(1, sizeof(*m));
    if (!m)
        return error_set(err, -ENOMEM, "no memory for a virtio-mmio window");
    v->transport_data = m;
    m->ack_fd = -1;
    m->place = *(const struct virtio_mmio_place *)place;
    if (!m->place.wiring)
        m->place.wiring = &kvm_wiring;
    m->irq_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->irq_fd < 0)
        return error_errno(err, "eventfd");

    struct bus_range range = {m->place.base, VIRTIO_MMIO_LEN, v->dev.class->name,
                              &mmio_ops,     &v->dev,         &v->dev.lock};
    int ret = wires_connect(v, m, err);
    if (!ret)
        ack_connect(v, m);
    return ret ? ret : bus_add(&v->dev.vm->mmio, &range, err); // last: it cannot be taken back
}

static void mmio_detach(struct virtio *v)
{
    struct virtio_mmio *m = v->transport_data;
    if (!m)
        return;
    if (!vm_stopped(v->dev.vm))
        wires_cut(v, m);
    if (m->irq_fd >= 0)
        close(m->irq_fd);
    if (m->ack_fd >= 0)
        close(m->ack_fd);
    free(m);
    v->transport_data = NULL;
}

static void mmio_signal(struct virtio *v, int queue)
{
    struct virtio_mmio *m = v->transport_data;
    uint64_t one = 1;
    if (write(m->irq_fd, &one, sizeof(one)) < 0)
        return; // EAGAIN: the line is pulsed already
}

const struct virtio_transport virtio_mmio_transport = {.name = "virtio-mmio",
                                                       .attach = mmio_attach,
                                                       .detach = mmio_detach,
                                                       .signal = mmio_signal,
                                                       .acknowledged = mmio_acknowledged};

// --- where guests find it

struct acpi_virtio_mmio virtio_mmio_window(unsigned i)
{
    _Static_assert(LAYOUT_VIRTIO_MMIO + VIRTIO_MMIO_MAX * VIRTIO_MMIO_LEN <= LAYOUT_VIRTIO_END,
                   "the windows fit");
    return (struct acpi_virtio_mmio) {.base = LAYOUT_VIRTIO_MMIO + (uint64_t)i * VIRTIO_MMIO_LEN,
                                      .len = VIRTIO_MMIO_LEN,
                                      .gsi = GSI_VIRTIO + i % (GSI_MAX - GSI_VIRTIO)};
}

int virtio_mmio_cmdline(const struct acpi_virtio_mmio *windows, unsigned nr, char *text,
                        size_t size, struct error *err)
{
    size_t len = 0;
    if (size)
        *text = 0;
    for (unsigned i = 0; i < nr; i++) {
        int n =
            snprintf(text + len, size - len, " virtio_mmio.device=%uK@0x%llx:%u",
                     windows[i].len / 1024, (unsigned long long)windows[i].base, windows[i].gsi);
        if (n < 0 || (size_t)n >= size - len)
            return error_set(err, -ENOSPC, "%u virtio-mmio windows do not fit into %zu bytes", nr,
                             size);
        len += (size_t)n;
    }
    return 0;
}
