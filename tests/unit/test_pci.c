// SPDX-License-Identifier: Apache-2.0
// The PCI host bridge and MSI-X with small functions of our own: configuration space by both ways,
// sizing and moving windows, messages masked and pending, and a guest that tries everything. Guards
// taken out to see a test fail: each part of config_access_good, decoded_base, window_find,
// function_find, pci_function_loaded, the range of a vector.
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "devices/msix.h"
#include "devices/pci.h"
#include "vmm/layout.h"
#include "vmm/msi.h"
#include "vmm/util.h"
#include "vmm/vm.h"

enum { WINDOW = 0x2000, TABLE = 0x1000, PENDING = 0x1800, VECTORS = 3, FIRST = 5 };
enum { SECOND = FIRST + 1 };

struct route {
    uint64_t address;
    uint32_t data;
    unsigned times;
};

struct toy {
    struct pci_function f;
    struct msix msix;
    pthread_mutex_t lock;
    unsigned moves, touches;
    uint64_t last_offset, last_value;
};

struct rig {
    struct vm vm;
    struct pci_host *host;
    struct device *dev;
    struct toy toys[2];
    struct route routes[64]; // by line
    int irqfds[64], doorbells;
    int refuse; // what route answers
};

static struct rig *rig_of(struct vm *vm)
{
    return container_of(vm, struct rig, vm);
}

static int rig_doorbell(struct vm *vm, uint64_t addr, int fd, bool add, struct error *err)
{
    rig_of(vm)->doorbells += add ? 1 : -1;
    return 0;
}

static int rig_irqfd(struct vm *vm, unsigned gsi, int fd, bool add, struct error *err)
{
    rig_of(vm)->irqfds[gsi] = add ? fd : -1;
    return 0;
}

static int rig_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data,
                     struct error *err)
{
    struct rig *r = rig_of(vm);
    if (r->refuse)
        return error_set(err, r->refuse, "refused by the test");
    struct route *route = &r->routes[gsi];
    *route = (struct route) {address, data, route->times + 1};
    return 0;
}

static const struct pci_wiring wiring = {rig_doorbell, rig_irqfd, rig_route};

static struct toy *toy_of(struct pci_function *f)
{
    return container_of(f, struct toy, f);
}

static uint64_t toy_read(struct pci_function *f, uint64_t offset, unsigned size)
{
    ck_assert(range_within(offset, size, WINDOW));
    if (offset >= PENDING)
        return msix_pending_read(&toy_of(f)->msix, offset - PENDING, size);
    if (offset >= TABLE)
        return msix_table_read(&toy_of(f)->msix, offset - TABLE, size);
    return 0x70 + f->slot;
}

static void toy_write(struct pci_function *f, uint64_t offset, unsigned size, uint64_t value)
{
    struct toy *t = toy_of(f);
    ck_assert(range_within(offset, size, WINDOW));
    t->last_offset = offset;
    t->last_value = value;
    if (offset >= TABLE && offset < PENDING)
        msix_table_write(&t->msix, offset - TABLE, size, value);
}

static void toy_moved(struct pci_function *f, uint64_t old)
{
    toy_of(f)->moves++;
}

static void toy_touched(struct pci_function *f, unsigned offset, unsigned size, bool write)
{
    ck_assert(offset + size <= PCI_CONFIG_LEN);
    toy_of(f)->touches++;
    if (write)
        msix_config_written(&toy_of(f)->msix, offset, size);
}

static void toy_reset(struct pci_function *f)
{
    msix_reset(&toy_of(f)->msix);
}

static const struct pci_function_ops toy_ops = {toy_read, toy_write, toy_moved, toy_touched,
                                                toy_reset};

static struct rig *rig_new(void)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};
    const struct pci_host_config config = {&wiring};
    const struct pci_identity id = {0x1234, 0x5678, 0x9abc, 0xdef0, 0xff0000, 7};
    r->vm.mmio.name = "mmio";
    r->vm.pio.name = "port";
    r->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    ck_assert_msg(!device_add(&r->vm, &pci_host_class, &config, &r->dev, &err), "%s", err.text);
    r->host = pci_host_of(r->dev);
    for (unsigned i = 0; i < 2; i++) {
        struct toy *t = &r->toys[i];
        pthread_mutex_init(&t->lock, NULL);
        pci_function_init(&t->f, &toy_ops, &t->lock, &id, WINDOW);
        ck_assert(!msix_create(&t->msix, &r->vm, &wiring, &t->f, VECTORS, TABLE, PENDING, &err));
        ck_assert(!pci_function_add(r->host, &t->f, FIRST + i, &err));
    }
    return r;
}

static void rig_free(struct rig *r)
{
    for (unsigned i = 0; i < 2; i++) {
        pci_function_remove(&r->toys[i].f);
        msix_destroy(&r->toys[i].msix);
    }
    r->dev->class->unrealize(r->dev);
    free(r->dev);
    state_registry_free(&r->vm.state);
    bus_free(&r->vm.mmio);
    bus_free(&r->vm.pio);
    msi_routes_free(r->vm.msi);
    free(r);
}

static uint64_t ecam(unsigned slot, unsigned reg)
{
    return LAYOUT_ECAM + slot * 0x8000ull + reg;
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

static uint64_t port_get(struct rig *r, unsigned port, unsigned size)
{
    uint64_t value;
    bus_read(&r->vm.pio, port, size, &value);
    return value;
}

static void port_set(struct rig *r, unsigned port, unsigned size, uint64_t value)
{
    bus_write(&r->vm.pio, port, size, value);
}

static void decode(struct rig *r, unsigned slot, bool on)
{
    set(r, ecam(slot, PCI_COMMAND), 2, on ? PCI_COMMAND_MEMORY : 0);
}

static uint64_t home(unsigned slot)
{
    return LAYOUT_PCI_MMIO + slot * (uint64_t)PCI_WINDOW_MAX;
}

// --- configuration space

START_TEST(both_ways_show_the_same)
{
    struct rig *r = rig_new();
    ck_assert_uint_eq(get(r, ecam(FIRST, 0), 4), 0x56781234);
    ck_assert_uint_eq(get(r, ecam(FIRST, 0x2c), 4), 0xdef09abc);
    ck_assert_uint_eq(get(r, ecam(FIRST, 8), 4), 0xff000007);
    ck_assert_uint_eq(get(r, ecam(0, 0x0a), 2), 0x0600); // what Linux looks for on the bus
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++)
        for (unsigned reg = 0; reg < PCI_CONFIG_LEN; reg += 4) {
            port_set(r, PORT_PCI, 4, 1u << 31 | slot << 11 | reg);
            ck_assert_uint_eq(port_get(r, PORT_PCI + 4, 4), get(r, ecam(slot, reg), 4));
            ck_assert_uint_eq(port_get(r, PORT_PCI + 6, 2), get(r, ecam(slot, reg + 2), 2));
            ck_assert_uint_eq(port_get(r, PORT_PCI + 7, 1), get(r, ecam(slot, reg + 3), 1));
        }
    port_set(r, PORT_PCI, 4, 1u << 31 | FIRST << 11 | PCI_COMMAND);
    port_set(r, PORT_PCI + 4, 2, PCI_COMMAND_MEMORY);
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0x70 + FIRST);
    rig_free(r);
}
END_TEST

START_TEST(what_is_not_there_reads_as_ones)
{
    struct rig *r = rig_new();
    ck_assert_uint_eq(get(r, ecam(9, 0), 4), 0xffffffff);
    ck_assert_uint_eq(get(r, ecam(9, 2), 2), 0xffff);
    ck_assert_uint_eq(get(r, ecam(FIRST, 0) + 0x1000, 4), 0xffffffff); // function 1
    set(r, ecam(9, 4), 4, ~0u);
    port_set(r, PORT_PCI, 4, 1u << 31 | 1 << 16 | FIRST << 11); // bus 1
    ck_assert_uint_eq(port_get(r, PORT_PCI + 4, 4), 0xffffffff);
    port_set(r, PORT_PCI, 4, FIRST << 11); // not enabled
    ck_assert_uint_eq(port_get(r, PORT_PCI + 4, 4), 0xffffffff);
    ck_assert_uint_eq(port_get(r, PORT_PCI, 4), FIRST << 11);
    port_set(r, PORT_PCI, 1, 0xff); // narrower: not the address register
    port_set(r, PORT_PCI + 3, 1, 1);
    ck_assert_uint_eq(port_get(r, PORT_PCI, 4), FIRST << 11);
    ck_assert_uint_eq(get(r, ecam(FIRST, 0x100), 4), 0); // no extended capabilities
    rig_free(r);
}
END_TEST

START_TEST(odd_accesses_are_harmless)
{
    struct rig *r = rig_new();
    for (unsigned reg = 0; reg < 0x110; reg++)
        for (unsigned size = 1; size <= 8; size++) {
            uint64_t value = get(r, ecam(FIRST, reg), size);
            bool good = size != 3 && size < 5 && reg % 4 + size <= 4 && reg < PCI_CONFIG_LEN;
            uint64_t wanted = 0;
            if (good)
                memcpy(&wanted, r->toys[0].f.config + reg, size);
            if (size <= 4 && size != 3)
                ck_assert_uint_eq(value, wanted);
            set(r, ecam(FIRST, reg), size, ~0ull);
        }
    for (unsigned port = PORT_PCI; port < PORT_PCI + 8; port++)
        for (unsigned size = 1; size <= 8; size++) {
            port_set(r, PORT_PCI, 4, 1u << 31 | FIRST << 11 | 0xfc);
            port_get(r, port, size);
            port_set(r, port, size, ~0ull);
        }
    // The last bytes of configuration space and of ECAM.
    ck_assert_uint_eq(get(r, ecam(FIRST, 0xfe), 4), 0);
    get(r, LAYOUT_ECAM_END - 4, 8);
    set(r, LAYOUT_ECAM_END - 1, 8, ~0ull);
    // Read-only registers kept their values through all of that.
    ck_assert_uint_eq(get(r, ecam(FIRST, 0), 4), 0x56781234);
    ck_assert_uint_eq(get(r, ecam(FIRST, 8), 4), 0xff000007);
    ck_assert_uint_eq(get(r, ecam(FIRST, 0x3c), 4), 0); // no interrupt pin
    rig_free(r);
}
END_TEST

START_TEST(slots_are_checked)
{
    struct rig *r = rig_new();
    struct error err;
    struct pci_function f = r->toys[0].f;
    ck_assert_int_eq(pci_function_add(r->host, &f, FIRST, &err), -EEXIST);
    ck_assert_int_eq(pci_function_add(r->host, &f, 0, &err), -EEXIST);
    ck_assert_int_eq(pci_function_add(r->host, &f, PCI_SLOTS, &err), -EINVAL);
    rig_free(r);
}
END_TEST

// --- windows

START_TEST(window_is_sized_and_moved)
{
    struct rig *r = rig_new();
    struct toy *t = &r->toys[0];
    uint64_t bar = ecam(FIRST, PCI_BAR0);
    ck_assert_uint_eq(get(r, bar, 4), home(FIRST));
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0xffffffff); // decodes nothing yet
    decode(r, FIRST, true);
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0x70 + FIRST);
    set(r, home(FIRST) + WINDOW - 4, 8, 55); // over its end, with more of the bus behind it
    ck_assert_uint_eq(t->last_value, 0);
    set(r, bar, 4, 0xffffffff); // sizing, even while it decodes
    ck_assert_uint_eq(get(r, bar, 4), (uint32_t) ~(WINDOW - 1));
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0xffffffff);
    set(r, bar, 4, LAYOUT_PCI_END - WINDOW + 0x123); // low bits are not writable
    ck_assert_uint_eq(get(r, bar, 4), LAYOUT_PCI_END - WINDOW);
    ck_assert_uint_eq(get(r, LAYOUT_PCI_END - WINDOW, 4), 0x70 + FIRST);
    set(r, LAYOUT_PCI_END - 4, 4, 99);
    ck_assert_uint_eq(t->last_offset, WINDOW - 4);
    set(r, LAYOUT_PCI_END - 4, 8, 98); // over its end
    ck_assert_uint_eq(t->last_value, 99);
    ck_assert_uint_eq(t->f.base, LAYOUT_PCI_END - WINDOW);
    unsigned moves = t->moves;
    decode(r, FIRST, false);
    ck_assert_uint_eq(get(r, LAYOUT_PCI_END - WINDOW, 4), 0xffffffff);
    ck_assert_uint_eq(t->moves, moves + 1);
    ck_assert_uint_eq(t->f.base, 0);
    rig_free(r);
}
END_TEST

START_TEST(window_by_halves)
{
    struct rig *r = rig_new();
    decode(r, FIRST, true);
    set(r, ecam(FIRST, PCI_BAR0), 2, 0x8000);
    ck_assert_uint_eq(r->toys[0].f.base, home(FIRST) + 0x8000);
    set(r, ecam(FIRST, PCI_BAR0 + 3), 1, 0xd4);
    ck_assert_uint_eq(r->toys[0].f.base, 0xd4058000);
    ck_assert_uint_eq(get(r, 0xd4058000, 1), 0x70 + FIRST);
    rig_free(r);
}
END_TEST

START_TEST(windows_elsewhere_decode_nothing)
{
    static const uint32_t places[] = {0,
                                      0x2000,
                                      0x10000000, // RAM
                                      LAYOUT_VIRTIO_MMIO,
                                      LAYOUT_PCI_MMIO - WINDOW,
                                      LAYOUT_PCI_END,
                                      LAYOUT_ECAM,
                                      LAYOUT_IOAPIC,
                                      LAYOUT_LAPIC,
                                      (uint32_t)-WINDOW};
    struct rig *r = rig_new();
    decode(r, FIRST, true);
    for (unsigned i = 0; i < ARRAY_SIZE(places); i++) {
        set(r, ecam(FIRST, PCI_BAR0), 4, places[i]);
        ck_assert_uint_eq(get(r, ecam(FIRST, PCI_BAR0), 4), places[i]);
        ck_assert_uint_eq(r->toys[0].f.base, 0);
        r->toys[0].last_value = 0;
        set(r, places[i] + 0x10ull, 4, 77);
        ck_assert_uint_eq(r->toys[0].last_value, 0);
    }
    set(r, ecam(FIRST, PCI_BAR0), 4, home(9));
    ck_assert_uint_eq(get(r, home(9), 4), 0x70 + FIRST);
    rig_free(r);
}
END_TEST

START_TEST(windows_over_each_other)
{
    struct rig *r = rig_new();
    decode(r, FIRST, true);
    decode(r, SECOND, true);
    set(r, ecam(SECOND, PCI_BAR0), 4, home(FIRST));
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0x70 + FIRST);
    decode(r, FIRST, false);
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0x70 + SECOND);
    decode(r, FIRST, true);
    set(r, ecam(FIRST, PCI_BAR0), 4, home(SECOND));
    ck_assert_uint_eq(get(r, home(FIRST), 4), 0x70 + SECOND);
    ck_assert_uint_eq(get(r, home(SECOND), 4), 0x70 + FIRST);
    rig_free(r);
}
END_TEST

// --- messages

static uint64_t control_of(struct rig *r)
{
    return ecam(FIRST, r->toys[0].msix.cap + 2);
}

static void control(struct rig *r, uint16_t value)
{
    set(r, control_of(r), 2, value);
}

enum { ENABLE = 1 << 15, MASK_ALL = 1 << 14 };

static void entry(struct rig *r, unsigned vector, uint64_t address, uint32_t data, uint32_t mask)
{
    uint64_t at = home(FIRST) + TABLE + 16ull * vector;
    set(r, at, 4, (uint32_t)address);
    set(r, at + 4, 4, address >> 32);
    set(r, at + 8, 4, data);
    set(r, at + 12, 4, mask);
}

static unsigned line(struct rig *r, unsigned vector)
{
    return r->toys[0].msix.gsi + vector;
}

// Whether KVM would have seen an interrupt; takes it.
static bool sent(struct rig *r, unsigned vector)
{
    uint64_t count;
    return read(r->irqfds[line(r, vector)], &count, sizeof(count)) == sizeof(count);
}

static uint64_t pending(struct rig *r)
{
    return get(r, home(FIRST) + PENDING, 8);
}

START_TEST(messages_are_routed_once)
{
    struct rig *r = rig_new();
    struct msix *m = &r->toys[0].msix;
    decode(r, FIRST, true);
    ck_assert_uint_eq(get(r, control_of(r), 2), VECTORS - 1);
    entry(r, 1, 0xfee01000, 0x41, 0);
    ck_assert_uint_eq(r->routes[line(r, 1)].times, 0); // not enabled
    msix_signal(m, 1);
    ck_assert(!sent(r, 1));
    control(r, ENABLE);
    ck_assert_uint_eq(r->routes[line(r, 1)].address, 0xfee01000);
    ck_assert_uint_eq(r->routes[line(r, 1)].data, 0x41);
    ck_assert_uint_eq(r->routes[line(r, 0)].times, 0); // masked
    msix_signal(m, 1);
    ck_assert(sent(r, 1));
    ck_assert(!sent(r, 0));
    // A change as drivers make it: mask, message, unmask.
    set(r, home(FIRST) + TABLE + 16 + 12, 4, 1);
    unsigned times = r->routes[line(r, 1)].times;
    entry(r, 1, 0xfee02000, 0x42, 1);
    ck_assert_uint_eq(r->routes[line(r, 1)].times, times);
    set(r, home(FIRST) + TABLE + 16 + 12, 4, 0);
    ck_assert_uint_eq(r->routes[line(r, 1)].times, times + 1);
    ck_assert_uint_eq(r->routes[line(r, 1)].data, 0x42);
    set(r, home(FIRST) + TABLE + 16, 8, 0xfee03000); // 8 bytes at once
    ck_assert_uint_eq(r->routes[line(r, 1)].address, 0xfee03000);
    rig_free(r);
}
END_TEST

START_TEST(masked_messages_stay_pending)
{
    struct rig *r = rig_new();
    struct msix *m = &r->toys[0].msix;
    decode(r, FIRST, true);
    control(r, ENABLE);
    msix_signal(m, 0); // masked since reset
    msix_signal(m, 0);
    ck_assert_uint_eq(pending(r), 1);
    ck_assert(!sent(r, 0));
    entry(r, 0, 0xfee00000, 0x50, 0);
    ck_assert(sent(r, 0));
    ck_assert_uint_eq(pending(r), 0);
    ck_assert(!sent(r, 0)); // once
    control(r, ENABLE | MASK_ALL);
    msix_signal(m, 0);
    entry(r, 2, 0xfee00000, 0x52, 0);
    msix_signal(m, 2);
    ck_assert_uint_eq(pending(r), 5);
    set(r, home(FIRST) + PENDING, 8, 0); // read-only
    ck_assert_uint_eq(pending(r), 5);
    control(r, ENABLE);
    ck_assert(sent(r, 0));
    ck_assert(sent(r, 2));
    control(r, ENABLE | MASK_ALL);
    msix_signal(m, 2);
    control(r, 0); // switched off: what was pending is gone
    control(r, ENABLE);
    ck_assert(!sent(r, 2));
    rig_free(r);
}
END_TEST

START_TEST(table_takes_4_and_8_bytes_only)
{
    struct rig *r = rig_new();
    decode(r, FIRST, true);
    uint64_t table = home(FIRST) + TABLE;
    ck_assert_uint_eq(get(r, table + 12, 4), 1); // masked
    set(r, table + 12, 4, 0xfffffffe);           // reserved bits stay 0
    ck_assert_uint_eq(get(r, table + 12, 4), 0);
    for (unsigned at = 0; at < 16; at++)
        for (unsigned size = 1; size <= 8; size *= 2) {
            set(r, table, 8, 0);
            set(r, table + 8, 8, 0);
            set(r, table + at, size, ~0ull);
            bool good = size >= 4 && at % size == 0;
            uint64_t any = get(r, table, 8) | get(r, table + 8, 8);
            ck_assert_int_eq(any != 0, good);
            if (!good)
                ck_assert_uint_eq(get(r, table + at, size), 0);
        }
    set(r, table + 16 * VECTORS, 4, 5); // behind the last entry
    ck_assert_uint_eq(get(r, table + 16 * VECTORS, 4), 0);
    set(r, table + 16 * VECTORS - 4, 8, 5);
    control(r, ENABLE);
    msix_signal(&r->toys[0].msix, VECTORS);
    msix_signal(&r->toys[0].msix, 0xffff);
    ck_assert_uint_eq(pending(r), 0);
    rig_free(r);
}
END_TEST

START_TEST(message_to_nowhere_loses_its_vector_only)
{
    struct rig *r = rig_new();
    struct msix *m = &r->toys[0].msix;
    decode(r, FIRST, true);
    control(r, ENABLE);
    r->vm.log.fd = -1;
    r->refuse = -EINVAL;
    entry(r, 0, 0x1000, 0x50, 0);
    r->refuse = 0;
    entry(r, 1, 0xfee00000, 0x51, 0);
    msix_signal(m, 0);
    msix_signal(m, 1);
    ck_assert(!sent(r, 0));
    ck_assert(sent(r, 1));
    entry(r, 0, 0xfee00000, 0x50, 0);
    msix_signal(m, 0);
    ck_assert(sent(r, 0));
    rig_free(r);
}
END_TEST

START_TEST(routes_are_checked)
{
    struct rig *r = rig_new();
    struct error err;
    unsigned gsi = line(r, 0);
    ck_assert_int_eq(vm_msi_route(&r->vm, gsi, 0xfedffffc, 1, &err), -EINVAL);
    ck_assert_int_eq(vm_msi_route(&r->vm, gsi, 0xfef00000, 1, &err), -EINVAL);
    ck_assert_int_eq(vm_msi_route(&r->vm, gsi, 1ull << 32 | 0xfee00000, 1, &err), -EINVAL);
    ck_assert_int_eq(vm_msi_route(&r->vm, GSI_MAX - 1, 0xfee00000, 1, &err), -EINVAL);
    ck_assert_int_eq(vm_msi_route(&r->vm, gsi + 2 * VECTORS, 0xfee00000, 1, &err), -EINVAL);
    ck_assert_int_eq(vm_msi_alloc(&r->vm, MSI_ROUTES_MAX, &gsi, &err), -ENOSPC);
    ck_assert_int_eq(
        msix_create(&r->toys[0].msix, &r->vm, &wiring, &r->toys[0].f, MSIX_MAX + 1, 0, 0, &err),
        -EINVAL);
    rig_free(r);
}
END_TEST

// --- reset, saved state

START_TEST(reset_is_as_after_power_on)
{
    struct rig *r = rig_new();
    uint8_t before[PCI_CONFIG_LEN];
    memcpy(before, r->toys[0].f.config, sizeof(before));
    decode(r, FIRST, true);
    set(r, ecam(FIRST, PCI_BAR0), 4, home(9));
    entry(r, 0, 0xfee00000, 1, 0);
    control(r, ENABLE);
    r->dev->class->reset(r->dev);
    ck_assert_mem_eq(r->toys[0].f.config, before, sizeof(before));
    ck_assert_uint_eq(get(r, home(9), 4), 0xffffffff);
    decode(r, FIRST, true);
    ck_assert_uint_eq(get(r, home(FIRST) + TABLE + 12, 4), 1);
    rig_free(r);
}
END_TEST

START_TEST(loaded_configuration_is_checked)
{
    struct rig *r = rig_new();
    struct error err;
    struct pci_function *f = &r->toys[0].f;
    uint32_t bar = LAYOUT_PCI_MMIO + 0x400000;
    f->config[PCI_COMMAND] = PCI_COMMAND_MEMORY;
    memcpy(f->config + PCI_BAR0, &bar, sizeof(bar));
    ck_assert_int_eq(pci_function_loaded(f, &err), 0);
    ck_assert_uint_eq(get(r, bar, 4), 0x70 + FIRST);
    for (unsigned i = 0; i < PCI_CONFIG_LEN; i++)
        for (unsigned bit = 0; bit < 8; bit++) {
            uint8_t was = f->config[i];
            f->config[i] ^= (uint8_t)(1 << bit);
            bool free = f->writable[i] >> bit & 1;
            ck_assert_int_eq(pci_function_loaded(f, &err), free ? 0 : -EINVAL);
            if (free)
                f->config[i] = was;
        }
    f->config[PCI_COMMAND] = PCI_COMMAND_MEMORY;
    memset(f->config + PCI_BAR0 + 1, 0, 3); // a window over RAM decodes nothing after a load, too
    ck_assert_int_eq(pci_function_loaded(f, &err), 0);
    ck_assert_uint_eq(f->base, 0);
    rig_free(r);
}
END_TEST

START_TEST(loaded_messages_are_routed_and_sent)
{
    struct rig *r = rig_new();
    struct error err;
    struct msix *m = &r->toys[0].msix;
    m->f->config[m->cap + 3] = 0x80;
    m->table[0] = 0xfee00000;
    m->table[2] = 0x61;
    m->table[3] = 0xfffffffe; // hostile: reserved bits
    m->pending = ~0ull;
    ck_assert_int_eq(pci_function_loaded(m->f, &err), 0);
    ck_assert_int_eq(msix_loaded(m, &err), 0);
    ck_assert_uint_eq(r->routes[line(r, 0)].data, 0x61);
    ck_assert(sent(r, 0));
    ck_assert(!sent(r, 1));
    ck_assert_uint_eq(m->pending, 6); // of vectors that there are
    ck_assert_uint_eq(m->table[3], 0);
    m->saved_nr = VECTORS + 1;
    ck_assert_int_eq(msix_loaded(m, &err), -EINVAL);
    ck_assert_uint_eq(m->nr, VECTORS);
    ck_assert_uint_eq(m->pending, 0);
    rig_free(r);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("pci");
    tcase_add_test(tc, both_ways_show_the_same);
    tcase_add_test(tc, what_is_not_there_reads_as_ones);
    tcase_add_test(tc, odd_accesses_are_harmless);
    tcase_add_test(tc, slots_are_checked);
    tcase_add_test(tc, window_is_sized_and_moved);
    tcase_add_test(tc, window_by_halves);
    tcase_add_test(tc, windows_elsewhere_decode_nothing);
    tcase_add_test(tc, windows_over_each_other);
    tcase_add_test(tc, messages_are_routed_once);
    tcase_add_test(tc, masked_messages_stay_pending);
    tcase_add_test(tc, table_takes_4_and_8_bytes_only);
    tcase_add_test(tc, message_to_nowhere_loses_its_vector_only);
    tcase_add_test(tc, routes_are_checked);
    tcase_add_test(tc, reset_is_as_after_power_on);
    tcase_add_test(tc, loaded_configuration_is_checked);
    tcase_add_test(tc, loaded_messages_are_routed_and_sent);
    Suite *s = suite_create("pci");
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
