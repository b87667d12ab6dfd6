// SPDX-License-Identifier: Apache-2.0
#include "migrate/blockpost.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "migrate/crc32c.h"
#include "vmm/bitmap.h"

// --- maps of blocks as records

// Stretches without a bit are left out: of a large disk little may be missing.
static int absent_put(struct wire *w, unsigned disk, const uint64_t *map, uint64_t nr,
                      struct error *err)
{
    const uint64_t most = WIRE_DISCARD_WORDS * 64ull;
    autofree uint8_t *meta = malloc(sizeof(struct wire_absent) + WIRE_DISCARD_WORDS * 8);
    if (!meta)
        return error_set(err, -ENOMEM, "no memory for a list of blocks");
    int ret = 0;
    for (uint64_t first = 0; !ret;) {
        first = bitmap_find(map, nr, first, true);
        if (first >= nr)
            return 0;
        first = first / 64 * 64;
        uint64_t n = nr - first < most ? nr - first : most;
        struct wire_absent head = {.disk = disk, .first = first, .blocks = n};
        memcpy(meta, &head, sizeof(head));
        memcpy(meta + sizeof(head), map + first / 64, bitmap_words(n) * 8);
        ret = wire_put(w, WIRE_ABSENT, 0, meta, sizeof(head) + bitmap_words(n) * 8, NULL, 0, err);
        first += n;
    }
    return ret;
}

static int absent_parse(const struct wire_record *record, const struct block_disk *disks,
                        unsigned nr_disks, uint64_t *const *maps, struct error *err)
{
    struct wire_absent head;
    wire_fixed(record, &head, sizeof(head));
    if (head.disk >= nr_disks || head.reserved)
        return error_set(err, -EPROTO, "absent record: disk %u of %u", head.disk, nr_disks);
    uint64_t nr = disks[head.disk].nr;
    if (head.first % 64 || !head.blocks || !range_within(head.first, head.blocks, nr) ||
        record->header.meta_len != sizeof(head) + bitmap_words(head.blocks) * 8)
        return error_set(err, -EPROTO, "absent record: blocks %llu+%llu, the disk has %llu",
                         (unsigned long long)head.first, (unsigned long long)head.blocks,
                         (unsigned long long)nr);
    for (uint64_t i = 0; i < bitmap_words(head.blocks); i++) {
        uint64_t word, valid = head.blocks - i * 64;
        memcpy(&word, record->meta + sizeof(head) + i * 8, 8);
        if (valid < 64 && word >> valid)
            return error_set(err, -EPROTO, "absent record: bits beyond its %llu blocks",
                             (unsigned long long)head.blocks);
        maps[head.disk][head.first / 64 + i] |= word;
    }
    return 0;
}

// --- the source

int block_post_say(struct block_move *bm, struct wire *w, uint64_t *nr, struct error *err)
{
    int ret = 0;
    *nr = 0;
    block_move_collect(bm);
    for (unsigned i = 0; i < bm->nr && !ret; i++) {
        *nr += bitmap_count(bm->disks[i].todo, bm->disks[i].nr);
        ret = absent_put(w, i, bm->disks[i].todo, bm->disks[i].nr, err);
    }
    return ret;
}

int block_post_hear(struct block_move *bm, const struct wire_record *record, struct error *err)
{
    uint64_t *maps[WIRE_DISKS_MAX];
    for (unsigned i = 0; i < bm->nr; i++) {
        maps[i] = bm->disks[i].todo;
        bitmap_fill(bm->disks[i].sent, 0, bm->disks[i].nr, true); // who knows
    }
    return absent_parse(record, bm->disks, bm->nr, maps, err);
}

bool block_post_next(struct block_move *bm, unsigned max, struct block_claim *claim)
{
    // Each disk from where it is, then once more from the beginning of the first.
    for (unsigned looked = 0; looked <= bm->nr; looked++) {
        struct block_disk *d = &bm->disks[bm->disk];
        uint64_t first = bitmap_find(d->todo, d->nr, bm->next, true);
        if (first == d->nr) {
            bm->disk = (bm->disk + 1) % bm->nr;
            bm->next = 0;
            continue;
        }
        uint64_t end = bitmap_find(d->todo, d->nr, first, false);
        unsigned nr = end - first < max ? (unsigned)(end - first) : max;
        bitmap_fill(d->todo, first, nr, false);
        *claim = (struct block_claim) {bm->disk, nr, first};
        bm->next = first + nr;
        return true;
    }
    return false;
}

bool block_post_asked(struct block_move *bm, unsigned disk, uint64_t block)
{
    struct block_disk *d = &bm->disks[disk];
    bool ours = bitmap_test(d->todo, block);
    bitmap_clear(d->todo, block);
    bm->disk = disk; // what follows it will be asked for next
    bm->next = block;
    return ours;
}

int block_post_ask_parse(const struct block_move *bm, const struct wire_record *record,
                         unsigned *disk, uint64_t *blocks, unsigned *nr, struct error *err)
{
    struct wire_ask head;
    wire_fixed(record, &head, sizeof(head));
    if (!head.nr || head.nr > WIRE_WANT_MAX || head.disk >= bm->nr ||
        record->header.meta_len != sizeof(head) + head.nr * sizeof(uint64_t))
        return error_set(err, -EPROTO, "ask record: %u blocks of disk %u in %u bytes", head.nr,
                         head.disk, record->header.meta_len);
    memcpy(blocks, record->meta + sizeof(head), head.nr * sizeof(uint64_t));
    for (unsigned i = 0; i < head.nr; i++)
        if (blocks[i] >= bm->disks[head.disk].nr)
            return error_set(err, -EPROTO, "ask record: block %llu, the disk has %llu",
                             (unsigned long long)blocks[i],
                             (unsigned long long)bm->disks[head.disk].nr);
    *disk = head.disk;
    *nr = head.nr;
    return 0;
}

int block_post_put(struct block_move *bm, struct wire *w, const struct block_claim *claim,
                   uint8_t *buffer, struct error *err)
{
    struct block_disk *d = &bm->disks[claim->disk];
    struct {
        struct wire_late head;
        struct wire_extent extents[WIRE_LATE_MAX];
    } r = {.head = {.disk = claim->disk, .blocks = claim->nr, .first = claim->first}};
    uint64_t len = 0;
    for (uint64_t block = claim->first; block < claim->first + claim->nr; block++) {
        uint64_t n = block_len(d, block);
        int ret = d->ops->read(d->dev, block * DISK_BLOCK, buffer + len, n, err);
        if (ret)
            return ret;
        bool zero = block_zero(buffer + len, n);
        if (zero && !bitmap_test(d->sent, block))
            continue; // the image there is empty
        r.extents[r.head.nr++] =
            (struct wire_extent) {.offset = block * DISK_BLOCK,
                                  .len = (uint32_t)n,
                                  .kind = zero ? WIRE_RUN_ZERO : WIRE_RUN_DATA};
        atomic_fetch_add(zero ? &bm->zero_bytes : &bm->data_bytes, n);
        len += zero ? 0 : n;
    }
    r.head.sum = crc32c(0, buffer, len);
    struct iovec data = {buffer, len};
    return wire_put(w, WIRE_LATE, 0, &r, sizeof(r.head) + r.head.nr * sizeof(r.extents[0]), &data,
                    len ? 1 : 0, err);
}

// --- the destination: before the guest runs

int block_late_absent(struct block_intake *in, const struct wire_record *record, struct error *err)
{
    uint64_t *maps[WIRE_DISKS_MAX];
    if (!block_intake_may_lack(in) || in->late)
        return error_set(err, -EPROTO, "absent record: no disk of this VM may come later");
    for (unsigned i = 0; i < in->nr; i++) {
        struct block_disk *d = &in->disks[i];
        d->todo = d->todo ? d->todo : calloc(bitmap_words(d->nr), sizeof(*d->todo));
        if (!d->todo)
            return error_set(err, -ENOMEM, "no memory for a map of %llu blocks",
                             (unsigned long long)d->nr);
        maps[i] = d->todo;
    }
    return absent_parse(record, in->disks, in->nr, maps, err);
}

int block_late_begin(struct block_intake *in, struct error *err)
{
    int ret = 0;
    in->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (in->wake_fd < 0)
        return error_errno(err, "eventfd");
    in->late = true;
    for (unsigned i = 0; i < in->nr && !ret; i++) {
        struct block_disk *d = &in->disks[i];
        uint64_t *missing = d->todo;
        d->todo = NULL;
        if (missing && bitmap_count(missing, d->nr)) {
            in->lacking |= 1u << i;
            ret = d->ops->lack(d->dev, missing, in->wake_fd, err);
        } else {
            free(missing);
        }
    }
    return ret;
}

void block_late_end(struct block_intake *in)
{
    if (!in->late)
        return;
    for (unsigned i = 0; i < in->nr; i++)
        if (in->lacking >> i & 1)
            in->disks[i].ops->lack_end(in->disks[i].dev);
    close(in->wake_fd);
    in->late = false;
    in->lacking = 0;
}

// --- while it runs

int block_late_fd(const struct block_intake *in)
{
    return in->late ? in->wake_fd : -1;
}

static int disk_ask(struct block_intake *in, unsigned disk, struct wire *w, bool again,
                    struct error *err)
{
    struct block_disk *d = &in->disks[disk];
    struct {
        struct wire_ask head;
        uint64_t blocks[WIRE_WANT_MAX];
    } ask = {.head.disk = disk};
    do {
        ask.head.nr = d->ops->wanted(d->dev, ask.blocks, WIRE_WANT_MAX, again);
        int ret = ask.head.nr ? wire_put(w, WIRE_ASK, 0, &ask,
                                         sizeof(ask.head) + ask.head.nr * sizeof(ask.blocks[0]),
                                         NULL, 0, err)
                              : 0;
        if (ret)
            return ret;
        again = false;
    } while (ask.head.nr == WIRE_WANT_MAX);
    return 0;
}

int block_late_ask(struct block_intake *in, struct wire *w, bool again, struct error *err)
{
    eventfd_t count;
    int ret = 0;
    if (in->late)
        eventfd_read(in->wake_fd, &count); // first: what comes from now on wakes again
    for (unsigned i = 0; i < in->nr && !ret; i++)
        if (in->lacking >> i & 1)
            ret = disk_ask(in, i, w, again, err);
    return ret;
}

// An extent is all of a block; they ascend, within the record's.
static int late_check(const struct block_intake *in, const struct wire_record *record,
                      struct wire_late *head, struct wire_extent extents[WIRE_LATE_MAX],
                      struct error *err)
{
    uint64_t data = 0, next;
    wire_fixed(record, head, sizeof(*head));
    if (head->disk >= in->nr || !(in->lacking >> head->disk & 1))
        return error_set(err, -EPROTO, "late record: disk %u of %u", head->disk, in->nr);
    const struct block_disk *d = &in->disks[head->disk];
    if (!head->blocks || head->blocks > WIRE_LATE_MAX || head->nr > head->blocks ||
        !range_within(head->first, head->blocks, d->nr) ||
        record->header.meta_len != sizeof(*head) + head->nr * sizeof(extents[0]))
        return error_set(err, -EPROTO,
                         "late record: blocks %llu+%u of %llu, %u extents in %u bytes",
                         (unsigned long long)head->first, head->blocks, (unsigned long long)d->nr,
                         head->nr, record->header.meta_len);
    memcpy(extents, record->meta + sizeof(*head), head->nr * sizeof(extents[0]));
    next = head->first;
    for (uint32_t i = 0; i < head->nr; i++) {
        const struct wire_extent *e = &extents[i];
        uint64_t block = e->offset / DISK_BLOCK;
        if (e->offset % DISK_BLOCK || block < next || block >= head->first + head->blocks ||
            e->len != block_len(d, block) || e->kind > WIRE_RUN_DATA)
            return error_set(err, -EPROTO, "late record: %u bytes of kind %u at %llu", e->len,
                             e->kind, (unsigned long long)e->offset);
        data += e->kind == WIRE_RUN_DATA ? e->len : 0;
        next = block + 1;
    }
    if (data != record->header.data_len)
        return error_set(err, -EPROTO, "late record: %u bytes of data, extents have %llu",
                         record->header.data_len, (unsigned long long)data);
    return 0;
}

int block_late_take(struct block_intake *in, struct wire *w, const struct wire_record *record,
                    uint8_t *buffer, struct error *err)
{
    struct wire_late head;
    struct wire_extent extents[WIRE_LATE_MAX];
    int ret = late_check(in, record, &head, extents, err);
    if (!ret)
        ret = wire_read(w, buffer, record->header.data_len, err);
    if (!ret && crc32c(0, buffer, record->header.data_len) != head.sum)
        ret = error_set(err, -EBADMSG, "blocks of a disk damaged on the way");
    if (ret)
        return ret;
    struct block_disk *d = &in->disks[head.disk];
    const struct wire_extent *e = extents, *end = extents + head.nr;
    for (uint64_t block = head.first; block < head.first + head.blocks && !ret; block++) {
        bool has = e < end && e->offset == block * DISK_BLOCK;
        bool data = has && e->kind == WIRE_RUN_DATA;
        if (d->ops->fill_begin(d->dev, block)) {
            if (has)
                ret = d->ops->write(d->dev, e->offset, data ? buffer : NULL, e->len, err);
            d->ops->fill_end(d->dev, block, !ret);
            atomic_fetch_add(&in->late_unsynced, has ? e->len : 0);
        }
        buffer += data ? e->len : 0;
        e += has;
    }
    return ret;
}

int block_late_sync(struct block_intake *in, struct error *err)
{
    int ret = 0;
    if (in->late_failed)
        return error_set(err, -EIO, "an image could not be written; it is not whole");
    if (!atomic_exchange(&in->late_unsynced, 0))
        return 0;
    for (unsigned i = 0; i < in->nr && !ret; i++)
        if (in->lacking >> i & 1)
            ret = in->disks[i].ops->sync(in->disks[i].dev, err);
    in->late_failed = ret;
    return ret;
}

uint64_t block_late_missing(struct block_intake *in)
{
    uint64_t missing = 0;
    for (unsigned i = 0; i < in->nr; i++)
        if (in->lacking >> i & 1)
            missing += in->disks[i].ops->missing(in->disks[i].dev, NULL);
    return missing ? missing : in->late_failed;
}

int block_late_say(struct block_intake *in, struct wire *w, struct error *err)
{
    int ret = 0;
    for (unsigned i = 0; i < in->nr && !ret; i++) {
        const struct block_disk *d = &in->disks[i];
        if (!(in->lacking >> i & 1))
            continue;
        autofree uint64_t *map = calloc(bitmap_words(d->nr), 8);
        if (!map)
            return error_set(err, -ENOMEM, "no memory for a map of blocks");
        d->ops->missing(d->dev, map);
        ret = absent_put(w, i, map, d->nr, err);
    }
    return ret;
}
