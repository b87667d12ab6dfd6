// SPDX-License-Identifier: Apache-2.0
#include "devices/blk_overlay.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zlib.h>

#include "vmm/bitmap.h"
#include "vmm/util.h"

enum { VERSION = 1, FROZEN = 1, TABLE_OFFSET = BLK_OVERLAY_TABLE, HEAD_BYTES = 64 * 1024 };

static const char magic[8] = {'F', 'E', 'R', 'R', 'Y', 'O', 'V', 'L'};

// One sector, so that a disk writes it whole or not at all.
struct header {
    char magic[8];
    uint32_t version, cluster, flags, base_head; // base_head: CRC-32 of its first HEAD_BYTES
    uint64_t size, base_size;                    // bytes
    int64_t base_seconds;                        // mtime; 0 for a block device
    uint32_t base_nanoseconds, crc;              // CRC-32 of the header with this field 0
    uint64_t data_offset;
};
_Static_assert(sizeof(struct header) == 64, "docs/formats.md");

static uint64_t clusters(uint64_t bytes)
{
    return (bytes + BLK_CLUSTER - 1) / BLK_CLUSTER;
}

// Whole pages: the unit in which the table is written.
static uint64_t table_size(uint64_t disk)
{
    return align_up((clusters(disk) + 7) / 8, PAGE_SIZE);
}

// --- header

static uint32_t header_crc(struct header h)
{
    h.crc = 0;
    return (uint32_t)crc32(0, (const uint8_t *)&h, sizeof(h));
}

static int base_identify(struct blk_image *base, struct header *h, struct error *err)
{
    struct stat st;
    int ret = blk_image_disk_size(base, &h->base_size, err);
    if (ret)
        return ret;
    if (fstat(base->fd, &st))
        return error_errno(err, "%s", base->path);
    if (!base->block_device) {
        h->base_seconds = st.st_mtim.tv_sec;
        h->base_nanoseconds = (uint32_t)st.st_mtim.tv_nsec;
    }
    autofree uint8_t *head = malloc(HEAD_BYTES);
    if (!head)
        return error_set(err, -ENOMEM, "no memory for %d bytes", HEAD_BYTES);
    size_t want = h->base_size < HEAD_BYTES ? (size_t)h->base_size : HEAD_BYTES;
    ssize_t n = pread(base->fd, head, want, 0);
    if (n != (ssize_t)want)
        return n < 0 ? error_errno(err, "%s", base->path)
                     : error_set(err, -ENODATA, "%s: ends after %zd bytes", base->path, n);
    h->base_head = (uint32_t)crc32(0, head, (uInt)want);
    return 0;
}

static int base_check(const struct blk_overlay *o, const struct header *h, struct error *err)
{
    struct header now = {0};
    int ret = base_identify(o->base, &now, err);
    if (ret)
        return ret;
    if (now.base_size != h->base_size || now.base_seconds != h->base_seconds ||
        now.base_nanoseconds != h->base_nanoseconds || now.base_head != h->base_head)
        return error_set(err, -ESTALE,
                         "%s: its base was changed, or is not %s (%llu bytes, modified %lld.%09u, "
                         "sum %08x; expected %llu, %lld.%09u, %08x)",
                         o->file.path, o->base->path, (unsigned long long)now.base_size,
                         (long long)now.base_seconds, now.base_nanoseconds, now.base_head,
                         (unsigned long long)h->base_size, (long long)h->base_seconds,
                         h->base_nanoseconds, h->base_head);
    return 0;
}

static int header_check(const struct blk_overlay *o, const struct header *h, uint64_t bytes,
                        struct error *err)
{
    const char *path = o->file.path;
    if (memcmp(h->magic, magic, sizeof(magic)))
        return error_set(err, -EBADMSG, "%s: not an overlay", path);
    if (h->version != VERSION)
        return error_set(err, -EPROTONOSUPPORT, "%s: overlay of version %u: expected %d", path,
                         h->version, VERSION);
    if (h->crc != header_crc(*h))
        return error_set(err, -EBADMSG, "%s: header with checksum %08x: expected %08x", path,
                         h->crc, header_crc(*h));
    if (h->cluster != BLK_CLUSTER || h->flags & ~(uint32_t)FROZEN)
        return error_set(err, -EBADMSG, "%s: clusters of %u bytes, flags %x: expected %d, 0 or 1",
                         path, h->cluster, h->flags, BLK_CLUSTER);
    if (!h->size || h->size % BLK_SECTOR || h->size > BLK_OVERLAY_MAX || h->base_size > h->size)
        return error_set(err, -EBADMSG,
                         "%s: a disk of %llu bytes over %llu: expected whole sectors, at most %llu",
                         path, (unsigned long long)h->size, (unsigned long long)h->base_size,
                         BLK_OVERLAY_MAX);
    if (h->data_offset % BLK_CLUSTER || h->data_offset > INT64_MAX - BLK_OVERLAY_MAX ||
        h->data_offset < TABLE_OFFSET + table_size(h->size))
        return error_set(err, -EBADMSG, "%s: data at byte %llu: expected it behind the table", path,
                         (unsigned long long)h->data_offset);
    if (bytes < h->data_offset + h->size)
        return error_set(err, -EBADMSG, "%s: cut off after %llu bytes: expected %llu", path,
                         (unsigned long long)bytes, (unsigned long long)(h->data_offset + h->size));
    if (h->flags & FROZEN && !o->file.read_only)
        return error_set(err, -EROFS,
                         "%s: frozen: others may rely on it; use it with ro, or a copy", path);
    return 0;
}

static int header_write(struct blk_overlay *o, struct header *h, struct error *err)
{
    h->crc = header_crc(*h);
    memcpy(o->header, h, sizeof(*h));
    if (pwrite(o->file.fd, o->header, sizeof(o->header), 0) != (ssize_t)sizeof(o->header) ||
        fdatasync(o->file.fd))
        return error_errno(err, "%s: header", o->file.path);
    return 0;
}

static int header_read(struct blk_overlay *o, struct error *err)
{
    struct header h;
    uint64_t bytes;
    int ret = blk_image_bytes(&o->file, &bytes, err);
    if (ret)
        return ret;
    ssize_t n = pread(o->file.fd, o->header, sizeof(o->header), 0);
    if (n != (ssize_t)sizeof(o->header))
        return n < 0 ? error_errno(err, "%s", o->file.path)
                     : error_set(err, -EBADMSG, "%s: %zd bytes: not an overlay", o->file.path, n);
    memcpy(&h, o->header, sizeof(h));
    ret = header_check(o, &h, bytes, err);
    if (!ret)
        ret = base_check(o, &h, err);
    if (ret)
        return ret;
    o->size = h.size;
    o->base_size = h.base_size;
    o->data_offset = h.data_offset;
    o->frozen = h.flags & FROZEN;
    return 0;
}

// --- table in memory

static void table_free(struct blk_overlay *o)
{
    free(o->present);
    free(o->stable);
    free(o->changed);
    free(o->unwritten);
    o->present = o->stable = NULL;
    o->changed = o->unwritten = NULL;
    o->table_bytes = 0;
}

static size_t table_pages(const struct blk_overlay *o)
{
    return o->table_bytes / PAGE_SIZE;
}

// Memory of it is used as far as it is written to.
static int table_alloc(struct blk_overlay *o, uint64_t disk, struct error *err)
{
    struct blk_overlay fresh = {.table_bytes = (size_t)table_size(disk)};
    size_t words = table_pages(&fresh) / 64 + 1;
    fresh.present = calloc(1, fresh.table_bytes);
    fresh.stable = calloc(1, fresh.table_bytes);
    fresh.changed = calloc(words, sizeof(uint64_t));
    fresh.unwritten = calloc(words, sizeof(uint64_t));
    if (!fresh.present || !fresh.stable || !fresh.changed || !fresh.unwritten) {
        table_free(&fresh);
        return error_set(err, -ENOMEM, "%s: no memory for a table of %llu bytes", o->file.path,
                         (unsigned long long)table_size(disk));
    }
    if (o->present) {
        size_t old_words = table_pages(o) / 64 + 1;
        memcpy(fresh.present, o->present, o->table_bytes);
        memcpy(fresh.stable, o->stable, o->table_bytes);
        memcpy(fresh.changed, o->changed, old_words * sizeof(uint64_t));
        memcpy(fresh.unwritten, o->unwritten, old_words * sizeof(uint64_t));
    }
    table_free(o);
    o->present = fresh.present;
    o->stable = fresh.stable;
    o->changed = fresh.changed;
    o->unwritten = fresh.unwritten;
    o->table_bytes = fresh.table_bytes;
    return 0;
}

// Only what is not a hole of the file.
static int table_read(struct blk_overlay *o, struct error *err)
{
    off_t end = (off_t)(TABLE_OFFSET + o->table_bytes);
    off_t at = lseek(o->file.fd, TABLE_OFFSET, SEEK_DATA);
    while (at >= 0 && at < end) {
        off_t hole = lseek(o->file.fd, at, SEEK_HOLE);
        if (hole < 0)
            return error_errno(err, "%s", o->file.path);
        size_t len = (size_t)((hole < end ? hole : end) - at);
        ssize_t n = pread(o->file.fd, o->present + (at - TABLE_OFFSET), len, at);
        if (n <= 0)
            return n ? error_errno(err, "%s: table", o->file.path)
                     : error_set(err, -ENODATA, "%s: table cut off", o->file.path);
        at = lseek(o->file.fd, at + n, SEEK_DATA);
    }
    if (at < 0 && errno != ENXIO) // ENXIO: holes to the end
        return error_errno(err, "%s", o->file.path);
    memcpy(o->stable, o->present, o->table_bytes);
    return 0;
}

// --- opening

static int directory_sync(const char *path, struct error *err)
{
    autofree char *copy = strdup(path);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory");
    autoclose int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) // EINVAL: nothing there that could be synced
        return error_errno(err, "directory of %s", path);
    return 0;
}

static int overlay_make(struct blk_overlay *o, struct error *err)
{
    struct header h = {.version = VERSION, .cluster = BLK_CLUSTER};
    memcpy(h.magic, magic, sizeof(magic));
    int ret = base_identify(o->base, &h, err);
    if (ret)
        return ret;
    h.size = h.base_size;
    if (h.size > BLK_OVERLAY_MAX)
        return error_set(err, -EFBIG, "%s: %llu bytes: expected at most %llu under an overlay",
                         o->base->path, (unsigned long long)h.size, BLK_OVERLAY_MAX);
    // Holes cost nothing: room for the table of a disk that grows.
    uint64_t room = 16 * h.size > 64 * GiB ? 16 * h.size : 64 * GiB;
    h.data_offset = TABLE_OFFSET + table_size(room < BLK_OVERLAY_MAX ? room : BLK_OVERLAY_MAX);
    ret = blk_image_truncate(&o->file, h.data_offset + h.size, err);
    if (!ret)
        ret = header_write(o, &h, err);
    return ret ? ret : directory_sync(o->file.path, err);
}

// Nobody else may take the empty file for new meanwhile.
static int overlay_make_locked(struct blk_overlay *o, struct error *err)
{
    uint64_t bytes;
    int ret = blk_image_lock(&o->file, err);
    if (!ret)
        ret = blk_image_bytes(&o->file, &bytes, err);
    if (!ret && !bytes)
        ret = overlay_make(o, err);
    return ret;
}

int blk_overlay_load(struct blk_overlay *o, struct error *err)
{
    table_free(o);
    int ret = header_read(o, err);
    if (!ret)
        ret = table_alloc(o, o->size, err);
    return ret ? ret : table_read(o, err);
}

int blk_overlay_open(struct blk_overlay *o, const char *path, const struct blk_image_mode *mode,
                     struct blk_image *base, bool later, struct error *err)
{
    uint64_t bytes = 0;
    *o = (struct blk_overlay) {.base = base};
    int ret = blk_image_open(&o->file, path, mode, err);
    if (!ret && o->file.block_device)
        ret = error_set(err, -EINVAL, "%s: expected a file for an overlay", path);
    if (!ret)
        ret = blk_image_bytes(&o->file, &bytes, err);
    bool make = !ret && !bytes && mode->create;
    if (make)
        ret = overlay_make_locked(o, err);
    if (!ret)
        ret = later ? header_read(o, err) : blk_overlay_load(o, err);
    if (!ret && make && !mode->cached && o->file.direct_fd < 0) {
        // Empty, it could not be asked how O_DIRECT works.
        struct blk_image again;
        ret = blk_image_open(&again, path, mode, err);
        if (!ret && (again.inode != o->file.inode || again.device != o->file.device)) {
            blk_image_close(&again);
            ret = error_set(err, -EBUSY, "%s: replaced by another file just now", path);
        }
        if (!ret) {
            blk_image_close(&o->file);
            o->file = again;
        }
    }
    if (ret)
        blk_overlay_close(o);
    return ret;
}

void blk_overlay_close(struct blk_overlay *o)
{
    table_free(o);
    blk_image_close(&o->file);
}

// --- clusters

static bool cluster_present(const struct blk_overlay *o, uint64_t c)
{
    return o->present[c / 8] >> c % 8 & 1;
}

uint64_t blk_overlay_run(const struct blk_overlay *o, uint64_t offset, uint64_t len, bool *present)
{
    uint64_t c = offset / BLK_CLUSTER;
    *present = cluster_present(o, c);
    uint64_t end = (c + 1) * BLK_CLUSTER;
    while (end - offset < len && cluster_present(o, ++c) == *present)
        end += BLK_CLUSTER;
    return end - offset < len ? end - offset : len;
}

void blk_overlay_set(struct blk_overlay *o, uint64_t offset, uint64_t len)
{
    for (uint64_t c = offset / BLK_CLUSTER; c < clusters(offset + len); c++) {
        if (cluster_present(o, c))
            continue;
        o->present[c / 8] |= (uint8_t)(1u << c % 8);
        bitmap_set(o->changed, (size_t)(c / 8 / PAGE_SIZE));
    }
}

// --- flush

void blk_overlay_stage(struct blk_overlay *o)
{
    for (size_t w = 0; w < table_pages(o) / 64 + 1; w++) {
        for (uint64_t left = o->changed[w]; left; left &= left - 1) {
            size_t page = w * 64 + (size_t)__builtin_ctzll(left);
            memcpy(o->stable + page * PAGE_SIZE, o->present + page * PAGE_SIZE, PAGE_SIZE);
        }
        o->unwritten[w] |= o->changed[w];
        o->changed[w] = 0;
    }
    o->write_page = 0;
}

bool blk_overlay_staged(const struct blk_overlay *o)
{
    for (size_t w = 0; w < table_pages(o) / 64 + 1; w++)
        if (o->unwritten[w])
            return true;
    return false;
}

bool blk_overlay_next(struct blk_overlay *o, uint64_t *offset, void **data, size_t *len)
{
    size_t first = o->write_page, end;
    while (first < table_pages(o) && !bitmap_test(o->unwritten, first))
        first += o->unwritten[first / 64] >> first % 64 ? 1 : 64 - first % 64;
    o->write_page = first;
    if (first >= table_pages(o))
        return false;
    for (end = first + 1; end < table_pages(o) && bitmap_test(o->unwritten, end); end++)
        ;
    *offset = TABLE_OFFSET + first * PAGE_SIZE;
    *data = o->stable + first * PAGE_SIZE;
    *len = (end - first) * PAGE_SIZE;
    return true;
}

void blk_overlay_written(struct blk_overlay *o, uint64_t offset, size_t len)
{
    // A page of which a part was written is written again.
    size_t first = (size_t)(offset - TABLE_OFFSET) / PAGE_SIZE;
    for (size_t page = first; page < first + len / PAGE_SIZE; page++)
        bitmap_clear(o->unwritten, page);
}

int blk_overlay_sync(struct blk_overlay *o, struct error *err)
{
    uint64_t offset;
    void *data;
    size_t len;
    blk_overlay_stage(o);
    if (fdatasync(o->file.fd))
        return error_errno(err, "%s", o->file.path);
    if (!blk_overlay_next(o, &offset, &data, &len))
        return 0;
    do {
        ssize_t n = pwrite(o->file.fd, data, len, (off_t)offset);
        if (n < (ssize_t)PAGE_SIZE)
            return n < 0 ? error_errno(err, "%s: table", o->file.path)
                         : error_set(err, -ENOSPC, "%s: table", o->file.path);
        blk_overlay_written(o, offset, (size_t)n);
    } while (blk_overlay_next(o, &offset, &data, &len));
    return fdatasync(o->file.fd) ? error_errno(err, "%s", o->file.path) : 0;
}

// --- changes of the whole

int blk_overlay_grow(struct blk_overlay *o, uint64_t size, struct error *err)
{
    struct header h;
    memcpy(&h, o->header, sizeof(h));
    if (size < o->size)
        return error_set(err, -EINVAL, "%s: %llu bytes: an overlay cannot shrink from %llu",
                         o->file.path, (unsigned long long)size, (unsigned long long)o->size);
    if (size > BLK_OVERLAY_MAX || TABLE_OFFSET + table_size(size) > o->data_offset)
        return error_set(err, -EFBIG, "%s: %llu bytes: its table has room for %llu", o->file.path,
                         (unsigned long long)size,
                         (unsigned long long)(o->data_offset - TABLE_OFFSET) * 8 * BLK_CLUSTER);
    int ret = blk_image_truncate(&o->file, o->data_offset + size, err);
    if (!ret && table_size(size) != o->table_bytes)
        ret = table_alloc(o, size, err);
    h.size = size;
    if (!ret)
        ret = header_write(o, &h, err);
    if (!ret)
        o->size = size;
    return ret;
}

int blk_overlay_freeze(struct blk_overlay *o, struct error *err)
{
    struct header h;
    memcpy(&h, o->header, sizeof(h));
    h.flags |= FROZEN;
    int ret = blk_overlay_sync(o, err);
    if (!ret)
        ret = header_write(o, &h, err);
    if (!ret)
        o->frozen = true;
    return ret;
}
