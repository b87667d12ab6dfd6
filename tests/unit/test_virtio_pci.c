// SPDX-License-Identifier: Apache-2.0
// The virtio-pci transport with a small device of our own, found and driven as a guest's driver
// does; resets that end later; state that goes out and comes back.
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <zlib.h>

#include "devices/virtio_mmio.h"
#include "devices/virtio_pci.h"
#include "tests/unit/virtio_driver.h"
#include "vmm/layout.h"
#include "vmm/msi.h"
#include "vmm/vm.h"

enum { DEVICES = 24, QUEUES = 3, QUEUE_SIZE = 16, CONFIG_LEN = 12 };
enum { RINGS = 0x100000, DATA = 0x200000 };
enum { NO_VECTOR = 0xffff, LINES = 256, DOORBELLS = 256 };

// Registers of the common configuration.
enum {
    FEATURES_SEL = 0x00,
    FEATURES = 0x04,
    DRIVER_FEATURES_SEL = 0x08,
    DRIVER_FEATURES = 0x0c,
    CONFIG_VECTOR = 0x10,
    NUM_QUEUES = 0x12,
    STATUS = 0x14,
    GENERATION = 0x15,
    QUEUE_SEL = 0x16,
    Q_SIZE = 0x18,
    Q_VECTOR = 0x1a,
    Q_ENABLE = 0x1c,
    Q_NOTIFY_OFF = 0x1e,
    Q_DESC = 0x20,
    Q_DRIVER = 0x28,
    Q_DEVICE = 0x30,
    Q_RESET = 0x3a,
};

// --- a device that gives back what it takes, 4 bytes written

struct toy {
    struct virtio v; // first
    bool busy;       // something is under way outside
    unsigned drains, resets;
    struct virtqueue_chain chain;
};

struct toy_config {
    struct virtio_attach attach; // first
    uint32_t config_len;
};

static struct toy *toy_of(struct virtio *v)
{
    return container_of(v, struct toy, v);
}

static bool toy_run(struct virtio *v, unsigned queue)
{
    struct toy *t = toy_of(v);
    while (virtio_next(v, queue, &t->chain)) {
        uint32_t value = 0x600d0000 + queue;
        virtio_push(v, queue, &t->chain,
                    (uint32_t)chain_write(&v->dev.vm->ram, &t->chain, 0, &value, sizeof(value)));
    }
    virtio_signal(v, queue);
    return true;
}

static void toy_drain(struct virtio *v)
{
    toy_of(v)->drains++;
    toy_of(v)->busy = false;
}

static bool toy_idle(struct virtio *v)
{
    return !toy_of(v)->busy;
}

static void toy_reset(struct virtio *v)
{
    ck_assert(!toy_of(v)->busy);
    toy_of(v)->resets++;
}

static void toy_config_write(struct virtio *v, uint32_t offset, unsigned size, uint64_t value)
{
    ck_assert(range_within(offset, size, v->config_len));
    memcpy(v->config + offset, &value, size);
}

static const struct virtio_ops toy_ops = {.id = VIRTIO_ID_VSOCK,
                                          .run = toy_run,
                                          .drain = toy_drain,
                                          .idle = toy_idle,
                                          .reset = toy_reset,
                                          .config_write = toy_config_write};

static int toy_realize(struct device *dev, const void *config, struct error *err)
{
    struct toy *t = container_of(dev, struct toy, v.dev);
    const struct toy_config *c = config;
    const struct virtio_setup setup = {.ops = &toy_ops,
                                       .attach = &c->attach,
                                       .features = 1,
                                       .nr_queues = QUEUES,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = c->config_len};
    for (unsigned i = 0; i < c->config_len; i++)
        t->v.config[i] = (uint8_t)(i + 1);
    return virtio_realize(&t->v, &setup, err);
}

static void toy_unrealize(struct device *dev)
{
    virtio_unrealize(container_of(dev, struct virtio, dev));
}

static const struct state_field toy_fields[] = {VIRTIO_STATE_FIELDS(struct toy)};
static const struct state_table toy_state = {.name = "toy",
                                             .version = 1,
                                             .oldest = 1,
                                             .nr_fields = ARRAY_SIZE(toy_fields),
                                             .fields = toy_fields,
                                             .save = virtio_save,
                                             .load = virtio_load};
static const struct device_class toy_class = {.name = "toy",
                                              .size = sizeof(struct toy),
                                              .realize = toy_realize,
                                              .reset = virtio_device_reset,
                                              .quiesce = virtio_quiesce,
                                              .resume = virtio_resume,
                                              .unrealize = toy_unrealize,
                                              .state = &toy_state};

// --- a machine

struct rig {
    struct vm vm;
    struct pci_host *host;
    struct toy *toys[DEVICES];
    uint64_t doorbells[DOORBELLS]; // addresses that KVM would catch; 0 = free
    bool no_doorbells;
    int irqfds[LINES];
    struct {
        uint64_t address;
        uint32_t data;
    } routes[LINES];
    struct driver d;
};

static struct rig *rig_of(struct vm *vm)
{
    return container_of(vm, struct rig, vm);
}

static unsigned doorbells_at(const struct rig *r, uint64_t addr)
{
    unsigned n = 0;
    for (unsigned i = 0; i < DOORBELLS; i++)
        n += r->doorbells[i] == addr;
    return n;
}

static int rig_doorbell(struct vm *vm, uint64_t addr, int fd, bool add, struct error *err)
{
    struct rig *r = rig_of(vm);
    if (add && (r->no_doorbells || doorbells_at(r, addr)))
        return error_set(err, -EEXIST, "as KVM does");
    ck_assert(add || doorbells_at(r, addr) == 1);
    for (unsigned i = 0; i < DOORBELLS; i++)
        if (r->doorbells[i] == (add ? 0 : addr)) {
            r->doorbells[i] = add ? addr : 0;
            return 0;
        }
    ck_abort_msg("too many doorbells");
    return -ENOSPC;
}

static int rig_irqfd(struct vm *vm, unsigned gsi, int fd, bool add, struct error *err)
{
    ck_assert_uint_ge(gsi, GSI_MAX);
    ck_assert_uint_lt(gsi, LINES);
    ck_assert_int_eq(rig_of(vm)->irqfds[gsi], add ? -1 : fd);
    rig_of(vm)->irqfds[gsi] = add ? fd : -1;
    return 0;
}

static int rig_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data,
                     struct error *err)
{
    rig_of(vm)->routes[gsi].address = address;
    rig_of(vm)->routes[gsi].data = data;
    return 0;
}

static const struct pci_wiring wiring = {rig_doorbell, rig_irqfd, rig_route};

static struct rig *rig_bare(void)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    struct ram_config ram = {.size = 16 * MiB};
    ck_assert_msg(!ram_create(&r->vm.ram, &ram, &err), "%s", err.text);
    ck_assert_msg(!loop_create(&r->vm.loop, &err), "%s", err.text);
    r->vm.mmio.name = "mmio";
    r->vm.pio.name = "port";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    for (unsigned i = 0; i < LINES; i++)
        r->irqfds[i] = -1;
    return r;
}

static struct toy *toy_add(struct rig *r, const struct virtio_attach *attach, uint32_t config_len)
{
    struct error err = {0};
    struct device *dev;
    const struct toy_config config = {.attach = *attach, .config_len = config_len};
    ck_assert_msg(!device_add(&r->vm, &toy_class, &config, &dev, &err), "%s", err.text);
    toy_class.resume(dev);
    return container_of(dev, struct toy, v.dev);
}

static struct rig *rig_new(unsigned devices)
{
    struct rig *r = rig_bare();
    struct error err = {0};
    struct device *host;
    const struct pci_host_config config = {&wiring};
    ck_assert_msg(!device_add(&r->vm, &pci_host_class, &config, &host, &err), "%s", err.text);
    r->host = pci_host_of(host);
    for (unsigned i = 0; i < devices; i++) {
        const struct virtio_pci_place place = {r->host, i + 1};
        r->toys[i] = toy_add(
            r, &(struct virtio_attach) {.transport = &virtio_pci_transport, .place = &place},
            i ? CONFIG_LEN : 0);
    }
    return r;
}

static void devices_free(struct rig *r)
{
    while (r->vm.devices) {
        struct device *dev = r->vm.devices;
        r->vm.devices = dev->next;
        dev->class->unrealize(dev);
        free(dev);
    }
}

static void rig_free(struct rig *r)
{
    struct error err = {0};
    devices_free(r);
    // The VM lives on, so nothing of the devices stays behind in KVM.
    for (unsigned i = 0; i < LINES; i++)
        ck_assert_int_eq(r->irqfds[i], -1);
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS);
    for (unsigned i = 0; i < 4; i++)
        loop_turn(r->vm.loop, false, &err);
    loop_destroy(r->vm.loop);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    bus_free(&r->vm.pio);
    msi_routes_free(r->vm.msi);
    ram_destroy(&r->vm.ram);
    free(r);
}

static uint64_t get(struct rig *r, uint64_t addr, unsigned size)
{
    uint64_t value;
    bus_read(&r->vm.mmio, addr, size, &value);
    return value;
}

static void set(struct rig *r, uint64_t addr, unsigned size, uint64_t value)
{
    bus_write(&r->vm.mmio, addr, size, value);
}

static uint64_t ecam(unsigned slot, unsigned reg)
{
    return LAYOUT_ECAM + slot * 0x8000ull + reg;
}

static void turn(struct rig *r)
{
    for (unsigned i = 0; i < 4; i++)
        loop_turn(r->vm.loop, false, NULL);
}

// --- a driver: what it found of one function

struct part {
    unsigned cap; // in configuration space; 0: not there
    uint64_t addr;
    uint32_t offset, len;
};

struct function {
    struct rig *r;
    unsigned slot;
    struct part parts[6]; // by type; [0] unused
    uint32_t multiplier;
    unsigned msix;
    uint64_t table, pending;
};

static void function_find(struct function *f, struct rig *r, unsigned slot)
{
    *f = (struct function) {.r = r, .slot = slot};
    uint64_t bar = get(r, ecam(slot, PCI_BAR0), 4);
    ck_assert(get(r, ecam(slot, PCI_STATUS), 2) & 1 << 4);
    unsigned cap = (unsigned)get(r, ecam(slot, PCI_CAPABILITIES), 1), seen = 0;
    for (; cap; cap = (unsigned)get(r, ecam(slot, cap + 1), 1)) {
        ck_assert_uint_lt(seen++, 16);
        ck_assert(cap >= PCI_HEADER_LEN && cap % 4 == 0);
        if (get(r, ecam(slot, cap), 1) == PCI_CAP_MSIX) {
            f->msix = cap;
            f->table = bar + get(r, ecam(slot, cap + 4), 4); // BAR 0
            f->pending = bar + get(r, ecam(slot, cap + 8), 4);
            continue;
        }
        ck_assert_uint_eq(get(r, ecam(slot, cap), 1), PCI_CAP_VENDOR);
        unsigned type = (unsigned)get(r, ecam(slot, cap + 3), 1);
        ck_assert(type >= 1 && type <= 5);
        ck_assert_uint_eq(get(r, ecam(slot, cap + 4), 1), 0);
        struct part *p = &f->parts[type];
        ck_assert_uint_eq(p->cap, 0);
        p->cap = cap;
        p->offset = (uint32_t)get(r, ecam(slot, cap + 8), 4);
        p->len = (uint32_t)get(r, ecam(slot, cap + 12), 4);
        p->addr = bar + p->offset;
        if (type == 2)
            f->multiplier = (uint32_t)get(r, ecam(slot, cap + 16), 4);
    }
    set(r, ecam(slot, PCI_COMMAND), 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
}

static uint64_t reg(const struct function *f, unsigned offset, unsigned size)
{
    return get(f->r, f->parts[1].addr + offset, size);
}

static void reg_set(const struct function *f, unsigned offset, unsigned size, uint64_t value)
{
    set(f->r, f->parts[1].addr + offset, size, value);
}

static void vectors_on(const struct function *f)
{
    for (unsigned i = 0; i <= QUEUES; i++) {
        set(f->r, f->table + 16ull * i, 4, 0xfee00000);
        set(f->r, f->table + 16ull * i + 8, 4, 0x40 + i);
        set(f->r, f->table + 16ull * i + 12, 4, 0);
    }
    set(f->r, ecam(f->slot, f->msix + 2), 2, 1 << 15);
}

static void negotiate(const struct function *f)
{
    reg_set(f, STATUS, 1, 0);
    reg_set(f, STATUS, 1, 1);
    reg_set(f, STATUS, 1, 3);
    for (unsigned half = 0; half < 2; half++) {
        reg_set(f, FEATURES_SEL, 4, half);
        uint32_t offered = (uint32_t)reg(f, FEATURES, 4);
        reg_set(f, DRIVER_FEATURES_SEL, 4, half);
        reg_set(f, DRIVER_FEATURES, 4, half ? 1 : 0); // VERSION_1
        ck_assert_uint_eq(reg(f, DRIVER_FEATURES, 4), half ? 1 : 0);
        ck_assert(offered & 1);
    }
    reg_set(f, STATUS, 1, 11);
    ck_assert_uint_eq(reg(f, STATUS, 1), 11);
}

static void address_set(const struct function *f, unsigned offset, uint64_t gpa)
{
    reg_set(f, offset, 4, (uint32_t)gpa);
    reg_set(f, offset + 4, 4, gpa >> 32);
}

static void queue_up(const struct function *f, unsigned queue, const struct driver *d)
{
    reg_set(f, QUEUE_SEL, 2, queue);
    ck_assert_uint_eq(reg(f, Q_SIZE, 2), QUEUE_SIZE);
    reg_set(f, Q_SIZE, 2, d->size);
    address_set(f, Q_DESC, d->desc);
    address_set(f, Q_DRIVER, d->avail);
    address_set(f, Q_DEVICE, d->used);
    reg_set(f, Q_VECTOR, 2, queue + 1);
    ck_assert_uint_eq(reg(f, Q_VECTOR, 2), queue + 1);
    reg_set(f, Q_ENABLE, 2, 1);
    ck_assert_uint_eq(reg(f, Q_ENABLE, 2), 1);
}

static unsigned gsi_of(const struct function *f, unsigned vector)
{
    return GSI_MAX + (f->slot - 1) * (QUEUES + 1) + vector;
}

static bool sent(const struct function *f, unsigned vector)
{
    uint64_t count;
    return read(f->r->irqfds[gsi_of(f, vector)], &count, sizeof(count)) == sizeof(count);
}

static void kick(const struct function *f, unsigned queue)
{
    reg_set(f, QUEUE_SEL, 2, queue);
    uint64_t off = reg(f, Q_NOTIFY_OFF, 2);
    set(f->r, f->parts[2].addr + off * f->multiplier, 2, queue);
    turn(f->r);
}

static bool used(struct rig *r, unsigned queue)
{
    unsigned id;
    uint32_t len, value;
    if (!driver_used(&r->d, &id, &len))
        return false;
    memcpy(&value, ram_at(&r->vm.ram, DATA, 4), 4);
    memset(ram_at(&r->vm.ram, DATA, 4), 0, 4);
    return len == 4 && value == 0x600d0000 + queue;
}

static void offer(struct rig *r)
{
    const struct buffer b = {DATA, 16, true};
    ck_assert_int_ge(driver_add(&r->d, &b, 1, 0), 0);
}

static void bring_up(struct function *f, struct rig *r, unsigned slot, unsigned queue)
{
    function_find(f, r, slot);
    vectors_on(f);
    driver_init(&r->d, &r->vm.ram, false, 8, RINGS);
    negotiate(f);
    reg_set(f, CONFIG_VECTOR, 2, 0);
    queue_up(f, queue, &r->d);
    reg_set(f, STATUS, 1, 15);
    turn(r);
}

// --- tests

START_TEST(identity_and_capabilities)
{
    struct rig *r = rig_new(2);
    struct function f;
    ck_assert_uint_eq(get(r, ecam(1, 0), 4), (0x1040u + VIRTIO_ID_VSOCK) << 16 | 0x1af4);
    ck_assert_uint_eq(get(r, ecam(1, PCI_REVISION), 1), 1);
    ck_assert_uint_eq(get(r, ecam(1, 0x3d), 1), 0); // no interrupt pin
    function_find(&f, r, 1);
    ck_assert(f.parts[1].len >= 0x38 && f.parts[2].cap && f.parts[3].cap && f.parts[5].cap);
    ck_assert(!f.parts[4].cap); // it has no configuration
    ck_assert(f.msix);
    ck_assert_uint_eq(get(r, ecam(1, f.msix + 2), 2) & 0x7ff, QUEUES); // vectors - 1
    ck_assert_uint_eq(reg(&f, NUM_QUEUES, 2), QUEUES);
    ck_assert_uint_ge(f.parts[2].len, f.multiplier * (QUEUES - 1) + 2);
    function_find(&f, r, 2);
    ck_assert_uint_eq(f.parts[4].len, CONFIG_LEN);
    // Common configuration is 4-, doorbells 2-, device configuration 4-aligned, 4.1.4.
    ck_assert(f.parts[1].offset % 4 == 0 && f.parts[2].offset % 2 == 0 &&
              f.parts[4].offset % 4 == 0);
    rig_free(r);
}
END_TEST

START_TEST(request_and_its_interrupt)
{
    struct rig *r = rig_new(2);
    struct function f;
    bring_up(&f, r, 2, 1);
    ck_assert_uint_eq(r->routes[gsi_of(&f, 2)].data, 0x42);
    offer(r);
    kick(&f, 1);
    ck_assert(used(r, 1));
    ck_assert(sent(&f, 2));
    for (unsigned i = 0; i <= QUEUES; i++)
        ck_assert(!sent(&f, i));
    r->toys[1]->v.config[0] = 77;
    uint64_t generation = reg(&f, GENERATION, 1);
    virtio_config_changed(&r->toys[1]->v);
    ck_assert(sent(&f, 0));
    ck_assert_uint_ne(reg(&f, GENERATION, 1), generation);
    ck_assert_uint_eq(get(r, f.parts[4].addr, 1), 77);
    // The status is there for those who ask, and a read clears it.
    ck_assert_uint_eq(get(r, f.parts[3].addr, 1), VIRTIO_ISR_CONFIG | VIRTIO_ISR_QUEUE);
    ck_assert_uint_eq(get(r, f.parts[3].addr, 1), 0);
    rig_free(r);
}
END_TEST

START_TEST(no_vector_no_interrupt)
{
    struct rig *r = rig_new(1);
    struct function f;
    bring_up(&f, r, 1, 0);
    const uint16_t bad[] = {QUEUES + 1, 0x100, NO_VECTOR};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        reg_set(&f, Q_VECTOR, 2, 0);
        reg_set(&f, Q_VECTOR, 2, bad[i]);
        ck_assert_uint_eq(reg(&f, Q_VECTOR, 2), NO_VECTOR);
        reg_set(&f, CONFIG_VECTOR, 2, 0);
        reg_set(&f, CONFIG_VECTOR, 2, bad[i]);
        ck_assert_uint_eq(reg(&f, CONFIG_VECTOR, 2), NO_VECTOR);
    }
    offer(r);
    kick(&f, 0);
    virtio_config_changed(&r->toys[0]->v);
    ck_assert(used(r, 0));
    for (unsigned i = 0; i <= QUEUES; i++)
        ck_assert(!sent(&f, i));
    reg_set(&f, Q_VECTOR, 2, 1);
    set(r, ecam(1, f.msix + 2), 2, 0); // MSI-X off: no interrupt at all
    offer(r);
    kick(&f, 0);
    ck_assert(used(r, 0));
    ck_assert(!sent(&f, 1));
    rig_free(r);
}
END_TEST

START_TEST(common_registers_by_their_width_only)
{
    struct rig *r = rig_new(1);
    struct function f;
    function_find(&f, r, 1);
    negotiate(&f);
    reg_set(&f, QUEUE_SEL, 2, 1);
    for (unsigned at = 0; at < 0x1000; at++)
        for (unsigned size = 1; size <= 8; size++) {
            bool natural = (at < 0x10 || (at >= 0x20 && at < 0x38)) ? size == 4 && at % 4 == 0
                           : at == STATUS || at == GENERATION       ? size == 1
                                                                    : size == 2 && at % 2 == 0;
            natural = natural && at < 0x38;
            if (natural)
                continue;
            if (size != 3 && size < 5)
                ck_assert_uint_eq(reg(&f, at, size), 0);
            reg_set(&f, at, size, ~0ull);
        }
    ck_assert_uint_eq(reg(&f, STATUS, 1), 11);
    ck_assert_uint_eq(reg(&f, QUEUE_SEL, 2), 1);
    ck_assert_uint_eq(reg(&f, Q_SIZE, 2), QUEUE_SIZE);
    ck_assert_uint_eq(reg(&f, Q_ENABLE, 2), 0);
    ck_assert_uint_eq(reg(&f, Q_RESET, 2), 0); // not offered
    rig_free(r);
}
END_TEST

START_TEST(queues_that_are_not_there)
{
    struct rig *r = rig_new(1);
    struct function f;
    function_find(&f, r, 1);
    negotiate(&f);
    const uint16_t bad[] = {QUEUES, VIRTIO_QUEUES_MAX, 0x7fff, 0xffff};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        reg_set(&f, QUEUE_SEL, 2, bad[i]);
        ck_assert_uint_eq(reg(&f, Q_SIZE, 2), 0);
        ck_assert_uint_eq(reg(&f, Q_VECTOR, 2), NO_VECTOR);
        reg_set(&f, Q_SIZE, 2, 8);
        reg_set(&f, Q_VECTOR, 2, 0);
        address_set(&f, Q_DESC, RINGS);
        reg_set(&f, Q_ENABLE, 2, 1);
        ck_assert_uint_eq(reg(&f, Q_VECTOR, 2), NO_VECTOR);
        ck_assert_uint_eq(reg(&f, Q_ENABLE, 2), 0);
        ck_assert_uint_eq(reg(&f, Q_DESC, 4), 0);
    }
    reg_set(&f, FEATURES_SEL, 4, 2);
    ck_assert_uint_eq(reg(&f, FEATURES, 4), 0);
    reg_set(&f, DRIVER_FEATURES_SEL, 4, 0xffffffff);
    reg_set(&f, DRIVER_FEATURES, 4, 0xffffffff);
    ck_assert_uint_eq(reg(&f, DRIVER_FEATURES, 4), 0);
    // Doorbells of queues that are not there, of any width and place.
    for (unsigned at = 0; at < 0x1000; at++)
        set(r, f.parts[2].addr + at, 1u << at % 4, ~0ull);
    turn(r);
    rig_free(r);
}
END_TEST

START_TEST(running_queue_is_frozen)
{
    struct rig *r = rig_new(1);
    struct function f;
    bring_up(&f, r, 1, 0);
    reg_set(&f, QUEUE_SEL, 2, 0);
    reg_set(&f, Q_SIZE, 2, 4);
    address_set(&f, Q_DESC, 0xdead0000);
    reg_set(&f, Q_ENABLE, 2, 0);
    ck_assert_uint_eq(reg(&f, Q_SIZE, 2), 8);
    ck_assert_uint_eq(reg(&f, Q_DESC, 4), RINGS);
    ck_assert_uint_eq(reg(&f, Q_ENABLE, 2), 1);
    offer(r);
    kick(&f, 0);
    ck_assert(used(r, 0));
    rig_free(r);
}
END_TEST

START_TEST(device_configuration_has_ends)
{
    struct rig *r = rig_new(2);
    struct function f;
    function_find(&f, r, 2);
    ck_assert_uint_eq(get(r, f.parts[4].addr, 4), 0x04030201);
    ck_assert_uint_eq(get(r, f.parts[4].addr + 4, 8), 0x0c0b0a0908070605);
    for (unsigned at = 0; at < 0x1000; at++)
        for (unsigned size = 1; size <= 8; size *= 2)
            if (at + size > CONFIG_LEN) {
                ck_assert_uint_eq(get(r, f.parts[4].addr + at, size), 0);
                set(r, f.parts[4].addr + at, size, ~0ull);
            }
    ck_assert_uint_eq(get(r, f.parts[4].addr + 8, 4), 0x0c0b0a09);
    rig_free(r);
}
END_TEST

// Access by the capability in configuration space.
static void access_set(const struct function *f, uint8_t bar, uint32_t offset, uint32_t length)
{
    uint64_t cap = ecam(f->slot, f->parts[5].cap);
    set(f->r, cap + 4, 1, bar);
    set(f->r, cap + 8, 4, offset);
    set(f->r, cap + 12, 4, length);
}

START_TEST(access_by_configuration_space)
{
    struct rig *r = rig_new(2);
    struct function f;
    function_find(&f, r, 2);
    set(r, ecam(2, PCI_COMMAND), 2, 0); // it needs no window
    uint64_t data = ecam(2, f.parts[5].cap + 16);
    access_set(&f, 0, f.parts[1].offset + STATUS, 1);
    set(r, data, 4, 1);
    set(r, data, 4, 3);
    ck_assert_uint_eq(r->toys[1]->v.status, 3);
    ck_assert_uint_eq(get(r, data, 1), 3);
    access_set(&f, 0, f.parts[4].offset, 4);
    ck_assert_uint_eq(get(r, data, 4), 0x04030201);
    ck_assert_uint_eq(get(r, data + 2, 2), 0x0403);

    static const struct {
        uint8_t bar;
        uint32_t offset, length;
    } bad[] = {{1, 0, 1},      {0xff, 0, 1},   {0, 0x2000, 0}, {0, 0x2000, 3},     {0, 0x2000, 8},
               {0, 0x2001, 2}, {0, 0x2002, 4}, {0, 0x8000, 1}, {0, 0xfffffffc, 4}, {0, 0, ~0u}};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        access_set(&f, bad[i].bar, bad[i].offset, bad[i].length);
        set(r, data, 4, 0xaabbccdd);
        ck_assert_uint_eq(get(r, data, 4), 0xaabbccdd); // nobody answered
    }
    ck_assert_uint_eq(r->toys[1]->v.status, 3);
    ck_assert_uint_eq(r->toys[1]->v.config[0], 1);
    rig_free(r);
}
END_TEST

START_TEST(doorbells_follow_the_window)
{
    struct rig *r = rig_new(2);
    struct function f;
    uint64_t there = LAYOUT_PCI_MMIO + 0x800000;
    bring_up(&f, r, 1, 2);
    for (unsigned q = 0; q < QUEUES; q++)
        ck_assert_uint_eq(doorbells_at(r, f.parts[2].addr + q * f.multiplier), 1);
    set(r, ecam(1, PCI_BAR0), 4, there);
    ck_assert_uint_eq(doorbells_at(r, there + f.parts[2].offset), 1);
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS - QUEUES);
    // Over another function: its doorbells stay its own, ours come by an exit to us.
    function_find(&f, r, 2);
    uint64_t second = f.parts[2].addr;
    set(r, ecam(1, PCI_BAR0), 4, get(r, ecam(2, PCI_BAR0), 4));
    ck_assert_uint_eq(doorbells_at(r, second), 1);
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS - QUEUES);
    r->no_doorbells = true; // as when KVM has no room
    set(r, ecam(1, PCI_BAR0), 4, there);
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS - QUEUES);
    function_find(&f, r, 1);
    offer(r);
    kick(&f, 2);
    ck_assert(used(r, 2));
    set(r, ecam(2, PCI_COMMAND), 2, 0);
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS);
    rig_free(r);
}
END_TEST

START_TEST(many_devices)
{
    struct rig *r = rig_new(DEVICES);
    struct function f;
    for (unsigned i = 0; i < DEVICES; i++) {
        bring_up(&f, r, i + 1, i % QUEUES);
        offer(r);
        kick(&f, i % QUEUES);
        ck_assert(used(r, i % QUEUES));
        ck_assert(sent(&f, i % QUEUES + 1));
        for (unsigned line = GSI_MAX; line < GSI_MAX + DEVICES * (QUEUES + 1); line++) {
            uint64_t count;
            ck_assert(read(r->irqfds[line], &count, sizeof(count)) < 0); // nobody else's
        }
    }
    ck_assert_uint_eq(doorbells_at(r, 0), DOORBELLS - DEVICES * QUEUES);
    rig_free(r);
}
END_TEST

// --- reset

START_TEST(reset_ends_when_nothing_is_under_way)
{
    struct rig *r = rig_new(1);
    struct toy *t = r->toys[0];
    struct function f;
    bring_up(&f, r, 1, 0);
    t->busy = true;
    t->drains = t->resets = 0;
    reg_set(&f, STATUS, 1, 0);
    ck_assert_uint_eq(t->drains, 0); // the vCPU did not wait
    ck_assert_uint_ne(reg(&f, STATUS, 1), 0);
    offer(r);
    kick(&f, 0);
    ck_assert(!used(r, 0)); // nothing new is taken
    reg_set(&f, STATUS, 1, 15);
    reg_set(&f, STATUS, 1, 0);
    kick(&f, 0);
    ck_assert(!used(r, 0));
    reg_set(&f, QUEUE_SEL, 2, 1); // nor set up
    reg_set(&f, Q_SIZE, 2, 4);
    address_set(&f, Q_DESC, RINGS);
    reg_set(&f, Q_ENABLE, 2, 1);
    ck_assert_uint_eq(reg(&f, Q_ENABLE, 2), 0);
    ck_assert_uint_eq(reg(&f, Q_SIZE, 2), QUEUE_SIZE);
    ck_assert_uint_ne(reg(&f, STATUS, 1), 0);
    t->busy = false;
    ck_assert_uint_eq(reg(&f, STATUS, 1), 0);
    ck_assert_uint_eq(t->resets, 1);
    ck_assert_uint_eq(reg(&f, CONFIG_VECTOR, 2), NO_VECTOR);
    ck_assert_uint_eq(reg(&f, Q_VECTOR, 2), NO_VECTOR);
    ck_assert_uint_eq(reg(&f, Q_ENABLE, 2), 0);
    bring_up(&f, r, 1, 0);
    offer(r);
    kick(&f, 0);
    ck_assert(used(r, 0));
    rig_free(r);
}
END_TEST

START_TEST(pause_ends_a_reset)
{
    struct rig *r = rig_new(1);
    struct toy *t = r->toys[0];
    struct function f;
    bring_up(&f, r, 1, 0);
    t->busy = true;
    reg_set(&f, STATUS, 1, 0);
    ck_assert(!toy_class.quiesce(&t->v.dev, NULL));
    ck_assert_uint_eq(t->drains, 1);
    ck_assert_uint_eq(t->v.status, 0);
    ck_assert(!t->v.resetting);
    toy_class.resume(&t->v.dev);
    ck_assert_uint_eq(reg(&f, STATUS, 1), 0);
    rig_free(r);
}
END_TEST

START_TEST(reset_by_mmio_waits)
{
    struct rig *r = rig_bare();
    const struct virtio_mmio_place place = {.base = LAYOUT_VIRTIO_MMIO, .gsi = GSI_VIRTIO};
    struct vm other = {.fd = -1}; // KVM refuses: an attach that fails leaves nothing behind
    struct error err = {0};
    struct toy_config config = {.attach = {.transport = &virtio_mmio_transport, .place = &place}};
    other.loop = r->vm.loop;
    other.mmio.name = "mmio";
    ck_assert_int_lt(device_add(&other, &toy_class, &config, NULL, &err), 0);
    ck_assert_uint_eq(other.mmio.nr, 0);

    struct toy *t = calloc(1, sizeof(*t)); // no driver of virtio-mmio waits for the status
    t->v.ops = &toy_ops;
    t->v.transport = &virtio_mmio_transport;
    t->v.status = 15;
    t->busy = true;
    virtio_status_write(&t->v, 0);
    ck_assert_uint_eq(t->drains, 1);
    ck_assert_uint_eq(t->v.status, 0);
    free(t);
    rig_free(r);
}
END_TEST

// --- saved state

static struct stream_mem saved(struct rig *r)
{
    struct error err = {0};
    struct stream_mem mem;
    for (struct device *d = r->vm.devices; d; d = d->next)
        if (d->class->quiesce)
            ck_assert(!d->class->quiesce(d, &err));
    stream_mem_writer(&mem, "state", 16 * MiB);
    ck_assert_msg(!state_save(&r->vm.state, &mem.stream, &err), "%s", err.text);
    return mem;
}

static int loaded(struct rig *r, struct stream_mem *mem, struct error *err)
{
    struct stream_mem in;
    stream_mem_reader(&in, "state", mem->data, mem->len);
    int ret = state_load(&r->vm.state, &in.stream, err);
    for (struct device *d = r->vm.devices; d && !ret; d = d->next)
        if (d->class->resume)
            d->class->resume(d);
    return ret;
}

START_TEST(state_moves)
{
    struct rig *a = rig_new(3), *b = rig_new(3);
    struct error err = {0};
    struct function f;
    bring_up(&f, a, 2, 1);
    uint64_t there = LAYOUT_PCI_MMIO + 0x900000;
    set(a, ecam(2, PCI_BAR0), 4, there);
    function_find(&f, a, 2);
    set(a, f.table + 16 * 3 + 12, 4, 1); // vector 3 masked, and pending
    reg_set(&f, QUEUE_SEL, 2, 2);
    reg_set(&f, Q_VECTOR, 2, 3);
    a->toys[1]->v.transport->signal(&a->toys[1]->v, 2);
    ck_assert_uint_eq(get(a, f.pending, 8), 1 << 3);
    offer(a);

    struct stream_mem mem = saved(a);
    ck_assert_msg(!loaded(b, &mem, &err), "%s", err.text);
    stream_mem_free(&mem);
    memcpy(ram_at(&b->vm.ram, RINGS, 0x4000), ram_at(&a->vm.ram, RINGS, 0x4000), 0x4000);
    b->d = a->d;
    b->d.ram = &b->vm.ram;
    f.r = b;
    ck_assert_uint_eq(get(b, ecam(2, PCI_BAR0), 4), there);
    ck_assert_uint_eq(reg(&f, STATUS, 1), 15);
    ck_assert_uint_eq(doorbells_at(b, f.parts[2].addr), 1);
    ck_assert_uint_eq(b->routes[gsi_of(&f, 2)].address, 0xfee00000);
    ck_assert_uint_eq(b->routes[gsi_of(&f, 2)].data, 0x42);
    turn(b); // resume rang
    ck_assert(used(b, 1));
    ck_assert(sent(&f, 2));
    ck_assert(!sent(&f, 3));
    ck_assert_uint_eq(get(b, f.pending, 8), 1 << 3);
    set(b, f.table + 16 * 3 + 12, 4, 0);
    ck_assert(sent(&f, 3));
    // The others are as they were.
    ck_assert_uint_eq(get(b, ecam(1, PCI_COMMAND), 2), 0);
    rig_free(a);
    rig_free(b);
}
END_TEST

START_TEST(state_of_another_machine_is_refused)
{
    struct rig *a = rig_new(2), *b = rig_new(1), *c = rig_new(2);
    struct error err = {0};
    struct stream_mem mem = saved(a);
    ck_assert_int_lt(loaded(b, &mem, &err), 0);
    stream_mem_free(&mem);
    c->toys[1]->v.status = 1;
    mem = saved(c);
    // One byte of a capability, in the copy of the configuration of slot 2.
    struct pci_identity id = {0x1af4, 0x1040 + VIRTIO_ID_VSOCK, 0, 0, 0, 0};
    unsigned found = 0;
    for (size_t i = 0; i + 4 < mem.len; i++)
        if (!memcmp(mem.data + i, &id, 4) && ++found == 3) // each has it twice
            mem.data[i + PCI_HEADER_LEN + 3] ^= 1;
    ck_assert_uint_eq(found, 4);
    uint32_t crc = (uint32_t)crc32(0, mem.data + 4, (unsigned)(mem.len - 8));
    memcpy(mem.data + mem.len - 4, &crc, 4);
    ck_assert_int_eq(loaded(a, &mem, &err), -EINVAL);
    ck_assert_msg(strstr(err.text, "slot 2"), "%s", err.text);
    stream_mem_free(&mem);
    rig_free(a);
    rig_free(b);
    rig_free(c);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("virtio_pci");
    tcase_add_test(tc, identity_and_capabilities);
    tcase_add_test(tc, request_and_its_interrupt);
    tcase_add_test(tc, no_vector_no_interrupt);
    tcase_add_test(tc, common_registers_by_their_width_only);
    tcase_add_test(tc, queues_that_are_not_there);
    tcase_add_test(tc, running_queue_is_frozen);
    tcase_add_test(tc, device_configuration_has_ends);
    tcase_add_test(tc, access_by_configuration_space);
    tcase_add_test(tc, doorbells_follow_the_window);
    tcase_add_test(tc, many_devices);
    tcase_add_test(tc, reset_ends_when_nothing_is_under_way);
    tcase_add_test(tc, pause_ends_a_reset);
    tcase_add_test(tc, reset_by_mmio_waits);
    tcase_add_test(tc, state_moves);
    tcase_add_test(tc, state_of_another_machine_is_refused);
    Suite *s = suite_create("virtio_pci");
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
