// SPDX-License-Identifier: Apache-2.0
// Frame of the fuzzers of virtio devices: a machine with one device of each transport, and a guest
// whose driver does what the input says, good or bad. A target is a few lines (fuzz_virtio_rng.c
// is the smallest):
//
//   static void *config(void) { ... }                 // on the heap; the frame fills its attach
//   static void outside(const uint8_t *p, size_t n)   // what arrives from the host; may be NULL
//   FUZZ_VIRTIO(&virtio_X_class, config, outside)
//
// config is called once for each transport; fuzz_transport (0 mmio, 1 pci) says which one it is
// for, and whose peer `outside` shall use. Add the target's name in tests/fuzz/meson.build and its
// requests in tests/fuzz/fuzz_virtio_seeds.
//
//   input := u8 mode (enum fuzz_mode), op...
//   op    := u8 kind (enum fuzz_op), its operands; little endian; what is missing at the end is 0
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "devices/virtio.h"
#include "devices/virtio_mmio.h"
#include "devices/virtio_pci.h"
#include "vmm/vm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum fuzz_mode {
    FUZZ_PACKED = 1,
    FUZZ_UP = 2,        // queues are set up before the first op
    FUZZ_EVENT_IDX = 4, // accepted where offered, like the next two
    FUZZ_INDIRECT = 8,
    FUZZ_FEATURES = 16, // those of the device
    FUZZ_PCI = 32,      // transport, for the whole input
};

enum fuzz_op {
    // u8 queue, u8 flags (1 indirect, 2 no doorbell), u8 out | in << 4 (numbers of buffers),
    // u16 length of each, bytes of those that the device reads
    FUZZ_CHAIN,
    // u16 offset in the window, u8 log2 of the width, u64 value; pci: 0x8000 + in config space
    FUZZ_WRITE,
    FUZZ_READ,    // u16 offset, u8 log2 of the width
    FUZZ_MEMORY,  // u32 address, u8 length, bytes
    FUZZ_KICK,    // u8 queue
    FUZZ_OUTSIDE, // u8 length, bytes: from the host's side
    FUZZ_SAVE,    // u8 count, (u16 position, u8 bits to flip)...: state goes out and comes back
    FUZZ_SETUP,   // u8 mode: reset, queues set up anew
    FUZZ_OPS,
};

enum {
    FUZZ_RING = 16,     // entries of a queue
    FUZZ_RINGS = 0,     // guest address; for each queue its three parts:
    FUZZ_AVAIL = 0x200, // behind the descriptors
    FUZZ_USED = 0x300,
    FUZZ_RING_BYTES = 0x800,
    FUZZ_TABLES = 0x10000,  // indirect tables, one for each ring position
    FUZZ_BUFFERS = 0x20000, // handed out one after the other, round and round
    FUZZ_AREA = 0x40000,
    FUZZ_TURNS = 4,    // of the loop after each doorbell
    FUZZ_REST = 10000, // turns in which a device comes to rest when the guest does nothing more
};

struct fuzz_target {
    const struct device_class *class;
    void *(*config)(void);
    void (*outside)(const uint8_t *data, size_t size);
};

struct fuzz_machine {
    struct vm vm;
    struct device *dev, *host; // the host bridge
    bool pci;
    uint8_t mode;
    uint16_t next[VIRTIO_QUEUES_MAX]; // split: available index; packed: position
    bool wrap[VIRTIO_QUEUES_MAX];
    uint32_t buffer;         // next free byte
    struct stream_mem fresh; // state of the machine as it was made
};

static inline uint32_t fuzz_ring(unsigned queue)
{
    return FUZZ_RINGS + queue * FUZZ_RING_BYTES;
}

struct fuzz_input {
    const uint8_t *data;
    size_t left;
};

static inline uint64_t fuzz_take(struct fuzz_input *in, unsigned bytes)
{
    uint64_t value = 0;
    size_t n = bytes < in->left ? bytes : in->left;
    memcpy(&value, in->data, n);
    in->data += n;
    in->left -= n;
    return value;
}

// --- two transports

enum { FUZZ_MMIO_BASE = LAYOUT_VIRTIO_MMIO, FUZZ_SLOT = 1 };
#define FUZZ_PCI_BASE   (LAYOUT_PCI_MMIO + FUZZ_SLOT * PCI_WINDOW_MAX)
#define FUZZ_PCI_CONFIG (LAYOUT_ECAM + ((uint64_t)FUZZ_SLOT << 15))

enum fuzz_reg {
    FUZZ_STATUS,
    FUZZ_ACCEPT_SEL,
    FUZZ_ACCEPT,
    FUZZ_QUEUE_SEL,
    FUZZ_QUEUE_SIZE,
    FUZZ_DESC,
    FUZZ_DRIVER,
    FUZZ_DEVICE,
    FUZZ_READY,
    FUZZ_REGS
};

static unsigned fuzz_transport;

static inline void fuzz_register(struct fuzz_machine *m, enum fuzz_reg reg, uint32_t value)
{
    static const struct {
        uint16_t at, width;
    } mmio[] = {{0x70, 4}, {0x24, 4}, {0x20, 4}, {0x30, 4}, {0x38, 4},
                {0x80, 4}, {0x90, 4}, {0xa0, 4}, {0x44, 4}},
      pci[] = {{0x14, 1}, {0x08, 4}, {0x0c, 4}, {0x16, 2}, {0x18, 2},
               {0x20, 4}, {0x28, 4}, {0x30, 4}, {0x1c, 2}};
    _Static_assert(ARRAY_SIZE(mmio) == FUZZ_REGS && ARRAY_SIZE(pci) == FUZZ_REGS, "all of them");
    if (m->pci)
        bus_write(&m->vm.mmio, FUZZ_PCI_BASE + pci[reg].at, pci[reg].width, value);
    else
        bus_write(&m->vm.mmio, FUZZ_MMIO_BASE + mmio[reg].at, mmio[reg].width, value);
}

// Where FUZZ_WRITE and FUZZ_READ go.
static inline uint64_t fuzz_address(const struct fuzz_machine *m, uint64_t where)
{
    if (!m->pci)
        return FUZZ_MMIO_BASE + where % VIRTIO_MMIO_LEN;
    return where & 0x8000 ? FUZZ_PCI_CONFIG + where % PCI_CONFIG_LEN : FUZZ_PCI_BASE + where;
}

static inline int fuzz_no_irqfd(struct vm *vm, unsigned gsi, int fd, int resample,
                                struct error *err)
{
    return 0;
}

static inline int fuzz_no_doorbell(struct vm *vm, uint64_t addr, uint32_t value, int fd,
                                   struct error *err)
{
    return 0; // kicks come through the register
}

static inline int fuzz_no_pci_doorbell(struct vm *vm, uint64_t addr, int fd, bool add,
                                       struct error *err)
{
    return 0;
}

static inline int fuzz_no_pci_irqfd(struct vm *vm, unsigned gsi, int fd, bool add,
                                    struct error *err)
{
    return 0;
}

static inline int fuzz_no_route(struct vm *vm, unsigned gsi, uint64_t address, uint32_t data,
                                struct error *err)
{
    return 0;
}

static inline void fuzz_device_add(struct fuzz_machine *m, const struct fuzz_target *t)
{
    static const struct virtio_mmio_wiring wiring = {fuzz_no_irqfd, fuzz_no_doorbell};
    static const struct pci_wiring pci_wiring = {fuzz_no_pci_doorbell, fuzz_no_pci_irqfd,
                                                 fuzz_no_route};
    const struct pci_host_config host = {.wiring = &pci_wiring};
    const struct virtio_mmio_place window = {.base = FUZZ_MMIO_BASE, .wiring = &wiring};
    struct virtio_pci_place slot = {.slot = FUZZ_SLOT};
    struct virtio_attach *attach = t->config();
    struct error err = {0};
    if (!attach)
        abort();
    int ret = m->pci ? device_add(&m->vm, &pci_host_class, &host, &m->host, &err) : 0;
    if (m->pci && !ret)
        slot.host = pci_host_of(m->host);
    attach->transport = m->pci ? &virtio_pci_transport : &virtio_mmio_transport;
    attach->place = m->pci ? (const void *)&slot : &window;
    attach->packed = true;
    if (ret || device_add(&m->vm, t->class, attach, &m->dev, &err)) {
        log_write(&m->vm.log, LOG_ERROR, "%s", err.text);
        abort();
    }
    free(attach);
}

static inline struct fuzz_machine *fuzz_machine_new(const struct fuzz_target *t, bool pci)
{
    struct fuzz_machine *m = calloc(1, sizeof(*m));
    struct ram_config ram = {.size = 16 * MiB};
    if (!m)
        abort();
    m->pci = pci;
    m->vm.mmio.name = "mmio";
    m->vm.pio.name = "port";
    m->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    if (ram_create(&m->vm.ram, &ram, NULL) || loop_create(&m->vm.loop, NULL))
        abort();
    fuzz_device_add(m, t);
    stream_mem_writer(&m->fresh, "fresh", STATE_BLOB_MAX);
    if (state_save(&m->vm.state, &m->fresh.stream, NULL))
        abort();
    t->class->resume(m->dev);
    return m;
}

static inline void fuzz_turn(struct fuzz_machine *m)
{
    for (unsigned i = 0; i < FUZZ_TURNS; i++)
        if (loop_turn(m->vm.loop, false, NULL))
            abort();
}

static inline void fuzz_kick(struct fuzz_machine *m, unsigned queue)
{
    if (m->pci)
        bus_write(&m->vm.mmio, FUZZ_PCI_BASE + 0x3000 + 4ull * queue, 2, queue);
    else
        bus_write(&m->vm.mmio, FUZZ_MMIO_BASE + 0x50, 4, queue);
    fuzz_turn(m);
}

static inline uint64_t fuzz_wanted(const struct fuzz_machine *m, const struct virtio *v)
{
    const uint64_t core = VIRTIO_F_PACKED | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT;
    return VIRTIO_F_VERSION_1 | (m->mode & FUZZ_PACKED ? v->offered & VIRTIO_F_PACKED : 0) |
           (m->mode & FUZZ_EVENT_IDX ? v->offered & VIRTIO_F_EVENT_IDX : 0) |
           (m->mode & FUZZ_INDIRECT ? v->offered & VIRTIO_F_INDIRECT : 0) |
           (m->mode & FUZZ_FEATURES ? v->offered & ~core : 0);
}

static inline void fuzz_setup(struct fuzz_machine *m, uint8_t mode)
{
    const struct virtio *v = container_of(m->dev, struct virtio, dev);
    m->mode = mode;
    fuzz_register(m, FUZZ_STATUS, 0);
    memset(ram_at(&m->vm.ram, FUZZ_RINGS, FUZZ_TABLES), 0, FUZZ_TABLES);
    uint64_t wanted = fuzz_wanted(m, v);
    fuzz_register(m, FUZZ_STATUS, 1);
    fuzz_register(m, FUZZ_STATUS, 3);
    for (unsigned half = 0; half < 2; half++) {
        fuzz_register(m, FUZZ_ACCEPT_SEL, half);
        fuzz_register(m, FUZZ_ACCEPT, (uint32_t)(wanted >> 32 * half));
    }
    fuzz_register(m, FUZZ_STATUS, 11);
    for (unsigned q = 0; q < v->nr_queues; q++) {
        uint32_t base = fuzz_ring(q);
        const uint32_t queue[][2] = {{FUZZ_QUEUE_SEL, q},
                                     {FUZZ_QUEUE_SIZE, FUZZ_RING},
                                     {FUZZ_DESC, base},
                                     {FUZZ_DRIVER, base + FUZZ_AVAIL},
                                     {FUZZ_DEVICE, base + FUZZ_USED},
                                     {FUZZ_READY, 1}};
        for (size_t i = 0; i < ARRAY_SIZE(queue); i++)
            fuzz_register(m, queue[i][0], queue[i][1]);
        m->next[q] = 0;
        m->wrap[q] = true;
    }
    fuzz_register(m, FUZZ_STATUS, 15);
    fuzz_turn(m);
}

struct fuzz_buffer {
    uint32_t gpa;
    uint16_t len;
    bool in;
};

static inline uint32_t fuzz_buffer_new(struct fuzz_machine *m, uint32_t len)
{
    if (m->buffer < FUZZ_BUFFERS || m->buffer + len > FUZZ_AREA)
        m->buffer = FUZZ_BUFFERS;
    uint32_t at = m->buffer;
    m->buffer += len;
    return at;
}

// Descriptor i of `table`; `extra` is a packed one's id, a split one's next.
static inline void fuzz_descriptor(struct fuzz_machine *m, uint64_t table, unsigned i,
                                   const struct fuzz_buffer *b, uint16_t flags, uint16_t extra)
{
    uint8_t d[16] = {0};
    bool packed = m->mode & FUZZ_PACKED;
    memcpy(d, &b->gpa, sizeof(b->gpa));
    memcpy(d + 8, &b->len, sizeof(b->len));
    memcpy(d + (packed ? 14 : 12), &flags, 2);
    memcpy(d + (packed ? 12 : 14), &extra, 2);
    ram_write(&m->vm.ram, table + 16ull * i, d, sizeof(d));
}

static inline uint16_t fuzz_flags(const struct fuzz_buffer *b, bool more)
{
    return (uint16_t)((b->in ? 2 : 0) | (more ? 1 : 0));
}

static inline void fuzz_chain_packed(struct fuzz_machine *m, unsigned q,
                                     const struct fuzz_buffer *b, unsigned n, uint16_t indirect)
{
    uint16_t id = m->next[q];
    for (unsigned i = 0; i < n; i++) {
        uint16_t avail = m->wrap[q] ? 1 << 7 : 1 << 15;
        fuzz_descriptor(m, fuzz_ring(q), m->next[q], &b[i],
                        fuzz_flags(&b[i], i + 1 < n) | avail | indirect, id);
        if (++m->next[q] == FUZZ_RING) {
            m->next[q] = 0;
            m->wrap[q] = !m->wrap[q];
        }
    }
}

static inline void fuzz_chain_split(struct fuzz_machine *m, unsigned q, const struct fuzz_buffer *b,
                                    unsigned n, uint16_t indirect)
{
    uint64_t base = fuzz_ring(q);
    uint16_t head = (uint16_t)(m->next[q] * 3 % FUZZ_RING); // chains of up to three do not overlap
    for (unsigned i = 0; i < n; i++)
        fuzz_descriptor(m, base, (head + i) % FUZZ_RING, &b[i],
                        fuzz_flags(&b[i], i + 1 < n) | indirect,
                        (uint16_t)((head + i + 1) % FUZZ_RING));
    ram_write(&m->vm.ram, base + FUZZ_AVAIL + 4 + 2 * (m->next[q] % FUZZ_RING), &head, 2);
    m->next[q]++;
    ram_write(&m->vm.ram, base + FUZZ_AVAIL + 2, &m->next[q], 2);
}

static inline void fuzz_chain(struct fuzz_machine *m, struct fuzz_input *in)
{
    struct fuzz_buffer b[32];
    const struct virtio *v = container_of(m->dev, struct virtio, dev);
    unsigned q = (unsigned)fuzz_take(in, 1) % v->nr_queues;
    uint8_t flags = (uint8_t)fuzz_take(in, 1), counts = (uint8_t)fuzz_take(in, 1);
    unsigned nr_out = counts & 15, n = nr_out + (counts >> 4);
    for (unsigned i = 0; i < n; i++) {
        uint16_t len = (uint16_t)fuzz_take(in, 2);
        b[i] = (struct fuzz_buffer) {fuzz_buffer_new(m, len), len, i >= nr_out};
    }
    for (unsigned i = 0; i < nr_out; i++) {
        size_t take = b[i].len < in->left ? b[i].len : in->left;
        ram_write(&m->vm.ram, b[i].gpa, in->data, take);
        in->data += take;
        in->left -= take;
    }
    void (*add)(struct fuzz_machine *, unsigned, const struct fuzz_buffer *, unsigned, uint16_t) =
        m->mode & FUZZ_PACKED ? fuzz_chain_packed : fuzz_chain_split;
    if (n && flags & 1) {
        uint32_t table = FUZZ_TABLES + m->next[q] % FUZZ_RING * 512u;
        for (unsigned i = 0; i < n; i++)
            fuzz_descriptor(m, table, i, &b[i], fuzz_flags(&b[i], i + 1 < n), (uint16_t)(i + 1));
        const struct fuzz_buffer whole = {table, (uint16_t)(16 * n), false};
        add(m, q, &whole, 1, 4);
    } else if (n) {
        add(m, q, b, n, 0);
    }
    if (!(flags & 2))
        fuzz_kick(m, q);
}

// A machine that refused a state must not go on: parts of it may be there. This one begins anew.
static inline void fuzz_refresh(struct fuzz_machine *m, const struct fuzz_target *t)
{
    struct stream_mem in;
    struct error err;
    t->class->reset(m->dev);
    stream_mem_reader(&in, "fresh", m->fresh.data, m->fresh.len);
    if (!state_load(&m->vm.state, &in.stream, &err))
        return;
    log_write(&m->vm.log, LOG_ERROR, "first state refused: %s", err.text);
    abort();
}

// The machine's saved state, with bits flipped, is loaded or refused; unchanged it always loads.
static inline void fuzz_save(struct fuzz_machine *m, const struct fuzz_target *t,
                             struct fuzz_input *in)
{
    struct stream_mem out, back;
    struct error err;
    unsigned flips = (unsigned)fuzz_take(in, 1) % 16;
    t->class->quiesce(m->dev, &err);
    stream_mem_writer(&out, "state", STATE_BLOB_MAX);
    int ret = state_save(&m->vm.state, &out.stream, &err);
    // What may be refused: storage that takes its time, and a disk whose loaded state says that a
    // flush failed once.
    if (ret == -EBUSY || ret == -EIO) {
        stream_mem_free(&out);
        fuzz_refresh(m, t);
        t->class->resume(m->dev);
        return;
    }
    if (ret) {
        fprintf(stderr, "state not saved: %s\n", err.text);
        abort();
    }
    for (unsigned i = 0; i < flips; i++) {
        size_t at = 12 + (size_t)fuzz_take(in, 2);
        uint8_t bits = (uint8_t)fuzz_take(in, 1);
        if (at < out.len - 4)
            out.data[at] ^= bits;
    }
    uint32_t crc = (uint32_t)crc32(0, out.data + 4, (unsigned)out.len - 8);
    memcpy(out.data + out.len - 4, &crc, 4);
    stream_mem_reader(&back, "state", out.data, out.len);
    bool refused = state_load(&m->vm.state, &back.stream, &err);
    if (refused && !flips) {
        log_write(&m->vm.log, LOG_ERROR, "own state refused: %s", err.text);
        abort();
    }
    if (refused)
        fuzz_refresh(m, t);
    stream_mem_free(&out);
    t->class->resume(m->dev);
    fuzz_turn(m);
}

static inline void fuzz_op(struct fuzz_machine *m, const struct fuzz_target *t,
                           struct fuzz_input *in)
{
    uint64_t where, value;
    unsigned width;
    size_t len;
    switch (fuzz_take(in, 1) % FUZZ_OPS) {
    case FUZZ_CHAIN:
        fuzz_chain(m, in);
        break;
    case FUZZ_WRITE:
        where = fuzz_address(m, fuzz_take(in, 2));
        width = 1u << (fuzz_take(in, 1) & 3);
        bus_write(&m->vm.mmio, where, width, fuzz_take(in, 8));
        break;
    case FUZZ_READ:
        where = fuzz_address(m, fuzz_take(in, 2));
        width = 1u << (fuzz_take(in, 1) & 3);
        bus_read(&m->vm.mmio, where, width, &value);
        break;
    case FUZZ_MEMORY:
        where = fuzz_take(in, 4) % FUZZ_AREA;
        len = fuzz_take(in, 1);
        len = len < in->left ? len : in->left;
        ram_write(&m->vm.ram, where, in->data, len);
        in->data += len;
        in->left -= len;
        break;
    case FUZZ_KICK:
        fuzz_kick(m, (unsigned)fuzz_take(in, 1));
        break;
    case FUZZ_OUTSIDE:
        len = fuzz_take(in, 1);
        len = len < in->left ? len : in->left;
        if (t->outside)
            t->outside(in->data, len);
        in->data += len;
        in->left -= len;
        fuzz_turn(m);
        break;
    case FUZZ_SAVE:
        fuzz_save(m, t, in);
        break;
    case FUZZ_SETUP:
        fuzz_setup(m, (uint8_t)fuzz_take(in, 1));
        break;
    }
}

// A device that rings itself for ever, without anything to do, takes a CPU from its host.
static inline void fuzz_rest(struct fuzz_machine *m)
{
    for (unsigned i = 0; i < FUZZ_REST; i++) {
        if (!io_uring_cq_ready(&m->vm.loop->ring))
            return;
        fuzz_turn(m);
    }
    log_write(&m->vm.log, LOG_ERROR, "the device never comes to rest");
    abort();
}

static inline int fuzz_virtio(const struct fuzz_target *t, const uint8_t *data, size_t size)
{
    static struct fuzz_machine *machines[2]; // of the process; devices are reset for each input
    struct fuzz_input in = {data, size};
    uint8_t mode = (uint8_t)fuzz_take(&in, 1);
    fuzz_transport = mode & FUZZ_PCI ? 1 : 0;
    if (!machines[fuzz_transport])
        machines[fuzz_transport] = fuzz_machine_new(t, fuzz_transport);
    struct fuzz_machine *m = machines[fuzz_transport];
    memset(ram_at(&m->vm.ram, 0, FUZZ_AREA), 0, FUZZ_AREA);
    m->buffer = FUZZ_BUFFERS;
    t->class->reset(m->dev);
    if (m->pci) {
        pci_host_class.reset(m->host);
        bus_write(&m->vm.mmio, FUZZ_PCI_CONFIG + PCI_COMMAND, 2, PCI_COMMAND_MEMORY);
    }
    if (mode & FUZZ_UP)
        fuzz_setup(m, mode);
    while (in.left)
        fuzz_op(m, t, &in);
    fuzz_turn(m);
    fuzz_rest(m);
    return 0;
}

#define FUZZ_VIRTIO(device_class, make_config, from_outside)                                \
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)                            \
    {                                                                                       \
        static const struct fuzz_target target = {device_class, make_config, from_outside}; \
        return fuzz_virtio(&target, data, size);                                            \
    }
