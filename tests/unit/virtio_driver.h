// SPDX-License-Identifier: Apache-2.0
// The driver's side of a virtqueue, for tests: well behaved unless a test writes into the rings
// itself. Both formats behind one interface.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "devices/virtqueue.h"
#include "vmm/ram.h"

enum { D_NEXT = 1, D_WRITE = 2, D_INDIRECT = 4, D_AVAIL = 1 << 7, D_USED = 1 << 15 };

struct buffer {
    uint64_t gpa;
    uint32_t len;
    bool write;
};

struct driver {
    struct ram *ram;
    bool packed;
    uint16_t size;
    uint64_t desc, avail, used;  // packed: ring, driver events, device events
    uint16_t next, seen;         // next avail; next used
    bool wrap, seen_wrap;        // packed
    bool taken[VQ_SIZE_MAX];     // split: descriptors; packed: ids
    uint16_t slots[VQ_SIZE_MAX]; // by id: ring entries or descriptors in the chain
    uint16_t free;               // packed: free ring entries
};

static inline void desc_write(struct ram *ram, uint64_t table, unsigned i, uint64_t addr,
                              uint32_t len, uint16_t a, uint16_t b)
{
    uint8_t *d = ram_at(ram, table + 16ull * i, 16);
    memcpy(d, &addr, 8);
    memcpy(d + 8, &len, 4);
    memcpy(d + 12, &a, 2); // split: flags, next; packed: id, flags
    memcpy(d + 14, &b, 2);
}

static inline uint16_t guest16(struct ram *ram, uint64_t gpa)
{
    return __atomic_load_n((uint16_t *)ram_at(ram, gpa, 2), __ATOMIC_ACQUIRE);
}

static inline void guest16_set(struct ram *ram, uint64_t gpa, uint16_t value)
{
    __atomic_store_n((uint16_t *)ram_at(ram, gpa, 2), value, __ATOMIC_RELEASE);
}

// Rings from `base` on; clears them.
static inline void driver_init(struct driver *d, struct ram *ram, bool packed, uint16_t size,
                               uint64_t base)
{
    *d = (struct driver) {.ram = ram, .packed = packed, .size = size, .free = size};
    d->desc = base;
    d->avail = base + 16ull * size;
    d->used = (d->avail + 6 + 2ull * size + 3) & ~3ull;
    d->wrap = d->seen_wrap = true;
    memset(ram_at(ram, base, 0x4000), 0, 0x4000);
}

static inline void driver_setup(const struct driver *d, struct virtqueue *vq)
{
    vq->size = d->size;
    vq->packed = d->packed;
    vq->desc_gpa = d->desc;
    vq->driver_gpa = d->avail;
    vq->device_gpa = d->used;
}

static inline int free_index(struct driver *d)
{
    for (int i = 0; i < d->size; i++)
        if (!d->taken[i]) {
            d->taken[i] = true;
            return i;
        }
    return -1;
}

// `table` != 0: an indirect table there. The id, or -1 when the ring is full.
static inline int driver_add(struct driver *d, const struct buffer *b, unsigned n, uint64_t table)
{
    unsigned slots = table ? 1 : n;
    if (d->free < slots)
        return -1;
    for (unsigned i = 0; table && i < n; i++) {
        uint16_t flags = (b[i].write ? D_WRITE : 0) | (i + 1 < n && !d->packed ? D_NEXT : 0);
        desc_write(d->ram, table, i, b[i].gpa, b[i].len, d->packed ? 0 : flags,
                   d->packed ? flags : (uint16_t)(i + 1));
    }
    const struct buffer whole = {table, 16 * n, false};
    const struct buffer *list = table ? &whole : b;
    int head = free_index(d), index = head;
    uint16_t first_flags = 0, at = d->next;
    for (unsigned i = 0; i < slots; i++) {
        uint16_t flags =
            (list[i].write ? D_WRITE : 0) | (i + 1 < slots ? D_NEXT : 0) | (table ? D_INDIRECT : 0);
        if (d->packed) {
            flags |= d->wrap ? D_AVAIL : D_USED;
            if (!i)
                first_flags = flags;
            desc_write(d->ram, d->desc, at, list[i].gpa, list[i].len, (uint16_t)head,
                       i ? flags : (uint16_t)(flags ^ D_AVAIL ^ D_USED));
            if (++at == d->size) {
                at = 0;
                d->wrap = !d->wrap;
            }
        } else {
            int next = i + 1 < slots ? free_index(d) : 0;
            desc_write(d->ram, d->desc, (unsigned)index, list[i].gpa, list[i].len, flags,
                       (uint16_t)next);
            index = next;
        }
    }
    d->free = (uint16_t)(d->free - slots);
    d->slots[head] = (uint16_t)slots;
    if (d->packed) {
        guest16_set(d->ram, d->desc + 16ull * d->next + 14, first_flags);
        d->next = at;
    } else {
        guest16_set(d->ram, d->avail + 4 + 2ull * (d->next % d->size), (uint16_t)head);
        guest16_set(d->ram, d->avail + 2, ++d->next);
    }
    return head;
}

static inline void split_free(struct driver *d, unsigned head)
{
    for (unsigned n = d->slots[head]; n; n--) {
        d->taken[head] = false;
        head = guest16(d->ram, d->desc + 16ull * head + 14) % d->size;
    }
}

// True: the device gave back the buffer `*id` and wrote `*len` bytes.
static inline bool driver_used(struct driver *d, unsigned *id, uint32_t *len)
{
    if (d->packed) {
        const uint8_t *p = ram_at(d->ram, d->desc + 16ull * d->seen, 16);
        uint16_t flags = guest16(d->ram, d->desc + 16ull * d->seen + 14), id16;
        if (!!(flags & D_AVAIL) != d->seen_wrap || !!(flags & D_USED) != d->seen_wrap)
            return false;
        memcpy(len, p + 8, 4);
        memcpy(&id16, p + 12, 2);
        *id = id16;
        d->taken[id16] = false;
        d->seen = (uint16_t)(d->seen + d->slots[id16]);
        if (d->seen >= d->size) {
            d->seen = (uint16_t)(d->seen - d->size);
            d->seen_wrap = !d->seen_wrap;
        }
    } else {
        if (guest16(d->ram, d->used + 2) == d->seen)
            return false;
        const uint8_t *p = ram_at(d->ram, d->used + 4 + 8ull * (d->seen % d->size), 8);
        uint32_t id32;
        memcpy(&id32, p, 4);
        memcpy(len, p + 4, 4);
        *id = id32;
        d->seen++;
        split_free(d, id32);
    }
    d->free = (uint16_t)(d->free + d->slots[*id]);
    return true;
}
