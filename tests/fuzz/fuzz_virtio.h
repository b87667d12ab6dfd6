// SPDX-License-Identifier: Apache-2.0
// Frame of the fuzzers of virtio devices: a machine with one device of each transport, and a guest
// whose driver does what the input says, good or bad. A target is a few lines (fuzz_virtio_rng.c
// is the smallest):
//
//   static void *config(void) { ... }                 // on the heap; the frame fills its attach
//   static void outside(const uint8_t *p, size_t n)   // what arrives from the host; may be NULL
//   FUZZ_VIRTIO(&virtio_X_class, config, outside)
//
// plus its name in tests/fuzz/meson.build and its requests in tests/fuzz/fuzz_virtio_seeds.
//
//   input := u8 mode (enum fuzz_mode), op...
//   op    := u8 kind (enum fuzz_op), its operands; little endian; what is missing at the end is 0
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "devices/virtio.h"
#include "devices/virtio_mmio.h"
#include "vmm/vm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum fuzz_mode {
    FUZZ_PACKED = 1,
    FUZZ_UP = 2,        // queues are set up before the first op
    FUZZ_EVENT_IDX = 4, // accepted where offered, like the next two
    FUZZ_INDIRECT = 8,
    FUZZ_FEATURES = 16, // those of the device
};

enum fuzz_op {
    // u8 queue, u8 flags (1 indirect, 2 no doorbell), u8 out | in << 4 (numbers of buffers),
    // u16 length of each, bytes of those that the device reads
    FUZZ_CHAIN,
    FUZZ_WRITE,   // u16 offset in the window, u8 log2 of the width, u64 value
    FUZZ_READ,    // u16 offset, u8 log2 of the width
    FUZZ_MEMORY,  // u32 address, u8 length, bytes
    FUZZ_KICK,    // u8 queue
    FUZZ_OUTSIDE, // u8 length, bytes: from the host's side
    FUZZ_SAVE,    // u8 count, (u16 position, u8 bits to flip)...: state goes out and comes back
    FUZZ_SETUP,   // u8 mode: reset, queues set up anew
    FUZZ_OPS,
};

enum {
    FUZZ_RING = 16,         // entries of a queue
    FUZZ_RINGS = 0,         // guest address; 4 KiB a queue: descriptors, +0x800, +0xc00
    FUZZ_TABLES = 0x10000,  // indirect tables, one for each ring position
    FUZZ_BUFFERS = 0x20000, // handed out one after the other, round and round
    FUZZ_AREA = 0x40000,
    FUZZ_TURNS = 4, // of the loop after each doorbell
};

struct fuzz_target {
    const struct device_class *class;
    void *(*config)(void);
    void (*outside)(const uint8_t *data, size_t size);
};

struct fuzz_machine {
    struct vm vm;
    struct device *dev;
    uint8_t mode;
    uint16_t next[VIRTIO_QUEUES_MAX]; // split: available index; packed: position
    bool wrap[VIRTIO_QUEUES_MAX];
    uint32_t buffer; // next free byte
};

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

static inline struct fuzz_machine *fuzz_machine_new(const struct fuzz_target *t)
{
    static const struct virtio_mmio_wiring wiring = {fuzz_no_irqfd, fuzz_no_doorbell};
    const struct virtio_mmio_place place = {.base = LAYOUT_VIRTIO_MMIO, .wiring = &wiring};
    struct fuzz_machine *m = calloc(1, sizeof(*m));
    struct virtio_attach *attach = t->config();
    struct ram_config ram = {.size = 16 * MiB};
    struct error err;
    if (!m || !attach)
        abort();
    attach->transport = &virtio_mmio_transport;
    attach->place = &place;
    attach->packed = true;
    m->vm.mmio.name = "mmio";
    m->vm.log = (struct log) {.level = LOG_ERROR, .fd = STDERR_FILENO};
    if (ram_create(&m->vm.ram, &ram, &err) || loop_create(&m->vm.loop, &err) ||
        device_add(&m->vm, t->class, attach, &m->dev, &err)) {
        log_write(&m->vm.log, LOG_ERROR, "%s", err.text);
        abort();
    }
    free(attach);
    t->class->resume(m->dev);
    return m;
}

static inline void fuzz_turn(struct fuzz_machine *m)
{
    for (unsigned i = 0; i < FUZZ_TURNS; i++)
        if (loop_turn(m->vm.loop, false, NULL))
            abort();
}

static inline void fuzz_register(struct fuzz_machine *m, uint64_t reg, uint32_t value)
{
    bus_write(&m->vm.mmio, LAYOUT_VIRTIO_MMIO + reg, 4, value);
}

static inline void fuzz_kick(struct fuzz_machine *m, unsigned queue)
{
    fuzz_register(m, 0x50, queue);
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
    fuzz_register(m, 0x70, 0);
    memset(ram_at(&m->vm.ram, FUZZ_RINGS, FUZZ_TABLES), 0, FUZZ_TABLES);
    uint64_t wanted = fuzz_wanted(m, v);
    const uint32_t begin[][2] = {{0x70, 1}, {0x70, 3},
                                 {0x24, 0}, {0x20, (uint32_t)wanted},
                                 {0x24, 1}, {0x20, (uint32_t)(wanted >> 32)},
                                 {0x70, 11}};
    for (size_t i = 0; i < ARRAY_SIZE(begin); i++)
        fuzz_register(m, begin[i][0], begin[i][1]);
    for (unsigned q = 0; q < v->nr_queues; q++) {
        uint32_t base = FUZZ_RINGS + q * 0x1000;
        const uint32_t queue[][2] = {
            {0x30, q}, {0x38, FUZZ_RING}, {0x80, base}, {0x90, base + 0x800}, {0xa0, base + 0xc00},
            {0x44, 1}};
        for (size_t i = 0; i < ARRAY_SIZE(queue); i++)
            fuzz_register(m, queue[i][0], queue[i][1]);
        m->next[q] = 0;
        m->wrap[q] = true;
    }
    fuzz_register(m, 0x70, 15);
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
        fuzz_descriptor(m, FUZZ_RINGS + q * 0x1000, m->next[q], &b[i],
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
    uint64_t base = FUZZ_RINGS + q * 0x1000;
    uint16_t head = (uint16_t)(m->next[q] * 3 % FUZZ_RING); // chains of up to three do not overlap
    for (unsigned i = 0; i < n; i++)
        fuzz_descriptor(m, base, (head + i) % FUZZ_RING, &b[i],
                        fuzz_flags(&b[i], i + 1 < n) | indirect,
                        (uint16_t)((head + i + 1) % FUZZ_RING));
    ram_write(&m->vm.ram, base + 0x800 + 4 + 2 * (m->next[q] % FUZZ_RING), &head, 2);
    m->next[q]++;
    ram_write(&m->vm.ram, base + 0x800 + 2, &m->next[q], 2);
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

// The machine's saved state, with bits flipped, is loaded or refused; unchanged it always loads.
static inline void fuzz_save(struct fuzz_machine *m, const struct fuzz_target *t,
                             struct fuzz_input *in)
{
    struct stream_mem out, back;
    struct error err;
    unsigned flips = (unsigned)fuzz_take(in, 1) % 16;
    t->class->quiesce(m->dev, &err);
    stream_mem_writer(&out, "state", STATE_BLOB_MAX);
    if (state_save(&m->vm.state, &out.stream, &err))
        abort();
    for (unsigned i = 0; i < flips; i++) {
        size_t at = 12 + (size_t)fuzz_take(in, 2);
        uint8_t bits = (uint8_t)fuzz_take(in, 1);
        if (at < out.len - 4)
            out.data[at] ^= bits;
    }
    uint32_t crc = (uint32_t)crc32(0, out.data + 4, (unsigned)out.len - 8);
    memcpy(out.data + out.len - 4, &crc, 4);
    stream_mem_reader(&back, "state", out.data, out.len);
    if (state_load(&m->vm.state, &back.stream, &err) && !flips) {
        log_write(&m->vm.log, LOG_ERROR, "own state refused: %s", err.text);
        abort();
    }
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
        where = fuzz_take(in, 2) % VIRTIO_MMIO_LEN;
        width = 1u << (fuzz_take(in, 1) & 3);
        bus_write(&m->vm.mmio, LAYOUT_VIRTIO_MMIO + where, width, fuzz_take(in, 8));
        break;
    case FUZZ_READ:
        where = fuzz_take(in, 2) % VIRTIO_MMIO_LEN;
        width = 1u << (fuzz_take(in, 1) & 3);
        bus_read(&m->vm.mmio, LAYOUT_VIRTIO_MMIO + where, width, &value);
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

static inline int fuzz_virtio(const struct fuzz_target *t, const uint8_t *data, size_t size)
{
    static struct fuzz_machine *m; // of the fuzzer's process; its device is reset for each input
    struct fuzz_input in = {data, size};
    if (!m)
        m = fuzz_machine_new(t);
    uint8_t mode = (uint8_t)fuzz_take(&in, 1);
    memset(ram_at(&m->vm.ram, 0, FUZZ_AREA), 0, FUZZ_AREA);
    m->buffer = FUZZ_BUFFERS;
    fuzz_register(m, 0x70, 0);
    if (mode & FUZZ_UP)
        fuzz_setup(m, mode);
    while (in.left)
        fuzz_op(m, t, &in);
    fuzz_turn(m);
    return 0;
}

#define FUZZ_VIRTIO(device_class, make_config, from_outside)                                \
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)                            \
    {                                                                                       \
        static const struct fuzz_target target = {device_class, make_config, from_outside}; \
        return fuzz_virtio(&target, data, size);                                            \
    }
