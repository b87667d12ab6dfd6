// SPDX-License-Identifier: Apache-2.0
#include "migrate/blockmove.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/crc32c.h"
#include "vmm/bitmap.h"
#include "vmm/vm.h"

#define SYNC_BYTES (64 * MiB) // at the destination, at the latest

// --- disks of a VM

// The first at or after `dev`.
static struct device *disk_after(struct device *dev)
{
    while (dev && !dev->class->disk)
        dev = dev->next;
    return dev;
}

uint64_t block_len(const struct block_disk *d, uint64_t block)
{
    uint64_t left = d->info.size - block * DISK_BLOCK;
    return left < DISK_BLOCK ? left : DISK_BLOCK;
}

// --- the source: what is to be sent

static int disk_begin(struct block_disk *d, struct error *err)
{
    if (!d->info.size || d->info.size > DISK_SIZE_MAX)
        return error_set(err, -EFBIG, "%s: %llu bytes: only disks of up to %llu TiB move",
                         d->info.path, (unsigned long long)d->info.size, DISK_SIZE_MAX >> 40);
    d->nr = (d->info.size + DISK_BLOCK - 1) / DISK_BLOCK;
    size_t words = bitmap_words(d->nr);
    d->written = calloc(words, sizeof(*d->written));
    d->todo = calloc(words, sizeof(*d->todo));
    d->sent = calloc(words, sizeof(*d->sent));
    if (!d->written || !d->todo || !d->sent)
        return error_set(err, -ENOMEM, "no memory for a map of %llu blocks",
                         (unsigned long long)d->nr);
    int ret = d->ops->watch(d->dev, d->written, err);
    d->watched = !ret;
    if (!ret) { // nothing changes it from here on
        struct disk_info now;
        d->ops->info(d->dev, &now);
        memcpy(d->info.since, now.since, DISK_ID_LEN);
        if (now.size != d->info.size)
            ret = error_set(err, -EAGAIN, "%s: its size has just changed", d->info.path);
    }
    return ret;
}

// What is no hole, or what has changed since the destination had it.
static int disk_start(struct block_disk *d, bool kept, struct error *err)
{
    int ret = 0;
    if (kept) {
        d->ops->changed(d->dev, d->todo);
        bitmap_fill(d->sent, 0, d->nr, true);
        return 0;
    }
    for (uint64_t at = 0, from; !ret && at < d->info.size;) {
        ret = d->ops->data(d->dev, at, &from, &at, err);
        if (!ret && from < at)
            bitmap_fill(d->todo, from / DISK_BLOCK, (at - 1) / DISK_BLOCK - from / DISK_BLOCK + 1,
                        true);
    }
    return ret;
}

static int move_begin(struct block_move *bm, struct vm *vm, struct error *err)
{
    if (posix_memalign((void **)&bm->buffer, DISK_UNIT, WIRE_BLOCKS_DATA)) {
        bm->buffer = NULL;
        return error_set(err, -ENOMEM, "no memory for blocks of a disk");
    }
    for (struct device *dev = disk_after(vm->devices); dev; dev = disk_after(dev->next)) {
        struct disk_info info;
        dev->class->disk->info(dev, &info);
        if (info.read_only)
            continue;
        if (bm->nr == WIRE_DISKS_MAX)
            return error_set(err, -E2BIG, "at most %d disks can move", WIRE_DISKS_MAX);
        struct block_disk *d = &bm->disks[bm->nr++];
        *d = (struct block_disk) {.dev = dev, .ops = dev->class->disk, .info = info};
        int ret = disk_begin(d, err);
        if (ret)
            return ret;
        bm->total_bytes += info.size;
    }
    return bm->nr ? 0
                  : error_set(err, -ENOENT, "VM %s has no disk that could move: leave --disk out",
                              vm->name);
}

int block_move_create(struct block_move **out, struct vm *vm, struct error *err)
{
    struct block_move *bm = calloc(1, sizeof(*bm));
    int ret = bm ? move_begin(bm, vm, err) : error_set(err, -ENOMEM, "no memory for disks");
    if (ret) {
        block_move_free(bm);
        return ret;
    }
    *out = bm;
    return 0;
}

void block_move_free(struct block_move *bm)
{
    for (unsigned i = 0; bm && i < bm->nr; i++) {
        struct block_disk *d = &bm->disks[i];
        if (d->watched)
            d->ops->watch(d->dev, NULL, NULL);
        free((void *)d->written);
        free(d->todo);
        free(d->sent);
    }
    if (bm)
        free(bm->buffer);
    free(bm);
}

int block_move_describe(struct block_move *bm, struct wire *w, struct error *err)
{
    struct wire_disk disks[WIRE_DISKS_MAX] = {0};
    for (unsigned i = 0; i < bm->nr; i++) {
        const struct block_disk *d = &bm->disks[i];
        disks[i] = (struct wire_disk) {.instance = d->dev->instance,
                                       .flags = d->info.overlay ? WIRE_DISK_OVERLAY : 0,
                                       .size = d->info.size,
                                       .base_size = d->info.base_size};
        memcpy(disks[i].since, d->info.since, WIRE_ID_LEN);
        int ret = d->info.overlay ? d->ops->base_sum(d->dev, &disks[i].base_sum, err) : 0;
        if (ret)
            return ret;
    }
    return wire_put(w, WIRE_DISKS, 0, disks, bm->nr * sizeof(disks[0]), NULL, 0, err);
}

int block_move_start(struct block_move *bm, const struct wire_record *record, struct error *err)
{
    static const uint8_t none[WIRE_ID_LEN];
    struct wire_kept kept;
    wire_fixed(record, &kept, sizeof(kept));
    int ret = 0;
    bm->late = kept.flags & WIRE_KEPT_LATE;
    for (unsigned i = 0; i < WIRE_DISKS_MAX && !ret; i++) {
        bm->late &= i >= bm->nr || !bm->disks[i].info.overlay;
        bool is = kept.disks >> i & 1;
        if (is && (i >= bm->nr || !memcmp(bm->disks[i].info.since, none, WIRE_ID_LEN)))
            return error_set(err, -EPROTO, "kept record: disks 0x%x", kept.disks);
        if (i < bm->nr)
            ret = disk_start(&bm->disks[i], is, err);
        bm->kept += is;
    }
    return ret;
}

void block_move_left(struct block_move *bm, const uint8_t id[WIRE_ID_LEN])
{
    for (unsigned i = 0; i < bm->nr; i++)
        bm->disks[i].ops->left(bm->disks[i].dev, id);
}

void block_move_collect(struct block_move *bm)
{
    for (unsigned i = 0; i < bm->nr; i++)
        for (size_t w = 0; w < bitmap_words(bm->disks[i].nr); w++)
            if (atomic_load_explicit(&bm->disks[i].written[w], memory_order_relaxed))
                bm->disks[i].todo[w] |= atomic_exchange(&bm->disks[i].written[w], 0);
}

void block_move_pass(struct block_move *bm)
{
    block_move_collect(bm);
    bm->disk = 0;
    bm->next = 0;
    bm->passes++;
}

uint64_t block_move_todo(const struct block_move *bm)
{
    uint64_t blocks = 0;
    for (unsigned i = 0; i < bm->nr; i++)
        for (size_t w = 0; w < bitmap_words(bm->disks[i].nr); w++)
            blocks += (unsigned)__builtin_popcountll(
                bm->disks[i].todo[w] |
                atomic_load_explicit(&bm->disks[i].written[w], memory_order_relaxed));
    return blocks * DISK_BLOCK;
}

// --- the source: records

struct block_record {
    struct wire_blocks head;
    struct wire_extent extents[WIRE_EXTENTS_MAX];
    uint64_t len;
};

bool block_zero(const uint8_t *data, size_t len)
{
    return !*data && !memcmp(data, data + 1, len - 1);
}

// `len` bytes have been read behind what the record has already.
static void extent_add(struct block_move *bm, struct block_disk *d, struct block_record *r,
                       uint64_t offset, uint64_t len)
{
    bool zero = block_zero(bm->buffer + r->len, len);
    uint64_t block = offset / DISK_BLOCK;
    if (zero && !d->info.overlay && !bitmap_test(d->sent, block))
        return; // the image there is empty
    bitmap_set(d->sent, block);
    r->extents[r->head.nr++] = (struct wire_extent) {
        .offset = offset, .len = (uint32_t)len, .kind = zero ? WIRE_RUN_ZERO : WIRE_RUN_DATA};
    *(zero ? &bm->zero_bytes : &bm->data_bytes) += len;
    r->len += zero ? 0 : len;
}

static int block_read(struct block_move *bm, struct block_disk *d, uint64_t block,
                      struct block_record *r, struct error *err)
{
    uint64_t at = block * DISK_BLOCK, end = at + block_len(d, block), from = at, to = end;
    int ret = 0;
    while (!ret && at < end) {
        if (d->info.overlay)
            ret = d->ops->data(d->dev, at, &from, &to, err);
        at = to;
        to = to < end ? to : end;
        if (ret || from >= to)
            continue;
        ret = d->ops->read(d->dev, from, bm->buffer + r->len, to - from, err);
        if (!ret)
            extent_add(bm, d, r, from, to - from);
    }
    return ret;
}

// The next block of the pass, or NULL.
static struct block_disk *block_next(struct block_move *bm)
{
    for (; bm->disk < bm->nr; bm->disk++, bm->next = 0) {
        struct block_disk *d = &bm->disks[bm->disk];
        bm->next = bitmap_find(d->todo, d->nr, bm->next, true);
        if (bm->next < d->nr)
            return d;
    }
    return NULL;
}

int block_move_record(struct block_move *bm, struct wire *w, uint64_t max, bool *more,
                      struct error *err)
{
    struct block_record r = {0};
    struct block_disk *d;
    max = max < WIRE_BLOCKS_DATA ? max : WIRE_BLOCKS_DATA;
    // Room for a whole block: each unit of it may be an extent of its own.
    for (unsigned looked = 0; (d = block_next(bm)); looked++) {
        unsigned disk = bm->disk;
        if (looked && (disk != r.head.disk || r.len + DISK_BLOCK > max ||
                       r.head.nr + DISK_BLOCK / DISK_UNIT > WIRE_EXTENTS_MAX || looked == 1024))
            break;
        r.head.disk = disk;
        bitmap_clear(d->todo, bm->next);
        int ret = block_read(bm, d, bm->next, &r, err);
        if (ret)
            return ret;
    }
    *more = d;
    if (!r.head.nr)
        return 0;
    r.head.sum = crc32c(0, bm->buffer, r.len);
    struct iovec data = {bm->buffer, r.len};
    return wire_put(w, WIRE_BLOCKS, 0, &r, sizeof(r.head) + r.head.nr * sizeof(r.extents[0]), &data,
                    r.len ? 1 : 0, err);
}

// --- the destination

// The record is hostile: checked before it has any effect.
static int disk_check(const struct block_intake *in, const struct wire_disk *disk,
                      struct error *err)
{
    for (unsigned i = 0; i < in->nr; i++)
        if (in->disks[i].dev->instance == disk->instance)
            return error_set(err, -EPROTO, "disks record: disk%u comes twice", disk->instance);
    if (disk->flags & ~(uint32_t)WIRE_DISK_OVERLAY || disk->reserved)
        return error_set(err, -EPROTO, "disks record: flags 0x%x are not known", disk->flags);
    if (!disk->size || disk->size % 512 || disk->size > DISK_SIZE_MAX ||
        disk->base_size > disk->size)
        return error_set(err, -EPROTO, "disks record: disk%u: %llu bytes over %llu", disk->instance,
                         (unsigned long long)disk->size, (unsigned long long)disk->base_size);
    return 0;
}

static int disk_expect(struct block_intake *in, struct vm *vm, const struct wire_disk *disk,
                       struct error *err)
{
    struct device *dev = disk_after(vm->devices);
    while (dev && dev->instance != disk->instance)
        dev = disk_after(dev->next);
    if (!dev)
        return error_set(
            err, -EINVAL,
            "disk%u comes with the guest, and nobody has said where it is to be: ferry "
            "receive --disk FILE",
            disk->instance);
    bool kept = false;
    struct block_disk *d = &in->disks[in->nr++];
    *d = (struct block_disk) {.dev = dev,
                              .ops = dev->class->disk,
                              .nr = (disk->size + DISK_BLOCK - 1) / DISK_BLOCK,
                              .info = {.size = disk->size,
                                       .overlay = disk->flags & WIRE_DISK_OVERLAY,
                                       .base_size = disk->base_size}};
    memcpy(d->info.since, disk->since, WIRE_ID_LEN);
    int ret = d->ops->expect(dev, &d->info, disk->base_sum, &kept, err);
    in->kept |= (uint32_t)kept << (in->nr - 1);
    return ret;
}

bool block_intake_may_lack(const struct block_intake *in)
{
    bool may = in->nr;
    for (unsigned i = 0; i < in->nr; i++)
        may &= !in->disks[i].info.overlay && in->disks[i].ops->lack;
    return may;
}

int block_intake_kept(const struct block_intake *in, struct wire *w, struct error *err)
{
    struct wire_kept kept = {.disks = in->kept,
                             .flags = block_intake_may_lack(in) ? WIRE_KEPT_LATE : 0};
    return wire_put(w, WIRE_KEPT, 0, &kept, sizeof(kept), NULL, 0, err);
}

int block_intake_disks(struct block_intake *in, struct vm *vm, const struct wire_record *record,
                       struct error *err)
{
    struct wire_disk disk;
    uint32_t nr = record->header.meta_len / sizeof(disk);
    if (record->header.meta_len % sizeof(disk) || nr > WIRE_DISKS_MAX || in->nr)
        return error_set(err, -EPROTO, "disks record: length %u", record->header.meta_len);
    in->buffer = malloc(WIRE_BLOCKS_DATA);
    if (!in->buffer)
        return error_set(err, -ENOMEM, "no memory for blocks of a disk");
    int ret = 0;
    for (uint32_t i = 0; i < nr && !ret; i++) {
        memcpy(&disk, record->meta + i * sizeof(disk), sizeof(disk));
        ret = disk_check(in, &disk, err);
        if (!ret)
            ret = disk_expect(in, vm, &disk, err);
    }
    return ret;
}

static struct wire_extent extent_at(const struct wire_record *record, uint32_t i)
{
    struct wire_extent e;
    memcpy(&e, record->meta + sizeof(struct wire_blocks) + i * sizeof(e), sizeof(e));
    return e;
}

static int extent_check(const struct block_disk *d, const struct wire_extent *e, struct error *err)
{
    bool ends = e->offset <= d->info.size && e->len == d->info.size - e->offset;
    if (e->offset % DISK_UNIT || !e->len || e->len > DISK_BLOCK || (e->len % DISK_UNIT && !ends) ||
        !range_within(e->offset, e->len, d->info.size) || e->kind > WIRE_RUN_DATA)
        return error_set(err, -EPROTO,
                         "blocks record: %u bytes of kind %u at %llu of a disk of %llu", e->len,
                         e->kind, (unsigned long long)e->offset, (unsigned long long)d->info.size);
    return 0;
}

static int blocks_check(const struct block_intake *in, const struct wire_record *record,
                        struct wire_blocks *head, struct error *err)
{
    uint64_t data = 0;
    memcpy(head, record->meta, sizeof(*head));
    if (head->disk >= in->nr)
        return error_set(err, -EPROTO, "blocks record: disk %u of %u", head->disk, in->nr);
    if (head->reserved || !head->nr || head->nr > WIRE_EXTENTS_MAX ||
        record->header.meta_len != sizeof(*head) + head->nr * sizeof(struct wire_extent))
        return error_set(err, -EPROTO, "blocks record: %u extents in %u bytes", head->nr,
                         record->header.meta_len);
    for (uint32_t i = 0; i < head->nr; i++) {
        struct wire_extent e = extent_at(record, i);
        int ret = extent_check(&in->disks[head->disk], &e, err);
        if (ret)
            return ret;
        data += e.kind == WIRE_RUN_DATA ? e.len : 0;
    }
    if (data != record->header.data_len)
        return error_set(err, -EPROTO, "blocks record: %u bytes of data, extents have %llu",
                         record->header.data_len, (unsigned long long)data);
    return 0;
}

int block_intake_record(struct block_intake *in, struct wire *w, const struct wire_record *record,
                        struct error *err)
{
    struct wire_blocks head;
    int ret = blocks_check(in, record, &head, err);
    if (!ret)
        ret = wire_read(w, in->buffer, record->header.data_len, err);
    if (!ret && crc32c(0, in->buffer, record->header.data_len) != head.sum)
        ret = error_set(err, -EBADMSG, "blocks of a disk damaged on the way");
    if (ret)
        return ret;
    struct block_disk *d = &in->disks[head.disk];
    const uint8_t *data = in->buffer;
    for (uint32_t i = 0; i < head.nr && !ret; i++) {
        struct wire_extent e = extent_at(record, i);
        bool zero = e.kind == WIRE_RUN_ZERO;
        ret = d->ops->write(d->dev, e.offset, zero ? NULL : data, e.len, err);
        data += zero ? 0 : e.len;
        *(zero ? &in->zero_bytes : &in->data_bytes) += e.len;
        in->unsynced += e.len;
    }
    // A sync at the end of a pass that takes longer than the source waits would be the end of all.
    return ret || in->unsynced < SYNC_BYTES ? ret : block_intake_sync(in, err);
}

int block_intake_sync(struct block_intake *in, struct error *err)
{
    int ret = 0;
    for (unsigned i = 0; in->unsynced && i < in->nr && !ret; i++)
        ret = in->disks[i].ops->sync(in->disks[i].dev, err);
    in->unsynced = ret ? in->unsynced : 0;
    return ret;
}

void block_intake_arrived(struct block_intake *in, const uint8_t id[WIRE_ID_LEN])
{
    for (unsigned i = 0; i < in->nr; i++)
        in->disks[i].ops->arrived(in->disks[i].dev, id);
}

void block_intake_forget(struct vm *vm)
{
    for (struct device *dev = disk_after(vm->devices); dev; dev = disk_after(dev->next))
        dev->class->disk->forget(dev);
}

void block_intake_free(struct block_intake *in)
{
    for (unsigned i = 0; i < in->nr; i++) {
        free(in->disks[i].todo);
        in->disks[i].todo = NULL;
    }
    free(in->buffer);
    in->buffer = NULL;
}
