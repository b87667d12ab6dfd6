// SPDX-License-Identifier: Apache-2.0
#include "devices/virtqueue.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/bitmap.h"
#include "vmm/util.h"

// Virtio 1.2, 2.7.5 and 2.8.5: both formats share the size and the first three flags.
enum { DESC_SIZE = 16 };
enum { DESC_NEXT = 1 << 0, DESC_WRITE = 1 << 1, DESC_INDIRECT = 1 << 2 };
enum { DESC_AVAIL = 1 << 7, DESC_USED = 1 << 15 }; // packed

enum { AVAIL_NO_INTERRUPT = 1 }; // 2.7.6, flags of the available ring
enum { USED_NO_NOTIFY = 1 };     // 2.7.8, flags of the used ring
// 2.8.10: both event suppression structures of a packed ring.
enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2, EVENT_SIZE = 4 };

struct split_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id, flags;
};

struct used_elem {
    uint32_t id, len;
};

struct replay_chain {
    uint16_t id, slots, nr_out, nr_in;
    struct replay_segment {
        uint64_t gpa;
        uint32_t len;
    } * segments;
};

struct virtqueue_replay {
    uint16_t nr, next;
    struct replay_chain chains[];
};

_Static_assert(sizeof(struct split_desc) == DESC_SIZE, "2.7.5");
_Static_assert(sizeof(struct packed_desc) == DESC_SIZE, "2.8.13");

// --- guest memory that changes while we look

// The barrier makes the copy the only thing the compiler may look at afterwards.
static void copy_once(void *copy, const void *guest, size_t len)
{
    memcpy(copy, guest, len);
    __asm__ volatile("" : : "r"(copy) : "memory");
}

static uint16_t load16(const uint8_t *p)
{
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}

static void store16(uint8_t *p, uint16_t value)
{
    __atomic_store_n((uint16_t *)p, value, __ATOMIC_RELEASE);
}

static void full_barrier(void)
{
#ifdef __SANITIZE_THREAD__ // does not know fences; the other side is a guest anyway
    __asm__ volatile("mfence" : : : "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// Layout of the split rings, 2.7.6 and 2.7.8.
static uint8_t *avail_entry(const struct virtqueue *vq, uint16_t i)
{
    return vq->driver + 4 + 2 * (i % vq->size);
}

static uint8_t *used_event(const struct virtqueue *vq)
{
    return vq->driver + 4 + 2 * vq->size;
}

static uint32_t used_offset(const struct virtqueue *vq, uint16_t i)
{
    return 4 + 8 * (i % vq->size);
}

static uint32_t avail_event_offset(const struct virtqueue *vq)
{
    return 4 + 8 * vq->size;
}

// --- life

static void replay_free(struct virtqueue_replay *r)
{
    for (uint16_t i = 0; r && i < r->nr; i++)
        free(r->chains[i].segments);
    free(r);
}

void virtqueue_init(struct virtqueue *vq, struct ram *ram, uint16_t size_max)
{
    *vq = (struct virtqueue) {.ram = ram, .size_max = size_max, .size = size_max};
}

void virtqueue_reset(struct virtqueue *vq)
{
    replay_free(vq->replay);
    virtqueue_init(vq, vq->ram, vq->size_max);
}

static uint8_t *area_map(const struct virtqueue *vq, const char *what, uint64_t gpa, uint64_t len,
                         uint64_t align, struct error *err)
{
    uint8_t *p = ram_at(vq->ram, gpa, len);
    if (gpa % align) {
        error_set(err, -EINVAL, "%s at 0x%llx: expected a multiple of %llu", what,
                  (unsigned long long)gpa, (unsigned long long)align);
        return NULL;
    }
    if (!p)
        error_set(err, -EFAULT, "%s at 0x%llx, %llu bytes: not wholly in RAM", what,
                  (unsigned long long)gpa, (unsigned long long)len);
    return p;
}

// `err` is not NULL here.
static int rings_map(struct virtqueue *vq, struct error *err)
{
    bool power_of_two = !(vq->size & (vq->size - 1));
    if (!vq->size || vq->size > vq->size_max || (!vq->packed && !power_of_two))
        return error_set(err, -EINVAL, "%u entries: expected 1 to %u%s", vq->size, vq->size_max,
                         vq->packed ? "" : ", a power of two");
    const char *const *names =
        vq->packed
            ? (const char *const[]) {"descriptor ring", "driver event area", "device event area"}
            : (const char *const[]) {"descriptor table", "available ring", "used ring"};
    uint64_t driver_len = vq->packed ? EVENT_SIZE : 6 + 2ull * vq->size;
    uint64_t device_len = vq->packed ? EVENT_SIZE : 6 + 8ull * vq->size;
    uint8_t *desc =
        area_map(vq, names[0], vq->desc_gpa, (uint64_t)DESC_SIZE * vq->size, DESC_SIZE, err);
    uint8_t *driver =
        desc ? area_map(vq, names[1], vq->driver_gpa, driver_len, vq->packed ? 4 : 2, err) : NULL;
    uint8_t *device = driver ? area_map(vq, names[2], vq->device_gpa, device_len, 4, err) : NULL;
    if (!device)
        return err->code;
    vq->desc = desc;
    vq->driver = driver;
    vq->device = device;
    return 0;
}

int virtqueue_enable(struct virtqueue *vq, struct error *err)
{
    struct error local;
    int ret = rings_map(vq, err ? err : &local);
    if (ret)
        return ret;
    vq->next_avail = vq->next_used = 0;
    vq->avail_wrap = vq->used_wrap = true; // 2.8.1
    vq->signal_always = true;
    vq->enabled = true;
    return 0;
}

// --- walking a chain

struct walk {
    struct virtqueue *vq;
    struct virtqueue_chain *chain;
    struct error *err;
};

static int broken(struct walk *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static int broken(struct walk *w, const char *fmt, ...)
{
    char text[128];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    w->vq->broken = true;
    return error_set(w->err, -EBADMSG, "%s", text);
}

static int segment_add(struct walk *w, uint64_t gpa, uint32_t len, bool write)
{
    struct virtqueue_chain *c = w->chain;
    unsigned n = c->nr_out + c->nr_in;
    if (n == VQ_SEGMENTS_MAX)
        return broken(w, "chain of more than %d buffers", VQ_SEGMENTS_MAX);
    if (!len)
        return broken(w, "buffer of no bytes at 0x%llx", (unsigned long long)gpa);
    if (!write && c->nr_in)
        return broken(w, "a readable buffer follows a writable one"); // 2.7.4.2
    void *p = ram_at(w->vq->ram, gpa, len);
    if (!p)
        return broken(w, "buffer at 0x%llx, %u bytes: not wholly in RAM", (unsigned long long)gpa,
                      len);
    c->gpa[n] = gpa;
    c->iov[n] = (struct iovec) {p, len};
    if (write) {
        c->nr_in++;
        c->in_len += len;
    } else {
        c->nr_out++;
        c->out_len += len;
    }
    return 0;
}

// Table of an indirect descriptor (2.7.5.3, 2.8.8), with *count entries; NULL = broken.
static const uint8_t *indirect_table(struct walk *w, uint64_t gpa, uint32_t len, uint16_t flags,
                                     unsigned *count)
{
    const uint8_t *table = ram_at(w->vq->ram, gpa, len);
    *count = len / DESC_SIZE;
    if (!w->vq->indirect)
        broken(w, "indirect descriptor, which was not negotiated");
    else if (flags & DESC_NEXT)
        broken(w, "indirect descriptor that is also chained");
    else if (!len || len % DESC_SIZE || *count > VQ_SEGMENTS_MAX)
        broken(w, "indirect table of %u bytes: expected 1 to %d times %d", len, VQ_SEGMENTS_MAX,
               DESC_SIZE);
    else if (!table)
        broken(w, "indirect table at 0x%llx, %u bytes: not wholly in RAM", (unsigned long long)gpa,
               len);
    else
        return table;
    return NULL;
}

static int split_walk(struct walk *w, uint16_t head)
{
    const uint8_t *table = w->vq->desc;
    unsigned count = w->vq->size, i = head;
    bool nested = false;
    for (unsigned steps = 0;; steps++) {
        struct split_desc d;
        if (i >= count)
            return broken(w, "descriptor %u of a table of %u", i, count);
        if (steps == count)
            return broken(w, "chain with a cycle"); // longer than its table
        copy_once(&d, table + (size_t)DESC_SIZE * i, sizeof(d));
        if (d.flags & DESC_INDIRECT) {
            if (nested)
                return broken(w, "indirect descriptor in an indirect table");
            table = indirect_table(w, d.addr, d.len, d.flags, &count);
            if (!table)
                return -EBADMSG;
            nested = true;
            i = 0;
            steps = -1u; // begins again at 0
            continue;
        }
        int ret = segment_add(w, d.addr, d.len, d.flags & DESC_WRITE);
        if (ret || !(d.flags & DESC_NEXT))
            return ret;
        i = d.next;
    }
}

static int split_next(struct walk *w)
{
    struct virtqueue *vq = w->vq;
    uint16_t ahead = (uint16_t)(load16(vq->driver + 2) - vq->next_avail);
    if (!ahead)
        return 0;
    if (ahead > vq->size)
        return broken(w, "available index is %u ahead in a ring of %u", ahead, vq->size);
    uint16_t head = load16(avail_entry(vq, vq->next_avail));
    if (head >= vq->size)
        return broken(w, "head %u in a ring of %u", head, vq->size);
    if (bitmap_test(vq->heads, head))
        return broken(w, "head %u is in flight already", head);
    int ret = split_walk(w, head);
    if (ret)
        return ret;
    bitmap_set(vq->heads, head);
    vq->next_avail++;
    w->chain->id = head;
    w->chain->slots = 1;
    return 1;
}

static bool packed_available(const struct virtqueue *vq)
{
    uint16_t flags = load16(vq->desc + (size_t)DESC_SIZE * vq->next_avail + 14);
    return !!(flags & DESC_AVAIL) == vq->avail_wrap && !!(flags & DESC_USED) != vq->avail_wrap;
}

static void packed_advance(const struct virtqueue *vq, uint16_t *at, bool *wrap, uint16_t slots)
{
    *at = (uint16_t)(*at + slots); // both at most VQ_SIZE_MAX
    if (*at >= vq->size) {
        *at = (uint16_t)(*at - vq->size);
        *wrap = !*wrap;
    }
}

static int packed_indirect(struct walk *w, const struct packed_desc *d)
{
    unsigned count;
    const uint8_t *table = indirect_table(w, d->addr, d->len, d->flags, &count);
    if (!table)
        return -EBADMSG;
    for (unsigned i = 0; i < count; i++) { // entries follow each other; 2.8.8 knows only WRITE
        struct packed_desc e;
        copy_once(&e, table + (size_t)DESC_SIZE * i, sizeof(e));
        if (e.flags & DESC_INDIRECT)
            return broken(w, "indirect descriptor in an indirect table");
        int ret = segment_add(w, e.addr, e.len, e.flags & DESC_WRITE);
        if (ret)
            return ret;
    }
    return 0;
}

static int packed_next(struct walk *w)
{
    struct virtqueue *vq = w->vq;
    if (!packed_available(vq))
        return 0;
    uint16_t at = vq->next_avail, slots = 0;
    bool wrap = vq->avail_wrap;
    struct packed_desc d;
    do {
        if (slots + vq->in_flight >= vq->size)
            return broken(w, "chains in flight take more than the ring's %u entries", vq->size);
        copy_once(&d, vq->desc + (size_t)DESC_SIZE * at, sizeof(d));
        int ret = d.flags & DESC_INDIRECT ? packed_indirect(w, &d)
                                          : segment_add(w, d.addr, d.len, d.flags & DESC_WRITE);
        if (ret)
            return ret;
        slots++;
        packed_advance(vq, &at, &wrap, 1);
    } while (d.flags & DESC_NEXT);
    vq->next_avail = at;
    vq->avail_wrap = wrap;
    w->chain->id = d.id; // the last descriptor's counts (2.8.6)
    w->chain->slots = slots;
    return 1;
}

static int replay_next(struct walk *w)
{
    struct virtqueue *vq = w->vq;
    const struct replay_chain *r = &vq->replay->chains[vq->replay->next];
    for (unsigned i = 0; i < (unsigned)r->nr_out + r->nr_in; i++) {
        int ret = segment_add(w, r->segments[i].gpa, r->segments[i].len, i >= r->nr_out);
        if (ret)
            return ret;
    }
    w->chain->id = r->id;
    w->chain->slots = r->slots;
    if (++vq->replay->next == vq->replay->nr) {
        replay_free(vq->replay);
        vq->replay = NULL;
    }
    return 1;
}

static void flight_begin(struct virtqueue *vq, struct virtqueue_chain *c)
{
    c->next = NULL;
    c->prev = vq->last;
    *(vq->last ? &vq->last->next : &vq->first) = c;
    vq->last = c;
}

static void flight_end(struct virtqueue *vq, struct virtqueue_chain *c)
{
    *(c->prev ? &c->prev->next : &vq->first) = c->next;
    *(c->next ? &c->next->prev : &vq->last) = c->prev;
    c->next = c->prev = NULL;
    vq->in_flight = (uint16_t)(vq->in_flight - c->slots);
    if (!vq->packed)
        bitmap_clear(vq->heads, c->id);
}

int virtqueue_next(struct virtqueue *vq, struct virtqueue_chain *chain, struct error *err)
{
    if (!vq->enabled || vq->broken)
        return 0;
    struct walk w = {vq, chain, err};
    chain->nr_out = chain->nr_in = 0;
    chain->out_len = chain->in_len = 0;
    bool replayed = vq->replay != NULL; // counted as in flight since the load
    int ret = replayed ? replay_next(&w) : vq->packed ? packed_next(&w) : split_next(&w);
    if (ret <= 0)
        return ret;
    flight_begin(vq, chain);
    if (!replayed)
        vq->in_flight = (uint16_t)(vq->in_flight + chain->slots);
    return 1;
}

// --- giving back

// The driver sees the group at once: a split ring's by its index, a packed ring's by the flags of
// the first descriptor, which are written last.
static void split_push(struct virtqueue *vq, const struct virtqueue_used *group, unsigned nr)
{
    for (unsigned i = 0; i < nr; i++) {
        struct used_elem elem = {group[i].chain->id, group[i].written};
        uint32_t offset = used_offset(vq, vq->next_used);
        ram_copy(vq->device + offset, &elem, sizeof(elem));
        vq->next_used++;
        ram_mark_dirty(vq->ram, vq->device_gpa + offset, sizeof(elem));
    }
    store16(vq->device + 2, vq->next_used); // release: the elements are there before the index
    ram_mark_dirty(vq->ram, vq->device_gpa, 4);
}

static uint16_t packed_element(struct virtqueue *vq, const struct virtqueue_used *u)
{
    uint8_t *d = vq->desc + (size_t)DESC_SIZE * vq->next_used;
    ram_copy(d + 8, &u->written, sizeof(u->written));
    ram_copy(d + 12, &u->chain->id, sizeof(u->chain->id));
    uint16_t flags =
        (uint16_t)((vq->used_wrap ? DESC_AVAIL | DESC_USED : 0) | (u->written ? DESC_WRITE : 0));
    packed_advance(vq, &vq->next_used, &vq->used_wrap, u->chain->slots);
    return flags;
}

static void packed_push(struct virtqueue *vq, const struct virtqueue_used *group, unsigned nr)
{
    uint16_t begin = vq->next_used;
    bool wrap = vq->used_wrap;
    uint16_t first_flags = packed_element(vq, &group[0]);
    for (unsigned i = 1; i < nr; i++) {
        uint8_t *d = vq->desc + (size_t)DESC_SIZE * vq->next_used;
        store16(d + 14, packed_element(vq, &group[i]));
    }
    store16(vq->desc + (size_t)DESC_SIZE * begin + 14, first_flags);
    for (unsigned i = 0; i < nr; i++) { // logged after it was written: the log may be read between
        ram_mark_dirty(vq->ram, vq->desc_gpa + (uint64_t)DESC_SIZE * begin, DESC_SIZE);
        packed_advance(vq, &begin, &wrap, group[i].chain->slots);
    }
}

void virtqueue_push_group(struct virtqueue *vq, const struct virtqueue_used *group, unsigned nr)
{
    if (!nr)
        return;
    for (unsigned i = 0; i < nr; i++)
        chain_mark_dirty(vq->ram, group[i].chain, 0, group[i].written);
    if (vq->packed)
        packed_push(vq, group, nr);
    else
        split_push(vq, group, nr);
    for (unsigned i = 0; i < nr; i++) {
        flight_end(vq, group[i].chain);
        if (vq->unsignalled < UINT16_MAX - VQ_SIZE_MAX)
            vq->unsignalled = (uint16_t)(vq->unsignalled + group[i].chain->slots);
    }
}

void virtqueue_push(struct virtqueue *vq, struct virtqueue_chain *chain, uint32_t written)
{
    const struct virtqueue_used one = {chain, written};
    virtqueue_push_group(vq, &one, 1);
}

// --- who wants to be told

// Whether `event` lies among the `count` positions that end just before `now` (2.7.10, 2.8.10).
static bool event_passed(uint16_t event, uint16_t now, uint16_t count)
{
    return (uint16_t)(now - event - 1) < count;
}

static bool split_wanted(const struct virtqueue *vq)
{
    if (!vq->event_idx)
        return !(load16(vq->driver) & AVAIL_NO_INTERRUPT);
    return event_passed(load16(used_event(vq)), vq->next_used, vq->unsignalled);
}

static bool packed_wanted(const struct virtqueue *vq)
{
    uint16_t flags = load16(vq->driver + 2) & 3;
    if (flags == EVENT_DISABLE)
        return false;
    if (flags != EVENT_DESC || !vq->event_idx)
        return true;
    uint16_t event = load16(vq->driver);
    uint16_t offset = event & 0x7fff;
    if (event >> 15 != vq->used_wrap)
        offset = (uint16_t)(offset - vq->size); // of the round before
    return event_passed(offset, vq->next_used, vq->unsignalled);
}

bool virtqueue_should_signal(struct virtqueue *vq)
{
    if (!vq->enabled || !vq->unsignalled)
        return false;
    full_barrier(); // what was pushed, before what the driver wants: it writes and reads crosswise
    bool wanted = vq->signal_always || vq->unsignalled >= vq->size ||
                  (vq->packed ? packed_wanted(vq) : split_wanted(vq));
    vq->signal_always = false;
    // With event indexes the count goes on from here whether or not the driver was told.
    vq->unsignalled = 0;
    return wanted;
}

static bool something_available(const struct virtqueue *vq)
{
    if (vq->replay)
        return true;
    return vq->packed ? packed_available(vq) : load16(vq->driver + 2) != vq->next_avail;
}

static void kicks_write(struct virtqueue *vq, bool on)
{
    if (vq->packed) {
        uint16_t off = (uint16_t)(vq->next_avail | (vq->avail_wrap ? 1 << 15 : 0));
        if (on && vq->event_idx)
            store16(vq->device, off);
        store16(vq->device + 2, !on ? EVENT_DISABLE : vq->event_idx ? EVENT_DESC : EVENT_ENABLE);
        ram_mark_dirty(vq->ram, vq->device_gpa, EVENT_SIZE);
    } else if (!vq->event_idx) {
        store16(vq->device, on ? 0 : USED_NO_NOTIFY);
        ram_mark_dirty(vq->ram, vq->device_gpa, 2);
    } else if (on) { // an event index that lies behind asks for nothing
        uint32_t offset = avail_event_offset(vq);
        store16(vq->device + offset, vq->next_avail);
        ram_mark_dirty(vq->ram, vq->device_gpa + offset, 2);
    }
}

bool virtqueue_kicks(struct virtqueue *vq, bool on)
{
    if (!vq->enabled || vq->broken)
        return false;
    kicks_write(vq, on);
    if (!on)
        return false;
    full_barrier(); // the driver looks at what we wrote after it made a chain available
    return something_available(vq);
}

bool virtqueue_waiting(struct virtqueue *vq)
{
    return vq->enabled && !vq->broken && something_available(vq);
}

// --- the bytes of a chain

unsigned chain_slice(const struct virtqueue_chain *c, bool in, uint64_t from, uint64_t len,
                     struct iovec iov[VQ_SEGMENTS_MAX])
{
    unsigned first = in ? c->nr_out : 0, end = first + (in ? c->nr_in : c->nr_out), n = 0;
    for (unsigned i = first; i < end && len; i++) {
        uint64_t have = c->iov[i].iov_len;
        if (from >= have) {
            from -= have;
            continue;
        }
        uint64_t take = have - from < len ? have - from : len;
        iov[n++] = (struct iovec) {(uint8_t *)c->iov[i].iov_base + from, take};
        len -= take;
        from = 0;
    }
    return n;
}

size_t chain_read(const struct virtqueue_chain *c, uint64_t from, void *data, size_t len)
{
    size_t done = 0;
    for (unsigned i = 0; i < c->nr_out && done < len; i++) {
        uint64_t have = c->iov[i].iov_len;
        if (from >= have) {
            from -= have;
            continue;
        }
        size_t take = have - from < len - done ? have - from : len - done;
        copy_once((uint8_t *)data + done, (uint8_t *)c->iov[i].iov_base + from, take);
        done += take;
        from = 0;
    }
    return done;
}

size_t chain_write(struct ram *ram, const struct virtqueue_chain *c, uint64_t from,
                   const void *data, size_t len)
{
    size_t done = 0;
    for (unsigned i = c->nr_out; i < (unsigned)c->nr_out + c->nr_in && done < len; i++) {
        uint64_t have = c->iov[i].iov_len;
        if (from >= have) {
            from -= have;
            continue;
        }
        size_t take = have - from < len - done ? have - from : len - done;
        ram_copy((uint8_t *)c->iov[i].iov_base + from, (const uint8_t *)data + done, take);
        ram_mark_dirty(ram, c->gpa[i] + from, take);
        done += take;
        from = 0;
    }
    return done;
}

void chain_mark_dirty(struct ram *ram, const struct virtqueue_chain *c, uint64_t from, uint64_t len)
{
    for (unsigned i = c->nr_out; i < (unsigned)c->nr_out + c->nr_in && len; i++) {
        uint64_t have = c->iov[i].iov_len;
        if (from >= have) {
            from -= have;
            continue;
        }
        uint64_t take = have - from < len ? have - from : len;
        ram_mark_dirty(ram, c->gpa[i] + from, take);
        len -= take;
        from = 0;
    }
}

// --- saved state
//
//   queue := u8 flags (1 enabled, 2 broken, 4 avail_wrap, 8 used_wrap), u16 size, u64 desc,
//            u64 driver, u64 device, u16 next_avail, u16 next_used, u16 chains, chain...
//   chain := u16 id, u16 slots, u16 nr_out, u16 nr_in, (u64 gpa, u32 len)...

enum { SAVED_ENABLED = 1, SAVED_BROKEN = 2, SAVED_AVAIL_WRAP = 4, SAVED_USED_WRAP = 8 };

struct number {
    uint64_t value;
    unsigned bytes;
};

static int numbers_put(struct stream *out, const struct number *n, unsigned count,
                       struct error *err)
{
    int ret = 0;
    for (unsigned i = 0; i < count && !ret; i++)
        ret = stream_put(out, n[i].value, n[i].bytes, err);
    return ret;
}

static int numbers_get(struct stream *in, struct number *n, unsigned count, struct error *err)
{
    int ret = 0;
    for (unsigned i = 0; i < count && !ret; i++)
        ret = stream_get(in, &n[i].value, n[i].bytes, err);
    return ret;
}

static int chain_head_put(struct stream *out, uint16_t id, uint16_t slots, uint16_t nr_out,
                          uint16_t nr_in, struct error *err)
{
    const struct number n[] = {{id, 2}, {slots, 2}, {nr_out, 2}, {nr_in, 2}};
    return numbers_put(out, n, ARRAY_SIZE(n), err);
}

static int segment_put(struct stream *out, uint64_t gpa, uint64_t len, struct error *err)
{
    const struct number n[] = {{gpa, 8}, {len, 4}};
    return numbers_put(out, n, ARRAY_SIZE(n), err);
}

// What was loaded and not taken yet is older than what was taken since.
static int replay_save(const struct virtqueue_replay *r, struct stream *out, struct error *err)
{
    int ret = 0;
    for (uint16_t i = r ? r->next : 0; r && i < r->nr && !ret; i++) {
        const struct replay_chain *c = &r->chains[i];
        ret = chain_head_put(out, c->id, c->slots, c->nr_out, c->nr_in, err);
        for (unsigned s = 0; s < (unsigned)c->nr_out + c->nr_in && !ret; s++)
            ret = segment_put(out, c->segments[s].gpa, c->segments[s].len, err);
    }
    return ret;
}

static int chain_save(const struct virtqueue_chain *c, struct stream *out, struct error *err)
{
    int ret = chain_head_put(out, c->id, c->slots, c->nr_out, c->nr_in, err);
    for (unsigned s = 0; s < (unsigned)c->nr_out + c->nr_in && !ret; s++)
        ret = segment_put(out, c->gpa[s], c->iov[s].iov_len, err);
    return ret;
}

int virtqueue_save(const struct virtqueue *vq, struct stream *out, struct error *err)
{
    unsigned chains = vq->replay ? (unsigned)(vq->replay->nr - vq->replay->next) : 0;
    for (const struct virtqueue_chain *c = vq->first; c; c = c->next)
        chains++;
    unsigned flags = (vq->enabled ? SAVED_ENABLED : 0u) | (vq->broken ? SAVED_BROKEN : 0u) |
                     (vq->avail_wrap ? SAVED_AVAIL_WRAP : 0u) |
                     (vq->used_wrap ? SAVED_USED_WRAP : 0u);
    const struct number n[] = {{flags, 1},          {vq->size, 2},       {vq->desc_gpa, 8},
                               {vq->driver_gpa, 8}, {vq->device_gpa, 8}, {vq->next_avail, 2},
                               {vq->next_used, 2},  {chains, 2}};
    int ret = numbers_put(out, n, ARRAY_SIZE(n), err);
    if (!ret)
        ret = replay_save(vq->replay, out, err);
    for (const struct virtqueue_chain *c = vq->first; c && !ret; c = c->next)
        ret = chain_save(c, out, err);
    return ret;
}

static int replay_chain_load(struct virtqueue *vq, struct replay_chain *c, struct stream *in,
                             struct error *err)
{
    struct number n[] = {{0, 2}, {0, 2}, {0, 2}, {0, 2}};
    int ret = numbers_get(in, n, ARRAY_SIZE(n), err);
    if (ret)
        return ret;
    uint64_t count = n[2].value + n[3].value;
    if (count > VQ_SEGMENTS_MAX) // none is fine: a chain of empty buffers has no segments
        return error_set(err, -EBADMSG, "saved chain of %llu buffers, expected at most %d",
                         (unsigned long long)count, VQ_SEGMENTS_MAX);
    *c = (struct replay_chain) {(uint16_t)n[0].value, (uint16_t)n[1].value, (uint16_t)n[2].value,
                                (uint16_t)n[3].value, calloc(count + 1, sizeof(*c->segments))};
    if (!c->segments)
        return error_set(err, -ENOMEM, "no memory for a saved chain");
    for (uint64_t i = 0; i < count && !ret; i++) {
        struct number s[] = {{0, 8}, {0, 4}};
        ret = numbers_get(in, s, ARRAY_SIZE(s), err);
        c->segments[i] = (struct replay_segment) {s[0].value, (uint32_t)s[1].value};
        if (!ret && (!s[1].value || !ram_contains(vq->ram, s[0].value, s[1].value)))
            ret = error_set(err, -EBADMSG, "saved buffer at 0x%llx, %llu bytes: not in RAM",
                            (unsigned long long)s[0].value, (unsigned long long)s[1].value);
    }
    if (ret)
        return ret;

    if (!c->slots || c->slots + vq->in_flight > vq->size)
        return error_set(err, -EBADMSG, "saved chains take more than the ring's %u entries",
                         vq->size);
    vq->in_flight = (uint16_t)(vq->in_flight + c->slots);
    if (vq->packed)
        return 0;
    if (c->id >= vq->size || c->slots != 1 || bitmap_test(vq->heads, c->id))
        return error_set(err, -EBADMSG, "saved head %u with %u entries in a ring of %u", c->id,
                         c->slots, vq->size);
    bitmap_set(vq->heads, c->id);
    return 0;
}

static int replay_load(struct virtqueue *vq, uint16_t chains, struct stream *in, struct error *err)
{
    if (!chains)
        return 0;
    if (!vq->enabled || chains > vq->size)
        return error_set(err, -EBADMSG, "%u saved chains in a ring of %u", chains,
                         vq->enabled ? vq->size : 0);
    vq->replay = calloc(1, sizeof(*vq->replay) + chains * sizeof(vq->replay->chains[0]));
    if (!vq->replay)
        return error_set(err, -ENOMEM, "no memory for %u saved chains", chains);
    vq->replay->nr = chains;
    int ret = 0;
    for (uint16_t i = 0; i < chains && !ret; i++)
        ret = replay_chain_load(vq, &vq->replay->chains[i], in, err);
    return ret;
}

static int fields_load(struct virtqueue *vq, struct stream *in, struct error *err)
{
    struct number n[] = {{0, 1}, {0, 2}, {0, 8}, {0, 8}, {0, 8}, {0, 2}, {0, 2}, {0, 2}};
    int ret = numbers_get(in, n, ARRAY_SIZE(n), err);
    if (ret)
        return ret;
    unsigned flags = (unsigned)n[0].value;
    vq->size = (uint16_t)n[1].value;
    vq->desc_gpa = n[2].value;
    vq->driver_gpa = n[3].value;
    vq->device_gpa = n[4].value;
    if (flags & SAVED_ENABLED)
        ret = virtqueue_enable(vq, err);
    if (ret)
        return ret;
    vq->broken = flags & SAVED_BROKEN;
    if (!vq->enabled)
        return replay_load(vq, (uint16_t)n[7].value, in, err);
    vq->avail_wrap = flags & SAVED_AVAIL_WRAP;
    vq->used_wrap = flags & SAVED_USED_WRAP;
    vq->next_avail = (uint16_t)n[5].value;
    vq->next_used = (uint16_t)n[6].value;
    if (vq->packed && (vq->next_avail >= vq->size || vq->next_used >= vq->size))
        return error_set(err, -EBADMSG, "saved positions %u and %u in a ring of %u", vq->next_avail,
                         vq->next_used, vq->size);
    return replay_load(vq, (uint16_t)n[7].value, in, err);
}

int virtqueue_load(struct virtqueue *vq, struct stream *in, struct error *err)
{
    bool packed = vq->packed, event_idx = vq->event_idx, indirect = vq->indirect;
    virtqueue_reset(vq);
    vq->packed = packed;
    vq->event_idx = event_idx;
    vq->indirect = indirect;
    int ret = fields_load(vq, in, err);
    if (ret)
        virtqueue_reset(vq);
    return ret;
}
