// SPDX-License-Identifier: Apache-2.0
// A hostile migration stream, read as migrate/receive.c reads it but without a VM. The checksums of
// the input are made right first: otherwise nearly every input would end there.
#include <string.h>

#include "migrate/blockpost.h"
#include "migrate/crc32c.h"
#include "migrate/pages.h"
#include "migrate/wire.h"
#include "tests/unit/fake_disk.h"
#include "vmm/bitmap.h"

#define MEMORY (16 * MiB)
enum { DISK = 10 * DISK_BLOCK + 512 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void checksums_repair(uint8_t *data, size_t size)
{
    for (size_t at = 0; size - at >= WIRE_HEADER_LEN;) {
        struct wire_header h;
        memcpy(&h, data + at, sizeof(h));
        if (wire_header_check(&h, NULL) || h.meta_len > size - at - sizeof(h))
            return;
        struct wire_blocks blocks;
        uint8_t *meta = data + at + sizeof(h);
        struct wire_late late;
        if (h.type == WIRE_LATE && h.data_len <= size - at - sizeof(h) - h.meta_len) {
            memcpy(&late, meta, sizeof(late));
            late.sum = crc32c(0, meta + h.meta_len, h.data_len);
            memcpy(meta, &late, sizeof(late));
        }
        if (h.type == WIRE_BLOCKS && h.data_len <= size - at - sizeof(h) - h.meta_len) {
            memcpy(&blocks, meta, sizeof(blocks));
            blocks.sum = crc32c(0, meta + h.meta_len, h.data_len);
            memcpy(meta, &blocks, sizeof(blocks));
        }
        h.crc = wire_header_crc(&h, meta);
        memcpy(data + at, &h, sizeof(h));
        at += sizeof(h) + h.meta_len;
        if (h.data_len > size - at)
            return;
        at += h.data_len;
    }
}

// The VM's disks as such a stream says; not many inputs say it right.
static int disks_take(const struct wire_record *record, struct fake_disk *disk)
{
    struct block_intake in = {0};
    struct error err;
    int ret = block_intake_disks(&in, disk->vm, record, &err);
    block_intake_free(&in);
    return ret;
}

static void disk_open(struct block_intake *in, struct fake_disk *disk)
{
    struct wire_disk says = {.size = DISK};
    struct wire_record record = {.header = {.meta_len = sizeof(says)}, .meta = (uint8_t *)&says};
    if (block_intake_disks(in, disk->vm, &record, NULL))
        abort();
}

static int record_take(struct wire *w, const struct wire_record *record, struct page_intake *intake,
                       struct block_intake *blocks, struct fake_disk *disk, uint64_t *stale)
{
    uint64_t pages[WIRE_WANT_MAX];
    unsigned nr;
    struct wire_hello hello;
    struct machine machine;
    struct error err;
    uint8_t *skip;
    int ret;
    switch (record->header.type) {
    case WIRE_HELLO:
        return wire_hello_parse(record, &hello, &err);
    case WIRE_MACHINE:
        ret = machine_parse(record, &machine, &err);
        machine_free(&machine);
        return ret;
    case WIRE_PAGES:
        return page_intake_record(intake, w, record, &err);
    case WIRE_PACKED:
        skip = malloc(WIRE_BATCH_PAGES * PAGE_SIZE);
        ret = page_intake_packed(intake, w, record, skip, &err);
        free(skip);
        return ret;
    case WIRE_DISKS:
        return disks_take(record, disk);
    case WIRE_BLOCKS:
        return block_intake_record(blocks, w, record, &err);
    case WIRE_ABSENT:
        return block_late_absent(blocks, record, &err);
    case WIRE_PREPARE: // the guest runs; what is missing of its disk comes
        return blocks->late ? -1 : block_late_begin(blocks, &err);
    case WIRE_LATE:
        skip = malloc(WIRE_BLOCKS_DATA);
        ret = block_late_take(blocks, w, record, skip, &err);
        free(skip);
        return ret;
    case WIRE_DISCARD:
        return wire_discard_parse(record, intake->ram->pages, stale, &err);
    case WIRE_WANT:
        return wire_want_parse(record, intake->ram->pages, pages, &nr, &err);
    case WIRE_STATE:
        skip = malloc(record->header.data_len + 1);
        ret = wire_read(w, skip, record->header.data_len, &err);
        free(skip);
        return ret;
    case WIRE_ABORT:
        return wire_unexpected(w, record, "anything else", &err);
    default:
        return 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct ram_config config = {.size = MEMORY};
    struct ram ram;
    struct page_intake intake;
    struct wire_record record = {0};
    struct wire_mem mem;
    struct error err;
    static const uint8_t empty;
    uint8_t *copy = malloc(size + 1);
    uint64_t *stale = calloc(MEMORY / PAGE_SIZE / 64, 8);
    struct fake_disk *disk = fake_new(DISK, false);
    struct block_intake blocks = {0};
    disk_open(&blocks, disk);
    memcpy(copy, size ? data : &empty, size);
    checksums_repair(copy, size);
    if (!ram_create(&ram, &config, &err)) {
        if (!page_intake_init(&intake, &ram, &err)) {
            wire_mem_init(&mem, copy, size);
            while (!wire_get(&mem.wire, &record, &err) &&
                   !record_take(&mem.wire, &record, &intake, &blocks, disk, stale))
                ;
            page_intake_free(&intake);
        }
        ram_destroy(&ram);
    }
    wire_record_free(&record);
    block_late_end(&blocks);
    block_intake_free(&blocks);
    fake_free(disk);
    free(stale);
    free(copy);
    return 0;
}
