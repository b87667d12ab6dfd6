// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_pci.h"

#include <errno.h>
#include <string.h>

#include "devices/msix.h"
#include "vmm/util.h"
#include "vmm/vm.h"

// The window: each part on a page of its own, so that a driver can map them apart.
enum {
    WINDOW_COMMON = 0x0000,
    WINDOW_ISR = 0x1000,
    WINDOW_DEVICE = 0x2000,
    WINDOW_NOTIFY = 0x3000,
    WINDOW_TABLE = 0x4000,
    WINDOW_PENDING = 0x5000,
    WINDOW_LEN = 0x8000,
    PART_LEN = 0x1000,
    COMMON_LEN = 0x40,
    NOTIFY_STRIDE = 4, // bytes from one queue's doorbell to the next
};
_Static_assert(VIRTIO_QUEUES_MAX *(int)NOTIFY_STRIDE <= (int)PART_LEN, "doorbells fit");
_Static_assert((int)VIRTIO_CONFIG_MAX <= (int)PART_LEN, "device configuration fits");
_Static_assert(MSIX_MAX *(int)MSIX_ENTRY_LEN <= (int)PART_LEN, "the MSI-X table fits");
_Static_assert((int)VIRTIO_QUEUES_MAX < (int)MSIX_MAX, "a vector for each queue and one more");

enum { VENDOR = 0x1af4, DEVICE_BASE = 0x1040, REVISION = 1 };         // 4.1.2
enum { CFG_COMMON = 1, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_ACCESS }; // 4.1.4
enum { NO_VECTOR = 0xffff };

// Common configuration, 4.1.4.3.
enum {
    REG_FEATURES_SEL = 0x00,
    REG_FEATURES = 0x04,
    REG_DRIVER_FEATURES_SEL = 0x08,
    REG_DRIVER_FEATURES = 0x0c,
    REG_CONFIG_VECTOR = 0x10, // 16 bits, as those below where no other width stands
    REG_QUEUES = 0x12,
    REG_STATUS = 0x14,     // 8 bits
    REG_GENERATION = 0x15, // 8 bits
    REG_QUEUE_SEL = 0x16,
    REG_QUEUE_SIZE = 0x18,
    REG_QUEUE_VECTOR = 0x1a,
    REG_QUEUE_ENABLE = 0x1c,
    REG_QUEUE_NOTIFY_OFF = 0x1e,
    REG_QUEUE_DESC = 0x20, // 64 bits in two halves, as the next two
    REG_QUEUE_DRIVER = 0x28,
    REG_QUEUE_DEVICE = 0x30,
    REG_QUEUE_END = 0x38,
};

struct __attribute__((packed)) capability { // 4.1.4
    uint8_t id, next, len, type;
    uint8_t bar, number, padding[2];
    uint32_t offset, length;
    uint32_t more; // multiplier of CFG_NOTIFY, data of CFG_ACCESS
};
_Static_assert(sizeof(struct capability) == 20, "4.1.4.4");

struct virtio_pci {
    struct virtio *v;
    struct pci_function f;
    const struct pci_wiring *wiring;
    struct msix msix;
    unsigned access_cap; // offset of CFG_ACCESS in configuration space
    uint32_t doorbells;  // queues whose doorbell KVM catches at f.base, a bit each
    uint16_t config_vector, queue_vector[VIRTIO_QUEUES_MAX];
};

static struct virtio_pci *pci_of(struct pci_function *f)
{
    return container_of(f, struct virtio_pci, f);
}

// --- common configuration

// Width of the field at `offset` as a driver must access it (4.1.3.1); 0: none begins there.
static unsigned field_width(uint64_t offset)
{
    if (offset < REG_CONFIG_VECTOR || (offset >= REG_QUEUE_DESC && offset < REG_QUEUE_END))
        return offset % 4 ? 0 : 4;
    if (offset == REG_STATUS || offset == REG_GENERATION)
        return 1;
    return offset % 2 || offset >= REG_QUEUE_END ? 0 : 2;
}

static uint64_t *queue_address(struct virtqueue *vq, uint64_t offset)
{
    return offset < REG_QUEUE_DRIVER   ? &vq->desc_gpa
           : offset < REG_QUEUE_DEVICE ? &vq->driver_gpa
                                       : &vq->device_gpa;
}

static uint32_t queue_read(struct virtio_pci *p, uint64_t offset)
{
    struct virtqueue *vq = virtio_selected(p->v);
    if (!vq)
        return offset == REG_QUEUE_VECTOR ? NO_VECTOR : 0;
    switch (offset) {
    case REG_QUEUE_SIZE:
        return vq->size;
    case REG_QUEUE_VECTOR:
        return p->queue_vector[p->v->queue_sel];
    case REG_QUEUE_ENABLE:
        return vq->enabled;
    case REG_QUEUE_NOTIFY_OFF:
        return p->v->queue_sel;
    default:
        return (uint32_t)(*queue_address(vq, offset) >> (offset & 4 ? 32 : 0));
    }
}

static uint32_t common_read(struct virtio_pci *p, uint64_t offset)
{
    struct virtio *v = p->v;
    switch (offset) {
    case REG_FEATURES_SEL:
        return v->offered_sel;
    case REG_FEATURES:
        return virtio_features_read(v);
    case REG_DRIVER_FEATURES_SEL:
        return v->accepted_sel;
    case REG_DRIVER_FEATURES:
        return v->accepted_sel < 2 ? (uint32_t)(v->accepted >> 32 * v->accepted_sel) : 0;
    case REG_CONFIG_VECTOR:
        return p->config_vector;
    case REG_QUEUES:
        return v->nr_queues;
    case REG_STATUS:
        return virtio_status_read(v);
    case REG_GENERATION:
        return (uint8_t)v->generation;
    case REG_QUEUE_SEL:
        return v->queue_sel;
    default:
        return queue_read(p, offset);
    }
}

static void queue_write(struct virtio_pci *p, uint64_t offset, uint32_t value)
{
    struct virtqueue *vq = virtio_configurable(p->v);
    if (offset == REG_QUEUE_ENABLE) {
        virtio_queue_ready(p->v, value == 1);
    } else if (offset == REG_QUEUE_VECTOR) {
        if (virtio_selected(p->v)) // one that is not there reads back as none, 4.1.5.1.2.1
            p->queue_vector[p->v->queue_sel] = value < p->msix.nr ? (uint16_t)value : NO_VECTOR;
    } else if (vq && offset == REG_QUEUE_SIZE) {
        vq->size = (uint16_t)value; // judged when it is enabled
    } else if (vq && offset >= REG_QUEUE_DESC) {
        uint64_t *address = queue_address(vq, offset);
        *address = offset & 4 ? (uint32_t)*address | (uint64_t)value << 32
                              : (*address & ~0xffffffffull) | value;
    }
}

static void common_write(struct virtio_pci *p, uint64_t offset, uint32_t value)
{
    struct virtio *v = p->v;
    switch (offset) {
    case REG_FEATURES_SEL:
        v->offered_sel = value;
        return;
    case REG_DRIVER_FEATURES_SEL:
        v->accepted_sel = value;
        return;
    case REG_DRIVER_FEATURES:
        virtio_features_write(v, value);
        return;
    case REG_CONFIG_VECTOR:
        p->config_vector = value < p->msix.nr ? (uint16_t)value : NO_VECTOR;
        return;
    case REG_STATUS:
        virtio_status_write(v, (uint8_t)value);
        return;
    case REG_QUEUE_SEL:
        v->queue_sel = value;
        return;
    default:
        queue_write(p, offset, value);
    }
}

// --- the window

static uint64_t isr_read(struct virtio *v)
{
    uint8_t isr = v->isr;
    v->isr = 0; // 4.1.4.5
    return isr;
}

static uint64_t window_read(struct pci_function *f, uint64_t offset, unsigned size)
{
    struct virtio_pci *p = pci_of(f);
    uint64_t part = offset & ~(uint64_t)(PART_LEN - 1), at = offset % PART_LEN;
    switch (part) {
    case WINDOW_COMMON:
        return size == field_width(at) ? common_read(p, at) : 0;
    case WINDOW_ISR:
        return !at && size == 1 ? isr_read(p->v) : 0;
    case WINDOW_DEVICE:
        return virtio_config_read(p->v, at, size);
    case WINDOW_TABLE:
        return msix_table_read(&p->msix, at, size);
    case WINDOW_PENDING:
        return msix_pending_read(&p->msix, at, size);
    default:
        return 0;
    }
}

static void window_write(struct pci_function *f, uint64_t offset, unsigned size, uint64_t value)
{
    struct virtio_pci *p = pci_of(f);
    uint64_t part = offset & ~(uint64_t)(PART_LEN - 1), at = offset % PART_LEN;
    switch (part) {
    case WINDOW_COMMON:
        if (size == field_width(at))
            common_write(p, at, (uint32_t)value);
        return;
    case WINDOW_DEVICE:
        virtio_config_write(p->v, at, size, value);
        return;
    case WINDOW_NOTIFY: // doorbells that KVM does not catch
        if (at % NOTIFY_STRIDE == 0 && at / NOTIFY_STRIDE < p->v->nr_queues)
            virtio_ring(p->v, (unsigned)at / NOTIFY_STRIDE);
        return;
    case WINDOW_TABLE:
        msix_table_write(&p->msix, at, size, value);
        return;
    }
}

// The doorbells go with the window. One that KVM does not take (its address belongs to another
// function already, or KVM has no room) is served by window_write.
static void window_moved(struct pci_function *f, uint64_t old)
{
    struct virtio_pci *p = pci_of(f);
    struct vm *vm = p->v->dev.vm;
    for (unsigned i = 0; i < p->v->nr_queues; i++) {
        uint64_t offset = WINDOW_NOTIFY + i * NOTIFY_STRIDE;
        uint32_t bit = 1u << i;
        if (p->doorbells & bit)
            p->wiring->doorbell(vm, old + offset, p->v->bells[i]->fd, false, NULL);
        p->doorbells &= ~bit;
        if (f->base && !p->wiring->doorbell(vm, f->base + offset, p->v->bells[i]->fd, true, NULL))
            p->doorbells |= bit;
    }
}

// --- CFG_ACCESS (4.1.4.9): the window by way of configuration space

// What the guest wrote into the capability, if that is an access.
static bool access_wanted(const struct virtio_pci *p, struct capability *cap)
{
    memcpy(cap, p->f.config + p->access_cap, sizeof(*cap));
    return !cap->bar && (cap->length == 1 || cap->length == 2 || cap->length == 4) &&
           cap->offset % cap->length == 0 && range_within(cap->offset, cap->length, WINDOW_LEN);
}

static void access_data(struct virtio_pci *p, bool write)
{
    struct capability cap;
    uint8_t *data = p->f.config + p->access_cap + offsetof(struct capability, more);
    if (!access_wanted(p, &cap))
        return;
    if (write) {
        window_write(&p->f, cap.offset, cap.length, cap.more);
        return;
    }
    uint64_t value = window_read(&p->f, cap.offset, cap.length);
    memcpy(data, &value, cap.length);
}

static void config_touched(struct pci_function *f, unsigned offset, unsigned size, bool write)
{
    struct virtio_pci *p = pci_of(f);
    unsigned data = p->access_cap + offsetof(struct capability, more);
    if (offset < data + 4 && offset + size > data)
        access_data(p, write);
    if (write)
        msix_config_written(&p->msix, offset, size);
}

static void function_reset(struct pci_function *f)
{
    msix_reset(&pci_of(f)->msix);
}

static const struct pci_function_ops function_ops = {.read = window_read,
                                                     .write = window_write,
                                                     .moved = window_moved,
                                                     .config_touched = config_touched,
                                                     .reset = function_reset};

// --- saved state

static int pci_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_pci *p = object;
    pthread_mutex_lock(&p->v->dev.lock);
    int ret = pci_function_loaded(&p->f, err);
    if (!ret)
        ret = msix_loaded(&p->msix, err);
    for (unsigned i = 0; i < VIRTIO_QUEUES_MAX; i++)
        if (p->queue_vector[i] >= p->msix.nr)
            p->queue_vector[i] = NO_VECTOR;
    if (p->config_vector >= p->msix.nr)
        p->config_vector = NO_VECTOR;
    pthread_mutex_unlock(&p->v->dev.lock);
    return ret;
}

static const struct state_field pci_fields[] = {
    STATE_FIELD_BYTES(struct virtio_pci, f.config, 1),
    MSIX_STATE_FIELDS(struct virtio_pci, msix),
    STATE_FIELD_INT(struct virtio_pci, config_vector, 1),
    STATE_FIELD_INTS(struct virtio_pci, queue_vector, 1),
};

static const struct state_table pci_state = {
    .name = "virtio-pci", // its instance is the slot
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(pci_fields),
    .fields = pci_fields,
    .load = pci_load,
};

// --- the transport

static uint32_t class_of(uint32_t id)
{
    switch (id) {
    case VIRTIO_ID_NET:
        return 0x020000; // Ethernet
    case VIRTIO_ID_BLK:
        return 0x018000; // mass storage, other
    case VIRTIO_ID_CONSOLE:
        return 0x078000; // communication, other
    default:
        return 0xff0000; // no class of PCI's
    }
}

static unsigned part_add(struct virtio_pci *p, uint8_t type, uint32_t offset, uint32_t length,
                         uint32_t more)
{
    bool longer = type == CFG_NOTIFY || type == CFG_ACCESS;
    uint8_t len = longer ? sizeof(struct capability) : offsetof(struct capability, more);
    const struct capability cap = {
        .len = len, .type = type, .offset = offset, .length = length, .more = more};
    const struct capability access = {.bar = 0xff, .offset = ~0u, .length = ~0u, .more = ~0u};
    return pci_capability_add(&p->f, PCI_CAP_VENDOR, &cap, type == CFG_ACCESS ? &access : NULL,
                              len);
}

static void parts_add(struct virtio_pci *p)
{
    struct virtio *v = p->v;
    part_add(p, CFG_COMMON, WINDOW_COMMON, COMMON_LEN, 0);
    part_add(p, CFG_NOTIFY, WINDOW_NOTIFY, v->nr_queues * NOTIFY_STRIDE, NOTIFY_STRIDE);
    part_add(p, CFG_ISR, WINDOW_ISR, 1, 0);
    if (v->config_len)
        part_add(p, CFG_DEVICE, WINDOW_DEVICE, v->config_len, 0);
    p->access_cap = part_add(p, CFG_ACCESS, 0, 0, 0);
}

static void vectors_forget(struct virtio *v)
{
    struct virtio_pci *p = v->transport_data;
    p->config_vector = NO_VECTOR;
    for (unsigned i = 0; i < VIRTIO_QUEUES_MAX; i++)
        p->queue_vector[i] = NO_VECTOR;
    p->msix.pending = 0;
}

static int pci_attach(struct virtio *v, const void *place_, struct error *err)
{
    const struct virtio_pci_place *place = place_;
    struct virtio_pci *p = calloc(1, sizeof(*p));
    if (!p)
        return error_set(err, -ENOMEM, "no memory for a virtio-pci function");
    v->transport_data = p;
    p->v = v;
    p->wiring = pci_host_wiring(place->host);
    vectors_forget(v);
    const struct pci_identity id = {.vendor = VENDOR,
                                    .device = (uint16_t)(DEVICE_BASE + v->ops->id),
                                    .subvendor = VENDOR,
                                    .subdevice = (uint16_t)(DEVICE_BASE + v->ops->id),
                                    .class = class_of(v->ops->id),
                                    .revision = REVISION};
    pci_function_init(&p->f, &function_ops, &v->dev.lock, &id, WINDOW_LEN);
    parts_add(p);
    struct vm *vm = v->dev.vm;
    int ret = msix_create(&p->msix, vm, p->wiring, &p->f, v->nr_queues + 1, WINDOW_TABLE,
                          WINDOW_PENDING, err);
    if (!ret)
        ret = pci_function_add(place->host, &p->f, place->slot, err);
    return ret ? ret : state_register(&vm->state, &pci_state, place->slot, p, err);
}

static void pci_detach(struct virtio *v)
{
    struct virtio_pci *p = v->transport_data;
    if (!p)
        return;
    if (vm_stopped(v->dev.vm))
        p->doorbells = 0; // it takes them with it
    pci_function_remove(&p->f);
    msix_destroy(&p->msix);
    free(p);
    v->transport_data = NULL;
}

static void pci_signal(struct virtio *v, int queue)
{
    struct virtio_pci *p = v->transport_data;
    msix_signal(&p->msix, queue < 0 ? p->config_vector : p->queue_vector[queue]);
}

const struct virtio_transport virtio_pci_transport = {.name = "virtio-pci",
                                                      .attach = pci_attach,
                                                      .detach = pci_detach,
                                                      .signal = pci_signal,
                                                      .reset = vectors_forget,
                                                      .reset_polled = true};
