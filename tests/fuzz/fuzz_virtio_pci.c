// SPDX-License-Identifier: Apache-2.0
// A PCI bus with three virtio devices, whose configuration space (by memory and by ports), windows,
// MSI-X tables and memory a guest accesses as the input says.
//
//   input := u8 mode (1: the functions are set up first), op...
//   op    := u8 kind (enum op), u8 slot | log2 of the width << 5, u16 offset, u32 value
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <zlib.h>

#include "devices/virtio_blk.h"
#include "devices/virtio_pci.h"
#include "devices/virtio_rng.h"
#include "vmm/layout.h"
#include "vmm/msi.h"
#include "vmm/vm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SLOTS = 4, AREA = 64 * 1024, DISK = 64 * 1024, DOORBELLS = 64, OP_LEN = 8 };
enum op {
    OP_ECAM_READ,
    OP_ECAM_WRITE,
    OP_PORT_READ, // offset: of the port
    OP_PORT_WRITE,
    OP_WINDOW_READ, // where the function's BAR says it is
    OP_WINDOW_WRITE,
    OP_ANY_READ, // value: address in the PCI memory
    OP_ANY_WRITE,
    OP_MEMORY, // guest memory
    OP_TURN,   // of the loop
    OP_SAVE,   // offset: which byte of the state gets value's bits flipped
    OPS,
};

struct machine { // one for the fuzzer's process
    struct vm vm;
    struct device *host, *devices[SLOTS];
    uint64_t doorbells[DOORBELLS];
    struct stream_mem fresh; // state of the machine as it was made
};

// What KVM would be asked for must be good whatever the guest does.
static int check_doorbell(struct vm *vm, uint64_t addr, int fd, bool add, struct error *err)
{
    struct machine *m = container_of(vm, struct machine, vm);
    if (addr < LAYOUT_PCI_MMIO || addr >= LAYOUT_PCI_END)
        abort();
    unsigned at = 0;
    while (at < DOORBELLS && m->doorbells[at] != addr)
        at++;
    if (add && at < DOORBELLS)
        return error_set(err, -EEXIST, "as KVM does");
    if (!add && at == DOORBELLS)
        abort(); // never added
    for (unsigned i = 0; add && at == DOORBELLS; i++)
        if (i == DOORBELLS)
            abort();
        else if (!m->doorbells[i])
            at = i;
    m->doorbells[at] = add ? addr : 0;
    return 0;
}

static int check_irqfd(struct vm *vm, unsigned gsi, int fd, bool add, struct error *err)
{
    return 0;
}

static int check_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data,
                       struct error *err)
{
    if (gsi < GSI_MAX || gsi >= GSI_MAX + MSI_ROUTES_MAX)
        abort();
    return address % 2 ? error_set(err, -EINVAL, "refused") : 0;
}

static void add(struct machine *m, unsigned slot, const struct device_class *class, void *config)
{
    const struct virtio_pci_place place = {pci_host_of(m->host), slot};
    struct virtio_attach *attach = config;
    attach->transport = &virtio_pci_transport;
    attach->place = &place;
    attach->packed = true;
    if (device_add(&m->vm, class, config, &m->devices[slot], NULL))
        abort();
    class->resume(m->devices[slot]);
}

static struct machine *machine(void)
{
    static struct machine *m;
    if (m)
        return m;
    static const struct pci_wiring wiring = {check_doorbell, check_irqfd, check_route};
    const struct pci_host_config host = {&wiring};
    struct virtio_rng_config rng = {0};
    struct virtio_blk_config blk;
    struct ram_config ram = {.size = 16 * MiB};
    char text[64];
    int fd = memfd_create("disk", 0);
    m = calloc(1, sizeof(*m));
    if (!m || fd < 0 || ftruncate(fd, DISK))
        abort();
    m->vm.mmio.name = "mmio";
    m->vm.pio.name = "port";
    m->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    snprintf(text, sizeof(text), "/proc/self/fd/%d,queues=2", fd);
    if (ram_create(&m->vm.ram, &ram, NULL) || loop_create(&m->vm.loop, NULL) ||
        device_add(&m->vm, &pci_host_class, &host, &m->host, NULL) ||
        virtio_blk_parse(text, &blk, NULL))
        abort();
    add(m, 1, &virtio_rng_class, &rng);
    add(m, 2, &virtio_blk_class, &blk);
    add(m, 3, &virtio_rng_class, &rng);
    stream_mem_writer(&m->fresh, "fresh", 16 * MiB);
    if (state_save(&m->vm.state, &m->fresh.stream, NULL))
        abort();
    return m;
}

static uint64_t ecam(unsigned slot, unsigned reg)
{
    return LAYOUT_ECAM + slot * 0x8000ull + reg;
}

static void set(struct machine *m, uint64_t addr, unsigned size, uint64_t value)
{
    bus_write(&m->vm.mmio, addr, size, value);
}

static uint64_t get(struct machine *m, uint64_t addr, unsigned size)
{
    uint64_t value;
    bus_read(&m->vm.mmio, addr, size, &value);
    return value;
}

static uint64_t window(struct machine *m, unsigned slot)
{
    return get(m, ecam(slot, PCI_BAR0), 4);
}

// A driver's queue 0, rings at `slot` pages; MSI-X on.
static void set_up(struct machine *m, unsigned slot)
{
    set(m, ecam(slot, PCI_COMMAND), 2, PCI_COMMAND_MEMORY);
    uint64_t at = window(m, slot), rings = slot * 0x1000ull;
    const uint32_t common[][3] = {{0x14, 1, 1},
                                  {0x14, 1, 3},
                                  {0x08, 4, 1},
                                  {0x0c, 4, 1},
                                  {0x14, 1, 11},
                                  {0x16, 2, 0},
                                  {0x18, 2, 16},
                                  {0x20, 4, (uint32_t)rings},
                                  {0x1a, 2, 1},
                                  {0x28, 4, (uint32_t)rings + 0x400},
                                  {0x30, 4, (uint32_t)rings + 0x800},
                                  {0x1c, 2, 1},
                                  {0x14, 1, 15}};
    for (size_t i = 0; i < ARRAY_SIZE(common); i++)
        set(m, at + common[i][0], common[i][1], common[i][2]);
    set(m, at + 0x4000 + 12, 4, 0);
    set(m, at + 0x4000 + 28, 4, 0);
    for (unsigned reg = 0x40; reg < 0xf0; reg += 4)
        if (get(m, ecam(slot, reg), 1) == PCI_CAP_MSIX)
            set(m, ecam(slot, reg + 2), 2, 1 << 15);
}

static void turn(struct machine *m)
{
    for (unsigned i = 0; i < 3; i++)
        if (loop_turn(m->vm.loop, false, NULL))
            abort();
}

static void quiet(struct machine *m)
{
    for (unsigned slot = 1; slot < SLOTS; slot++)
        if (m->devices[slot]->class->quiesce(m->devices[slot], NULL))
            abort();
}

// A machine that refused a state must not go on: parts of it may be there. This one begins anew.
static void refresh(struct machine *m)
{
    struct stream_mem in;
    m->host->class->reset(m->host);
    for (unsigned slot = 1; slot < SLOTS; slot++)
        virtio_device_reset(m->devices[slot]);
    stream_mem_reader(&in, "fresh", m->fresh.data, m->fresh.len);
    if (state_load(&m->vm.state, &in.stream, NULL))
        abort();
}

// State goes out and comes back with some bits flipped. False: it was refused.
static bool save_and_load(struct machine *m, uint16_t at, uint32_t bits)
{
    struct stream_mem out, in;
    struct error err;
    quiet(m);
    stream_mem_writer(&out, "state", 16 * MiB);
    if (state_save(&m->vm.state, &out.stream, &err))
        abort();
    size_t place = 4 + at % (out.len - 12);
    uint32_t word;
    memcpy(&word, out.data + place, sizeof(word));
    word ^= bits;
    memcpy(out.data + place, &word, sizeof(word));
    uint32_t crc = (uint32_t)crc32(0, out.data + 4, (unsigned)(out.len - 8));
    memcpy(out.data + out.len - 4, &crc, sizeof(crc));
    stream_mem_reader(&in, "state", out.data, out.len);
    int ret = state_load(&m->vm.state, &in.stream, &err);
    if (ret && !bits)
        abort(); // what was saved can be loaded
    if (ret)
        refresh(m);
    stream_mem_free(&out);
    for (unsigned slot = 1; slot < SLOTS; slot++)
        m->devices[slot]->class->resume(m->devices[slot]);
    return !ret;
}

static bool op_run(struct machine *m, const uint8_t *op)
{
    unsigned slot = op[1] & 0x1f, width = 1u << (op[1] >> 5 & 3);
    uint16_t offset;
    uint32_t value;
    uint64_t out;
    memcpy(&offset, op + 2, 2);
    memcpy(&value, op + 4, 4);
    uint64_t wide = value | (uint64_t)value << 32;
    uint64_t any = LAYOUT_PCI_MMIO + value % (LAYOUT_PCI_END - LAYOUT_PCI_MMIO);
    switch (op[0] % OPS) {
    case OP_ECAM_READ:
        get(m, ecam(slot, offset & 0x1ff), width);
        break;
    case OP_ECAM_WRITE:
        set(m, ecam(slot, offset & 0x1ff), width, wide);
        break;
    case OP_PORT_READ:
        bus_read(&m->vm.pio, PORT_PCI + offset % 8, width, &out);
        break;
    case OP_PORT_WRITE:
        bus_write(&m->vm.pio, PORT_PCI + offset % 8, width, wide);
        break;
    case OP_WINDOW_READ:
        get(m, window(m, slot % SLOTS) + (offset & 0x7fff), width);
        break;
    case OP_WINDOW_WRITE:
        set(m, window(m, slot % SLOTS) + (offset & 0x7fff), width, wide);
        break;
    case OP_ANY_READ:
        get(m, any, width);
        break;
    case OP_ANY_WRITE:
        set(m, any, width, wide);
        break;
    case OP_MEMORY:
        ram_write(&m->vm.ram, offset, &value, width < 4 ? width : 4);
        break;
    case OP_TURN:
        turn(m);
        break;
    default:
        return save_and_load(m, offset, value);
    }
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct machine *m = machine();
    if (size < 1 + OP_LEN)
        return 0;
    memset(ram_at(&m->vm.ram, 0, AREA), 0, AREA);
    m->host->class->reset(m->host);
    for (unsigned slot = 1; slot < SLOTS; slot++) {
        virtio_device_reset(m->devices[slot]);
        if (data[0] & 1)
            set_up(m, slot);
    }
    bool good = true;
    for (size_t at = 1; good && at + OP_LEN <= size; at += OP_LEN)
        good = op_run(m, data + at);
    turn(m);
    return 0;
}
