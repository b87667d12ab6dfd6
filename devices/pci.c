// SPDX-License-Identifier: Apache-2.0
#include "devices/pci.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "vmm/layout.h"
#include "vmm/msi.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { STATUS_CAPABILITIES = 1 << 4 };
enum { ECAM_FUNCTION_LEN = 4096, FUNCTIONS = 8 }; // bytes of a function in ECAM; of a slot
enum { ADDRESS_ENABLE = 1u << 31, PORTS = 8 };

// An id that systems know as a host bridge without anything particular.
static const struct pci_identity bridge_id = {.vendor = 0x1b36,
                                              .device = 0x0008,
                                              .subvendor = 0x1af4,
                                              .subdevice = 0x1100,
                                              .class = 0x060000};

struct window { // where a function decodes; len 0 = nowhere
    uint64_t base;
    uint32_t len;
};

struct pci_host {
    struct device dev; // first
    const struct pci_wiring *wiring;
    struct pci_function bridge;
    pthread_mutex_t bridge_lock;
    struct pci_function *functions[PCI_SLOTS]; // fixed while vCPUs run
    // One 32-bit register for all vCPUs, as on real machines: guests serialize themselves.
    _Atomic uint32_t address;
    uint32_t saved_address;
    pthread_mutex_t map_lock; // innermost; guards `map`
    struct window map[PCI_SLOTS];
};

_Static_assert(LAYOUT_PCI_MMIO + (uint64_t)PCI_SLOTS * PCI_WINDOW_MAX <= LAYOUT_PCI_END,
               "the windows fit");
_Static_assert(LAYOUT_ECAM_END - LAYOUT_ECAM == PCI_SLOTS * FUNCTIONS * ECAM_FUNCTION_LEN,
               "one bus");

static uint32_t config32(const struct pci_function *f, unsigned offset)
{
    uint32_t value;
    memcpy(&value, f->config + offset, sizeof(value));
    return value;
}

// --- functions

static void put(uint8_t *config, unsigned offset, uint32_t value, unsigned size)
{
    memcpy(config + offset, &value, size); // x86 is little endian, and so is PCI
}

void pci_function_init(struct pci_function *f, const struct pci_function_ops *ops,
                       pthread_mutex_t *lock, const struct pci_identity *id, uint32_t window)
{
    *f = (struct pci_function) {
        .ops = ops, .lock = lock, .window = window, .caps_end = PCI_HEADER_LEN};
    put(f->initial, PCI_VENDOR, id->vendor, 2);
    put(f->initial, PCI_DEVICE, id->device, 2);
    put(f->initial, PCI_REVISION, id->revision, 1);
    put(f->initial, PCI_CLASS, id->class, 3);
    put(f->initial, PCI_SUBVENDOR, id->subvendor, 2);
    put(f->initial, PCI_SUBDEVICE, id->subdevice, 2);
    if (!window)
        return;
    put(f->writable, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    put(f->writable, PCI_BAR0, ~(window - 1), 4); // the bits that never change tell its size
}

unsigned pci_capability_add(struct pci_function *f, uint8_t id, const void *body,
                            const void *writable, unsigned len)
{
    unsigned at = f->caps_end, last = PCI_CAPABILITIES;
    while (f->initial[last])
        last = f->initial[last] + 1u;
    memcpy(f->initial + at, body, len);
    if (writable)
        memcpy(f->writable + at, writable, len);
    f->initial[last] = (uint8_t)at;
    f->initial[at] = id;
    f->initial[at + 1] = 0;
    f->writable[at] = f->writable[at + 1] = 0;
    put(f->initial, PCI_STATUS, STATUS_CAPABILITIES, 2);
    f->caps_end = (at + len + 3) & ~3u;
    return at;
}

// Where the guest wants the window, if the bridge forwards that.
static uint64_t decoded_base(const struct pci_function *f)
{
    uint64_t base = config32(f, PCI_BAR0);
    bool forwarded = f->window && config32(f, PCI_COMMAND) & PCI_COMMAND_MEMORY &&
                     base >= LAYOUT_PCI_MMIO && range_within(base, f->window, LAYOUT_PCI_END);
    return forwarded ? base : 0;
}

// The window decodes at `base` from now on; 0 = nowhere.
static void window_move(struct pci_function *f, uint64_t base)
{
    uint64_t old = f->base;
    if (base == old)
        return;
    f->base = base;
    if (f->host) {
        pthread_mutex_lock(&f->host->map_lock);
        f->host->map[f->slot] = (struct window) {base, base ? f->window : 0};
        pthread_mutex_unlock(&f->host->map_lock);
    }
    if (f->ops->moved)
        f->ops->moved(f, old);
}

int pci_function_add(struct pci_host *host, struct pci_function *f, unsigned slot,
                     struct error *err)
{
    if (slot >= PCI_SLOTS)
        return error_set(err, -EINVAL, "PCI slot %u: the last is %d", slot, PCI_SLOTS - 1);
    if (host->functions[slot])
        return error_set(err, -EEXIST, "PCI slot %u is taken", slot);
    f->host = host;
    f->slot = slot;
    if (f->window)
        put(f->initial, PCI_BAR0, LAYOUT_PCI_MMIO + slot * PCI_WINDOW_MAX, 4);
    memcpy(f->config, f->initial, sizeof(f->config));
    host->functions[slot] = f;
    return 0;
}

void pci_function_remove(struct pci_function *f)
{
    if (!f->ops)
        return; // never made
    window_move(f, 0);
    if (f->host)
        f->host->functions[f->slot] = NULL;
    f->host = NULL;
}

void pci_function_reset(struct pci_function *f)
{
    memcpy(f->config, f->initial, sizeof(f->config));
    window_move(f, decoded_base(f));
    if (f->ops->reset)
        f->ops->reset(f);
}

int pci_function_loaded(struct pci_function *f, struct error *err)
{
    for (unsigned i = 0; i < PCI_CONFIG_LEN; i++) {
        uint8_t differs = (uint8_t)((f->config[i] ^ f->initial[i]) & ~f->writable[i]);
        if (!differs)
            continue;
        uint8_t saved = f->config[i];
        pci_function_reset(f);
        return error_set(err, -EINVAL,
                         "PCI slot %u was saved with 0x%02x at 0x%02x of its configuration, here "
                         "it is 0x%02x",
                         f->slot, saved, i, f->initial[i]);
    }
    window_move(f, decoded_base(f));
    return 0;
}

// --- configuration space

// Accesses stay within an aligned group of four bytes, as on the bus.
static bool config_access_good(unsigned offset, unsigned size)
{
    return size <= 4 && offset % 4 + size <= 4 && offset < PCI_CONFIG_LEN;
}

static uint64_t ones(unsigned size)
{
    return size >= 8 ? ~0ull : (1ull << 8 * size) - 1;
}

// `f` NULL: nothing there, which reads as all ones. What lies behind the 256 bytes of a function
// reads as zeroes: no extended capabilities.
static uint64_t config_read(struct pci_function *f, unsigned offset, unsigned size)
{
    if (!f)
        return ones(size);
    if (!config_access_good(offset, size))
        return 0;
    uint32_t value = 0;
    pthread_mutex_lock(f->lock);
    if (f->ops->config_touched)
        f->ops->config_touched(f, offset, size, false);
    memcpy(&value, f->config + offset, size);
    pthread_mutex_unlock(f->lock);
    return value;
}

static void config_write(struct pci_function *f, unsigned offset, unsigned size, uint64_t value)
{
    if (!f || !config_access_good(offset, size))
        return;
    pthread_mutex_lock(f->lock);
    for (unsigned i = offset; i < offset + size; i++, value >>= 8)
        f->config[i] =
            (uint8_t)((f->config[i] & ~f->writable[i]) | ((uint8_t)value & f->writable[i]));
    window_move(f, decoded_base(f));
    if (f->ops->config_touched)
        f->ops->config_touched(f, offset, size, true);
    pthread_mutex_unlock(f->lock);
}

// `number`: bus, slot and function as one. One bus, function 0 only.
static struct pci_function *function_find(const struct pci_host *host, unsigned number)
{
    unsigned slot = number / FUNCTIONS;
    return slot < PCI_SLOTS && number % FUNCTIONS == 0 ? host->functions[slot] : NULL;
}

static uint64_t ecam_read(void *dev, uint64_t offset, unsigned size)
{
    return config_read(function_find(dev, (unsigned)(offset / ECAM_FUNCTION_LEN)),
                       (unsigned)(offset % ECAM_FUNCTION_LEN), size);
}

static void ecam_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    config_write(function_find(dev, (unsigned)(offset / ECAM_FUNCTION_LEN)),
                 (unsigned)(offset % ECAM_FUNCTION_LEN), size, value);
}

static const struct bus_ops ecam_ops = {ecam_read, ecam_write};

// Ports: at 0 the address (32-bit accesses only), at 4 the data.

static struct pci_function *port_function(const struct pci_host *host, uint32_t address)
{
    return address & ADDRESS_ENABLE ? function_find(host, address >> 8 & 0xffff) : NULL;
}

static uint64_t port_read(void *dev, uint64_t offset, unsigned size)
{
    struct pci_host *host = dev;
    uint32_t address = host->address;
    if (offset < 4)
        return !offset && size == 4 ? address : ones(size);
    return config_read(port_function(host, address), (address & 0xfc) + (unsigned)offset - 4, size);
}

static void port_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct pci_host *host = dev;
    uint32_t address = host->address;
    if (offset >= 4)
        config_write(port_function(host, address), (address & 0xfc) + (unsigned)offset - 4, size,
                     value);
    else if (!offset && size == 4)
        host->address = (uint32_t)value & ~3u;
}

static const struct bus_ops port_ops = {port_read, port_write};

// --- windows

// The function that answers [addr, addr + size), and where in its window that is.
static struct pci_function *window_find(struct pci_host *host, uint64_t addr, unsigned size,
                                        uint64_t *offset)
{
    struct pci_function *f = NULL;
    pthread_mutex_lock(&host->map_lock);
    for (unsigned slot = 0; slot < PCI_SLOTS && !f; slot++) {
        const struct window *w = &host->map[slot];
        *offset = addr - w->base;
        if (addr >= w->base && range_within(*offset, size, w->len))
            f = host->functions[slot];
    }
    pthread_mutex_unlock(&host->map_lock);
    return f;
}

// A window that moves meanwhile is as one that moved afterwards.
static uint64_t mmio_read(void *dev, uint64_t offset, unsigned size)
{
    struct pci_function *f = window_find(dev, LAYOUT_PCI_MMIO + offset, size, &offset);
    if (!f)
        return ones(size);
    pthread_mutex_lock(f->lock);
    uint64_t value = f->ops->read(f, offset, size);
    pthread_mutex_unlock(f->lock);
    return value;
}

static void mmio_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    struct pci_function *f = window_find(dev, LAYOUT_PCI_MMIO + offset, size, &offset);
    if (!f)
        return;
    pthread_mutex_lock(f->lock);
    f->ops->write(f, offset, size, value);
    pthread_mutex_unlock(f->lock);
}

static const struct bus_ops mmio_ops = {mmio_read, mmio_write};

// --- the bridge as a device

static int kvm_doorbell(struct vm *vm, uint64_t addr, int event_fd, bool add, struct error *err)
{
    return vm_ioeventfd(vm, false, addr, 0, event_fd, add, err);
}

static int kvm_irqfd(struct vm *vm, unsigned gsi, int event_fd, bool add, struct error *err)
{
    return add ? vm_irqfd(vm, gsi, event_fd, -1, err) : vm_irqfd_remove(vm, gsi, event_fd, err);
}

static const struct pci_wiring kvm_wiring = {kvm_doorbell, kvm_irqfd, vm_msi_route};
static const struct pci_function_ops bridge_ops = {0};

struct pci_host *pci_host_of(struct device *dev)
{
    return container_of(dev, struct pci_host, dev);
}

const struct pci_wiring *pci_host_wiring(const struct pci_host *host)
{
    return host->wiring;
}

static int host_realize(struct device *dev, const void *config, struct error *err)
{
    struct pci_host *host = pci_host_of(dev);
    const struct pci_host_config *c = config;
    host->wiring = c && c->wiring ? c->wiring : &kvm_wiring;
    pthread_mutex_init(&host->map_lock, NULL);
    pthread_mutex_init(&host->bridge_lock, NULL);
    pci_function_init(&host->bridge, &bridge_ops, &host->bridge_lock, &bridge_id, 0);
    const struct bus_range ecam = {
        LAYOUT_ECAM, LAYOUT_ECAM_END - LAYOUT_ECAM, "pci-config", &ecam_ops, host, NULL};
    const struct bus_range ports = {PORT_PCI, PORTS, "pci-config", &port_ops, host, NULL};
    const struct bus_range memory = {
        LAYOUT_PCI_MMIO, LAYOUT_PCI_END - LAYOUT_PCI_MMIO, "pci-memory", &mmio_ops, host, NULL};
    int ret = pci_function_add(host, &host->bridge, 0, err);
    if (!ret)
        ret = bus_add(&dev->vm->mmio, &ecam, err);
    if (!ret)
        ret = bus_add(&dev->vm->pio, &ports, err);
    return ret ? ret : bus_add(&dev->vm->mmio, &memory, err);
}

static void host_unrealize(struct device *dev)
{
    struct pci_host *host = pci_host_of(dev);
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) // those whose devices outlive the bridge
        if (host->functions[slot])
            host->functions[slot]->host = NULL;
    pthread_mutex_destroy(&host->bridge_lock);
    pthread_mutex_destroy(&host->map_lock);
}

static void host_reset(struct device *dev)
{
    struct pci_host *host = pci_host_of(dev);
    host->address = 0;
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        struct pci_function *f = host->functions[slot];
        if (!f)
            continue;
        pthread_mutex_lock(f->lock);
        pci_function_reset(f);
        pthread_mutex_unlock(f->lock);
    }
}

static int host_save(void *object, struct error *err)
{
    struct pci_host *host = object;
    host->saved_address = host->address;
    return 0;
}

static int host_load(void *object, uint16_t version, struct error *err)
{
    struct pci_host *host = object;
    host->address = host->saved_address & ~3u;
    return 0;
}

static const struct state_field host_fields[] = {
    STATE_FIELD_INT(struct pci_host, saved_address, 1),
};

static const struct state_table host_state = {
    .name = "pci-host",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(host_fields),
    .fields = host_fields,
    .save = host_save,
    .load = host_load,
};

const struct device_class pci_host_class = {
    .name = "pci-host",
    .size = sizeof(struct pci_host),
    .realize = host_realize,
    .reset = host_reset,
    .unrealize = host_unrealize,
    .state = &host_state,
};
