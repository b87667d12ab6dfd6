// SPDX-License-Identifier: Apache-2.0
// The virtio driver of virtio.h.
#include "virtio.h"

#include "internal.h"

struct vfield {
    uint16_t at;
    uint8_t bytes;
};

struct vtransport {
    bool pci;
    struct vfield regs[VR_COUNT];
};

static const struct vtransport mmio = { // 4.2.2
    .pci = false,
    .regs = {
        [VR_FEATURES_SEL] = {0x14, 4},
        [VR_FEATURES] = {0x10, 4},
        [VR_ACCEPT_SEL] = {0x24, 4},
        [VR_ACCEPT] = {0x20, 4},
        [VR_STATUS] = {0x70, 4},
        [VR_GENERATION] = {0xfc, 4},
        [VR_QUEUE_SEL] = {0x30, 4},
        [VR_QUEUE_MAX] = {0x34, 4},
        [VR_QUEUE_SIZE] = {0x38, 4},
        [VR_READY] = {0x44, 4},
        [VR_DESC] = {0x80, 8},
        [VR_DRIVER] = {0x90, 8},
        [VR_DEVICE] = {0xa0, 8},
    }};

enum { MMIO_MAGIC = 0x74726976, MMIO_CONFIG = 0x100, MMIO_NOTIFY = 0x50, MMIO_ISR = 0x60 };

static const struct vtransport pci = { // 4.1.4.3
    .pci = true,
    .regs = {
        [VR_FEATURES_SEL] = {0, 4},
        [VR_FEATURES] = {4, 4},
        [VR_ACCEPT_SEL] = {8, 4},
        [VR_ACCEPT] = {12, 4},
        [VR_STATUS] = {20, 1},
        [VR_GENERATION] = {21, 1},
        [VR_QUEUE_SEL] = {22, 2},
        [VR_QUEUE_MAX] = {24, 2},
        [VR_QUEUE_SIZE] = {24, 2},
        [VR_READY] = {28, 2},
        [VR_DESC] = {32, 8},
        [VR_DRIVER] = {40, 8},
        [VR_DEVICE] = {48, 8},
    }};

enum { PCI_MSIX_CONFIG = 16, PCI_MSIX_QUEUE = 26, PCI_NOTIFY_OFF = 30 };

// --- registers

static uint64_t load(uint64_t gpa, unsigned bytes)
{
    switch (bytes) {
    case 1:
        return *(volatile uint8_t *)gpa;
    case 2:
        return *(volatile uint16_t *)gpa;
    case 4:
        return mmio_read32(gpa);
    default:
        return mmio_read32(gpa) | (uint64_t)mmio_read32(gpa + 4) << 32;
    }
}

static void store(uint64_t gpa, unsigned bytes, uint64_t value)
{
    switch (bytes) {
    case 1:
        *(volatile uint8_t *)gpa = (uint8_t)value;
        return;
    case 2:
        *(volatile uint16_t *)gpa = (uint16_t)value;
        return;
    case 8:
        mmio_write32(gpa + 4, (uint32_t)(value >> 32));
        __attribute__((fallthrough));
    default:
        mmio_write32(gpa, (uint32_t)value);
    }
}

uint64_t vreg_read(const struct vdev *dev, enum vreg reg)
{
    const struct vfield *f = &dev->transport->regs[reg];
    return load(dev->regs + f->at, f->bytes);
}

void vreg_write(const struct vdev *dev, enum vreg reg, uint64_t value)
{
    const struct vfield *f = &dev->transport->regs[reg];
    store(dev->regs + f->at, f->bytes, value);
}

uint32_t virtio_isr(const struct vdev *dev)
{
    if (dev->transport->pci)
        return (uint32_t)load(dev->isr, 1); // reading acknowledges
    uint32_t isr = mmio_read32(dev->isr);
    mmio_write32(dev->isr + 4, isr);
    return isr;
}

uint64_t virtio_offered(const struct vdev *dev)
{
    vreg_write(dev, VR_FEATURES_SEL, 0);
    uint64_t low = vreg_read(dev, VR_FEATURES);
    vreg_write(dev, VR_FEATURES_SEL, 1);
    return low | vreg_read(dev, VR_FEATURES) << 32;
}

// --- finding devices

static const char *number(const char *p, unsigned base, uint64_t *value)
{
    for (*value = 0;; p++) {
        unsigned lower = (unsigned char)*p | 0x20;
        unsigned digit = *p >= '0' && *p <= '9'         ? (unsigned)(*p - '0')
                         : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                                        : 16;
        if (digit >= base)
            return p;
        *value = *value * base + digit;
    }
}

// "4K@0xd0000000:16", what follows "virtio_mmio.device=".
static bool window(const char *p, struct vdev *dev)
{
    uint64_t base, line;
    while (*p && *p != '@' && *p != ' ')
        p++;
    if (p[0] != '@' || p[1] != '0' || p[2] != 'x')
        return false;
    p = number(p + 3, 16, &base);
    if (*p != ':')
        return false;
    number(p + 1, 10, &line);
    *dev = (struct vdev) {.transport = &mmio,
                          .regs = base,
                          .config = base + MMIO_CONFIG,
                          .notify = base + MMIO_NOTIFY,
                          .isr = base + MMIO_ISR,
                          .gsi = (uint32_t)line};
    if (mmio_read32(base) != MMIO_MAGIC || mmio_read32(base + 4) != 2)
        return false;
    dev->id = mmio_read32(base + 8);
    return dev->id;
}

static unsigned mmio_find(struct vdev *out, unsigned max)
{
    static const char word[] = "virtio_mmio.device=";
    unsigned n = 0;
    for (const char *p = boot_cmdline; *p && n < max;) {
        if (!memcmp(p, word, sizeof(word) - 1) && window(p + sizeof(word) - 1, &out[n]))
            n++;
        while (*p && *p != ' ')
            p++;
        while (*p == ' ')
            p++;
    }
    return n;
}

// Offsets in configuration space, PCI 3.0 6.1 and 6.8.2; virtio 1.2, 4.1.4.
enum {
    PCI_VENDOR_VIRTIO = 0x1af4,
    PCI_DEVICE_BASE = 0x1040,
    PCI_COMMAND = 4,
    PCI_COMMAND_ON = 6, // memory, bus master
    PCI_BAR = 0x10,
    PCI_CAP_FIRST = 0x34,
    PCI_CAP_VENDOR = 9,
    PCI_CAP_MSIX = 0x11,
    PCI_MSIX_ON = 1 << 15,
    PCI_SLOTS = 32,
    PCI_CAPS_MAX = 48,
};
enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4 };

static uint64_t bar_address(uint64_t config, unsigned bar)
{
    uint32_t low = mmio_read32(config + PCI_BAR + 4 * bar);
    uint64_t high = (low & 6) == 4 ? mmio_read32(config + PCI_BAR + 4 * bar + 4) : 0;
    return (low & ~15ul) | high << 32;
}

static void capability(struct vdev *dev, uint64_t cap)
{
    uint32_t head = mmio_read32(cap);
    if ((head & 0xff) == PCI_CAP_MSIX) {
        uint32_t table = mmio_read32(cap + 4);
        dev->msix = bar_address(dev->pci, table & 7) + (table & ~7u);
        store(cap + 2, 2, head >> 16 | PCI_MSIX_ON);
    } else if ((head & 0xff) == PCI_CAP_VENDOR) {
        uint64_t at = bar_address(dev->pci, mmio_read32(cap + 4) & 0xff) + mmio_read32(cap + 8);
        switch (head >> 24) {
        case CAP_COMMON:
            dev->regs = at;
            break;
        case CAP_NOTIFY:
            dev->notify = at;
            dev->notify_step = mmio_read32(cap + 16);
            break;
        case CAP_ISR:
            dev->isr = at;
            break;
        case CAP_DEVICE:
            dev->config = at;
            break;
        }
    }
}

static bool pci_device(uint64_t config, struct vdev *dev)
{
    uint32_t id = mmio_read32(config);
    if ((id & 0xffff) != PCI_VENDOR_VIRTIO || id >> 16 <= PCI_DEVICE_BASE)
        return false;
    *dev = (struct vdev) {.transport = &pci, .id = (id >> 16) - PCI_DEVICE_BASE, .pci = config};
    store(config + PCI_COMMAND, 2, PCI_COMMAND_ON);
    unsigned at = mmio_read32(config + PCI_CAP_FIRST) & 0xfc;
    for (unsigned i = 0; at && i < PCI_CAPS_MAX; i++) {
        capability(dev, config + at);
        at = mmio_read32(config + at) >> 8 & 0xfc;
    }
    return dev->regs && dev->notify && dev->isr;
}

// Devices of bus 0, whose configuration space ACPI's MCFG table names (PCI firmware 3.3, 4.1.2).
static unsigned pci_find(struct vdev *out, unsigned max)
{
    const uint8_t *mcfg = acpi_find("MCFG");
    unsigned n = 0;
    if (!mcfg)
        return 0;
    uint64_t ecam = *(const uint64_t *)(mcfg + 44);
    for (unsigned slot = 0; slot < PCI_SLOTS && n < max; slot++)
        n += pci_device(ecam + ((uint64_t)slot << 15), &out[n]);
    return n;
}

unsigned virtio_find(struct vdev *out, unsigned max)
{
    unsigned n = mmio_find(out, max);
    return n + pci_find(out + n, max - n);
}

struct vdev *virtio_get(struct vdev *list, unsigned nr, uint32_t id, unsigned n)
{
    for (unsigned i = 0; i < nr; i++)
        if (list[i].id == id && !n--)
            return &list[i];
    guest_assert_failed(__FILE__, __LINE__, "no such device: id, of", id, nr);
}

// --- negotiation and queues

void virtio_reset(struct vdev *dev)
{
    vreg_write(dev, VR_STATUS, 0);
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES;
    while (vreg_read(dev, VR_STATUS))
        GUEST_ASSERT(rdtsc() < end);
}

bool virtio_begin(struct vdev *dev, uint64_t features)
{
    virtio_reset(dev);
    vreg_write(dev, VR_STATUS, VS_ACKNOWLEDGE);
    vreg_write(dev, VR_STATUS, VS_ACKNOWLEDGE | VS_DRIVER);
    dev->accepted = features & virtio_offered(dev);
    vreg_write(dev, VR_ACCEPT_SEL, 0);
    vreg_write(dev, VR_ACCEPT, (uint32_t)dev->accepted);
    vreg_write(dev, VR_ACCEPT_SEL, 1);
    vreg_write(dev, VR_ACCEPT, dev->accepted >> 32);
    vreg_write(dev, VR_STATUS, VS_ACKNOWLEDGE | VS_DRIVER | VS_FEATURES_OK);
    return vreg_read(dev, VR_STATUS) & VS_FEATURES_OK;
}

void virtio_go(struct vdev *dev)
{
    vreg_write(dev, VR_STATUS, VS_ACKNOWLEDGE | VS_DRIVER | VS_FEATURES_OK | VS_DRIVER_OK);
}

static uint16_t load16(uint64_t gpa)
{
    return __atomic_load_n((const uint16_t *)gpa, __ATOMIC_ACQUIRE);
}

static void store16(uint64_t gpa, uint16_t value)
{
    __atomic_store_n((uint16_t *)gpa, value, __ATOMIC_RELEASE);
}

static void barrier(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

bool vring_setup(struct vring *r, struct vdev *dev, unsigned queue, unsigned size, uint64_t base)
{
    GUEST_ASSERT(size && size <= VRING_MAX);
    *r = (struct vring) {.dev = dev,
                         .queue = (uint16_t)queue,
                         .size = (uint16_t)size,
                         .packed = dev->accepted & VF_PACKED,
                         .event_idx = dev->accepted & VF_EVENT_IDX,
                         .desc = base,
                         .driver = base + 16 * size,
                         .doorbell = dev->notify,
                         .wrap = true,
                         .seen_wrap = true,
                         .free = (uint16_t)size};
    r->device = (r->driver + 6 + 2 * size + 3) & ~3ul;
    for (unsigned i = 0; i < size; i++)
        r->link[i] = (uint16_t)(i + 1);
    memset((void *)base, 0, VRING_BYTES(size));
    vring_interrupts(r, false);
    vreg_write(dev, VR_QUEUE_SEL, queue);
    if (vreg_read(dev, VR_QUEUE_MAX) < size)
        return false;
    vreg_write(dev, VR_QUEUE_SIZE, size);
    vreg_write(dev, VR_DESC, r->desc);
    vreg_write(dev, VR_DRIVER, r->driver);
    vreg_write(dev, VR_DEVICE, r->device);
    if (dev->transport->pci) {
        if (dev->msix)
            store(dev->regs + PCI_MSIX_QUEUE, 2, 0);
        r->doorbell += load(dev->regs + PCI_NOTIFY_OFF, 2) * dev->notify_step;
    }
    vreg_write(dev, VR_READY, 1);
    return vreg_read(dev, VR_READY) == 1;
}

// --- descriptors

void vdesc_write(bool packed, uint64_t table, unsigned i, uint64_t gpa, uint32_t len,
                 uint16_t flags, uint16_t extra)
{
    volatile uint64_t *d = (volatile uint64_t *)(table + 16ul * i);
    d[0] = gpa;
    *(volatile uint32_t *)&d[1] = len;
    volatile uint16_t *tail = (volatile uint16_t *)d + 6;
    tail[packed ? 0 : 1] = extra;
    __atomic_store_n(&tail[packed ? 1 : 0], flags,
                     __ATOMIC_RELEASE); // what makes a packed one live
}

static bool passes_end(const struct vring *r, unsigned ahead)
{
    return r->next + ahead >= r->size;
}

uint16_t vring_avail_flags(const struct vring *r, unsigned ahead)
{
    return r->wrap != passes_end(r, ahead) ? VD_AVAIL : VD_USED;
}

void vring_publish(struct vring *r, uint16_t index, uint16_t head, uint16_t avail_idx)
{
    store16(r->driver + 4 + 2 * (index % r->size), head);
    store16(r->driver + 2, avail_idx);
}

static uint16_t flags_of(const struct vbuf *b, bool more)
{
    return (uint16_t)((b->in ? VD_WRITE : 0) | (more ? VD_NEXT : 0));
}

static int packed_add(struct vring *r, const struct vbuf *bufs, unsigned n, uint16_t indirect)
{
    uint16_t id = r->free_head;
    r->free_head = r->link[id];
    for (unsigned i = n; i--;) { // the first one last: it makes the chain available
        unsigned at = (r->next + i) % r->size;
        vdesc_write(true, r->desc, at, bufs[i].gpa, bufs[i].len,
                    flags_of(&bufs[i], i + 1 < n) | indirect | vring_avail_flags(r, i), id);
    }
    r->wrap = r->wrap != passes_end(r, n);
    r->next = (uint16_t)((r->next + n) % r->size);
    return id;
}

static int split_add(struct vring *r, const struct vbuf *bufs, unsigned n, uint16_t indirect)
{
    uint16_t head = r->free_head, at = head;
    for (unsigned i = 0; i < n; i++) {
        vdesc_write(false, r->desc, at, bufs[i].gpa, bufs[i].len,
                    flags_of(&bufs[i], i + 1 < n) | indirect, r->link[at]);
        r->free_head = at = r->link[at];
    }
    r->next++;
    vring_publish(r, (uint16_t)(r->next - 1), head, r->next);
    return head;
}

int vring_add(struct vring *r, const struct vbuf *bufs, unsigned n, uint64_t table)
{
    unsigned slots = table ? 1 : n;
    if (!n || slots > r->free)
        return -1;
    for (unsigned i = 0; table && i < n; i++)
        vdesc_write(r->packed, table, i, bufs[i].gpa, bufs[i].len,
                    flags_of(&bufs[i], !r->packed && i + 1 < n), (uint16_t)(i + 1));
    const struct vbuf whole = {table, 16 * n, false};
    const struct vbuf *list = table ? &whole : bufs;
    r->free = (uint16_t)(r->free - slots);
    r->pending = (uint16_t)(r->pending + (r->packed ? slots : 1));
    int id = r->packed ? packed_add(r, list, slots, table ? VD_INDIRECT : 0)
                       : split_add(r, list, slots, table ? VD_INDIRECT : 0);
    r->slots[id] = (uint16_t)slots;
    return id;
}

void vring_doorbell(struct vring *r)
{
    barrier();
    r->pending = 0;
    if (r->dev->transport->pci)
        store(r->doorbell, 2, r->queue);
    else
        mmio_write32(r->doorbell, r->queue);
}

// Whether the device waits for an entry among those added since the last doorbell (2.7.10, 2.8.10).
static bool device_waits(const struct vring *r)
{
    if (!r->packed && !r->event_idx)
        return !(load16(r->device) & 1);
    if (!r->packed) {
        uint16_t event = load16(r->device + 4 + 8 * r->size);
        return (uint16_t)(r->next - event - 1) < r->pending;
    }
    uint16_t flags = load16(r->device + 2) & 3;
    if (flags != 2)
        return flags != 1;
    uint16_t event = load16(r->device);
    uint16_t at = event & 0x7fff;
    if (event >> 15 != r->wrap)
        at = (uint16_t)(at - r->size);
    return (uint16_t)(r->next - at - 1) < r->pending;
}

bool vring_kick(struct vring *r)
{
    barrier();
    bool waits = device_waits(r);
    if (waits)
        vring_doorbell(r);
    r->pending = 0;
    return waits;
}

// --- what comes back

static bool packed_used(struct vring *r, uint32_t *id, uint32_t *len)
{
    uint64_t d = r->desc + 16ul * r->seen;
    uint16_t flags = load16(d + 14);
    if (!!(flags & VD_AVAIL) != r->seen_wrap || !!(flags & VD_USED) != r->seen_wrap)
        return false;
    *len = *(volatile uint32_t *)(d + 8);
    *id = *(volatile uint16_t *)(d + 12);
    GUEST_ASSERT(*id < r->size);
    unsigned next = r->seen + r->slots[*id];
    r->seen_wrap = r->seen_wrap != (next >= r->size);
    r->seen = (uint16_t)(next >= r->size ? next - r->size : next);
    r->link[*id] = r->free_head;
    r->free_head = (uint16_t)*id;
    return true;
}

static bool split_used(struct vring *r, uint32_t *id, uint32_t *len)
{
    if (load16(r->device + 2) == r->seen)
        return false;
    uint64_t e = r->device + 4 + 8ul * (r->seen % r->size);
    *id = *(volatile uint32_t *)e;
    *len = *(volatile uint32_t *)(e + 4);
    GUEST_ASSERT(*id < r->size);
    r->seen++;
    uint16_t last = (uint16_t)*id;
    for (unsigned n = r->slots[*id]; n > 1; n--)
        last = r->link[last];
    r->link[last] = r->free_head;
    r->free_head = (uint16_t)*id;
    return true;
}

bool vring_used(struct vring *r, uint32_t *id, uint32_t *len)
{
    if (!(r->packed ? packed_used(r, id, len) : split_used(r, id, len)))
        return false;
    r->free = (uint16_t)(r->free + r->slots[*id]);
    return true;
}

bool vring_wait(struct vring *r, uint32_t *id, uint32_t *len)
{
    uint64_t end = rdtsc() + VIRTIO_WAIT_CYCLES;
    while (!vring_used(r, id, len)) {
        if (rdtsc() > end)
            return false;
        pause();
    }
    return true;
}

void vring_interrupts(struct vring *r, bool on)
{
    if (r->packed) {
        uint16_t event = (uint16_t)(r->seen | (r->seen_wrap ? 1 << 15 : 0));
        store16(r->driver, event);
        store16(r->driver + 2, !on ? 1 : r->event_idx ? 2 : 0);
    } else if (r->event_idx) { // half the numbers away: none for long
        store16(r->driver + 4 + 2 * r->size, (uint16_t)(on ? r->seen : r->seen - 0x8000));
    } else {
        store16(r->driver, !on);
    }
    barrier();
}

// --- interrupts

bool virtio_irq(struct vdev *dev, unsigned vector)
{
    if (!dev->transport->pci) {
        ioapic_route_gsi(dev->gsi, vector, cpu_self()->apic_id);
        return true;
    }
    if (!dev->msix)
        return false;
    mmio_write32(dev->msix, LAPIC_GPA | cpu_self()->apic_id << 12);
    mmio_write32(dev->msix + 4, 0);
    mmio_write32(dev->msix + 8, vector);
    mmio_write32(dev->msix + 12, 0); // unmasked
    store(dev->regs + PCI_MSIX_CONFIG, 2, 0);
    return true;
}
