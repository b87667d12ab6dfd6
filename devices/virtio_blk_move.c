// SPDX-License-Identifier: Apache-2.0
// The block device's image on its way between hosts (vmm/disk.h).
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <zlib.h>

#include "devices/blk_frozen.h"
#include "devices/virtio_blk_parts.h"
#include "vmm/disk.h"
#include "vmm/vm.h"

#define SUM_BYTES  (1 * GiB)  // of a base that are looked at
#define LOOK_BYTES (64 * MiB) // of an overlay's disk at a time, under the lock

// --- what it is

static void move_info(struct device *dev, struct disk_info *info)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    *info = (struct disk_info) {.path = written_image(b)->path,
                                .size = b->capacity,
                                .read_only = b->config.read_only,
                                .overlay = has_overlay(b),
                                .base_size = has_overlay(b) ? b->overlay.base_size : 0};
    memcpy(info->since, b->since_id, DISK_ID_LEN);
    pthread_mutex_unlock(&dev->lock);
}

static int image_read(const struct blk_image *i, bool direct, uint64_t offset, void *data,
                      uint64_t len, struct error *err)
{
    direct = direct && i->direct_fd >= 0 && !((offset | len) & (i->offset_align - 1)) &&
             !((uintptr_t)data & (i->memory_align - 1));
    for (uint64_t done = 0; done < len;) {
        ssize_t n = pread(direct ? i->direct_fd : i->fd, (uint8_t *)data + done,
                          (size_t)(len - done), (off_t)(offset + done));
        if (n < 0 && direct && errno == EINVAL) // a stricter alignment than we were told
            n = 0;
        else if (n < 0 && errno != EINTR)
            return error_errno(err, "%s: byte %llu", i->path, (unsigned long long)(offset + done));
        else if (!n && !direct)
            return error_set(err, -ENODATA, "%s: ends after %llu bytes", i->path,
                             (unsigned long long)(offset + done));
        direct = direct && n == (ssize_t)(len - done);
        done += n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

static bool all_zero(const uint8_t *data, size_t len)
{
    return !*data && !memcmp(data, data + 1, len - 1);
}

static int move_base_sum(struct device *dev, uint32_t *sum, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    uint64_t size = b->overlay.base_size, blocks = (size + DISK_BLOCK - 1) / DISK_BLOCK;
    uint64_t stride = (blocks + SUM_BYTES / DISK_BLOCK - 1) / (SUM_BYTES / DISK_BLOCK);
    autofree uint8_t *data = NULL;
    uLong crc = crc32(0, NULL, 0);
    if (posix_memalign((void **)&data, DISK_UNIT, DISK_BLOCK)) {
        data = NULL;
        return error_set(err, -ENOMEM, "no memory for %d bytes", DISK_BLOCK);
    }
    for (uint64_t block = 0; block < blocks; block += stride ? stride : 1) {
        uint64_t at = block * DISK_BLOCK, len = size - at < DISK_BLOCK ? size - at : DISK_BLOCK;
        off_t next = lseek(b->image.fd, (off_t)at, SEEK_DATA);
        if (next < 0 && errno == ENXIO)
            break;
        if (next >= (off_t)(at + len)) // a hole, as zeroes are
            continue;
        int ret = image_read(&b->image, false, at, data, len, err);
        if (ret)
            return ret;
        if (all_zero(data, len))
            continue;
        crc = crc32(crc, (const uint8_t *)&at, sizeof(at));
        crc = crc32(crc, data, (uInt)len);
    }
    *sum = (uint32_t)crc;
    return 0;
}

// --- the source's side

static int move_watch(struct device *dev, _Atomic uint64_t *written, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    bool busy = written && b->written, absent = written && blk_absent_left(b);
    if (!busy && !absent)
        b->written = written;
    pthread_mutex_unlock(&dev->lock);
    if (absent)
        return error_set(err, -EBUSY,
                         "%s: blocks of it are still at the host that the guest came "
                         "from: it can move on when they are here",
                         b->image.path);
    return busy ? error_set(err, -EBUSY, "%s: is moved already", written_image(b)->path) : 0;
}

void blk_written(struct virtio_blk *b, const struct blk_request *r)
{
    for (unsigned i = 0; i < r->nr_ranges; i++) {
        const struct blk_range *s = &r->ranges[i];
        uint64_t last = (s->offset + s->len - 1) / DISK_BLOCK;
        for (uint64_t block = s->offset / DISK_BLOCK; block <= last; block++) {
            if (b->written)
                atomic_fetch_or(&b->written[block / 64], 1ull << block % 64);
            if (b->since)
                atomic_fetch_or(&b->since[block / 64], 1ull << block % 64);
        }
    }
}

static void overlay_data(struct virtio_blk *b, uint64_t offset, uint64_t *from, uint64_t *to)
{
    uint64_t end = b->capacity - offset < LOOK_BYTES ? b->capacity : offset + LOOK_BYTES;
    bool present = false;
    *from = *to = offset;
    while (*to < end && !present) {
        *from = *to;
        *to += blk_overlay_run(&b->overlay, *from, end - *from, &present);
    }
    *from = present ? *from : *to;
}

static int move_data(struct device *dev, uint64_t offset, uint64_t *from, uint64_t *to,
                     struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    if (has_overlay(b)) {
        pthread_mutex_lock(&dev->lock);
        overlay_data(b, offset, from, to);
        pthread_mutex_unlock(&dev->lock);
        return 0;
    }
    off_t data = lseek(b->image.fd, (off_t)offset, SEEK_DATA), hole = -1;
    if (data >= 0)
        hole = lseek(b->image.fd, data, SEEK_HOLE);
    *from = data >= 0 ? (uint64_t)data : errno == ENXIO ? b->capacity : offset;
    *to = hole >= 0 && (uint64_t)hole < b->capacity ? (uint64_t)hole : b->capacity;
    *from = *from < *to ? *from : *to;
    return 0;
}

static int move_read(struct device *dev, uint64_t offset, void *data, uint64_t len,
                     struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    return image_read(written_image(b), true, offset + b->engine.shift, data, len, err);
}

// --- what is left behind, and comes back

// An image that a guest left says so in an attribute of its file: by which move, and how it was
// then. Whatever writes to it changes the time.
#define LEFT_NAME "user.ferry.left"
enum { LEFT_MAX = 160 };

static bool left_text(const struct blk_image *i, const uint8_t id[DISK_ID_LEN], char text[LEFT_MAX])
{
    struct stat st;
    char hex[2 * DISK_ID_LEN + 1];
    if (i->block_device || fstat(i->fd, &st))
        return false;
    for (unsigned n = 0; n < DISK_ID_LEN; n++)
        snprintf(hex + 2 * n, 3, "%02x", id[n]);
    snprintf(text, LEFT_MAX, "move %s, %lld bytes, modified %lld.%09ld", hex, (long long)st.st_size,
             (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    return true;
}

// Where it cannot be written the way back is only longer.
static void left_write(const struct blk_image *i, const uint8_t id[DISK_ID_LEN])
{
    char text[LEFT_MAX];
    if (left_text(i, id, text) && fsetxattr(i->fd, LEFT_NAME, text, strlen(text), 0))
        fremovexattr(i->fd, LEFT_NAME);
}

static bool left_is(const struct blk_image *i, const uint8_t id[DISK_ID_LEN])
{
    static const uint8_t none[DISK_ID_LEN];
    char text[LEFT_MAX], says[LEFT_MAX];
    if (!memcmp(id, none, DISK_ID_LEN) || !left_text(i, id, text))
        return false;
    ssize_t n = fgetxattr(i->fd, LEFT_NAME, says, sizeof(says));
    return n == (ssize_t)strlen(text) && !memcmp(text, says, (size_t)n);
}

static void move_left(struct device *dev, const uint8_t id[DISK_ID_LEN])
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    b->gone = true;
    pthread_mutex_unlock(&dev->lock);
    if (!has_overlay(b))
        left_write(&b->image, id);
}

static void move_changed(struct device *dev, uint64_t *blocks)
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    for (uint64_t w = 0; b->since && w * 64 * DISK_BLOCK < b->capacity; w++)
        blocks[w] |= atomic_load(&b->since[w]);
    pthread_mutex_unlock(&dev->lock);
}

void blk_since_drop(struct virtio_blk *b)
{
    free((void *)b->since);
    b->since = NULL;
    memset(b->since_id, 0, DISK_ID_LEN);
}

// Without memory for the map the way back is only longer. Overlays are not kept: a rollback
// replaces what they hold.
static void move_arrived(struct device *dev, const uint8_t id[DISK_ID_LEN])
{
    struct virtio_blk *b = blk_of_device(dev);
    pthread_mutex_lock(&dev->lock);
    b->made = b->filling = b->kept = false;
    blk_since_drop(b);
    if (!has_overlay(b))
        b->since = calloc((size_t)(b->capacity / DISK_BLOCK / 64 + 1), sizeof(*b->since));
    if (b->since)
        memcpy(b->since_id, id, DISK_ID_LEN);
    pthread_mutex_unlock(&dev->lock);
}

// --- the destination's side

static bool file_empty(const struct blk_image *i)
{
    return lseek(i->fd, 0, SEEK_DATA) < 0 && errno == ENXIO;
}

static int expect_device(struct virtio_blk *b, uint64_t size, struct error *err)
{
    struct blk_image *i = &b->image;
    uint64_t bytes;
    int ret = blk_image_bytes(i, &bytes, err);
    if (!ret && bytes != size)
        ret = error_set(err, -EINVAL, "%s has %llu bytes, the disk that comes has %llu", i->path,
                        (unsigned long long)bytes, (unsigned long long)size);
    if (!ret && !b->config.overwrite)
        ret = error_set(err, -EEXIST,
                        "%s: a block device cannot be seen to be empty: to lose what is in it: "
                        "ferry receive --disk-overwrite",
                        i->path);
    if (!ret && fallocate(i->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size))
        ret = error_errno(err, "%s: cannot be emptied", i->path);
    return ret;
}

static int expect_file(struct virtio_blk *b, const struct disk_info *disk, struct error *err)
{
    struct blk_image *i = &b->image;
    uint64_t bytes, size = disk->size;
    int ret = blk_image_bytes(i, &bytes, err);
    b->kept = !ret && bytes == size && left_is(i, disk->since);
    if (b->kept) {
        memcpy(b->kept_id, disk->since, DISK_ID_LEN);
        return 0;
    }
    if (!ret && bytes && (bytes != size || !file_empty(i)) && !b->config.overwrite)
        ret = error_set(err, -EEXIST,
                        "%s has %llu bytes%s, the disk that comes has %llu: to lose what is there: "
                        "ferry receive --disk-overwrite",
                        i->path, (unsigned long long)bytes, file_empty(i) ? "" : " and data",
                        (unsigned long long)size);
    b->filling = !ret;
    if (!ret && bytes)
        ret = blk_image_truncate(i, 0, err);
    return ret ? ret : blk_image_truncate(i, size, err);
}

static int expect_overlay(struct virtio_blk *b, const struct disk_info *disk, uint32_t base_sum,
                          struct error *err)
{
    struct blk_overlay *o = &b->overlay;
    uint64_t from, to = 0;
    uint32_t sum = 0;
    int ret = blk_overlay_load(o, err);
    if (!ret && disk->base_size == o->base_size)
        ret = move_base_sum(&b->v.dev, &sum, err);
    if (ret)
        return ret;
    if (disk->base_size != o->base_size || sum != base_sum)
        return error_set(err, -EINVAL,
                         "%s is another base than the source's (%llu bytes, sum %08x; expected "
                         "%llu, %08x): copy that one here, and give the overlay a new name",
                         b->image.path, (unsigned long long)o->base_size, sum,
                         (unsigned long long)disk->base_size, base_sum);
    b->capacity = o->size;
    do
        overlay_data(b, to, &from, &to);
    while (from == to && to < o->size);
    if (from < to)
        return error_set(err, -EEXIST, "%s: an overlay with data: remove it, or name another",
                         o->file.path);
    b->filling = true;
    return o->size == disk->size ? 0 : blk_overlay_grow(o, disk->size, err);
}

static int expect(struct virtio_blk *b, const struct disk_info *disk, uint32_t base_sum,
                  struct error *err)
{
    unsigned n = b->v.dev.instance;
    struct blk_image *i = written_image(b);
    if (b->config.read_only || disk->overlay != has_overlay(b))
        return error_set(err, -EINVAL, "disk%u: %s here, %s at the source", n,
                         b->config.read_only ? "read-only"
                         : has_overlay(b)    ? "an overlay"
                                             : "a whole image",
                         disk->overlay ? "an overlay" : "a whole image");
    if (!b->config.comes)
        return error_set(err, -EINVAL, "disk%u: %s is not for a disk that comes with a guest", n,
                         i->path);
    int ret = blk_image_lock(i, err);
    if (ret == -EBUSY)
        error_prefix(err, "disk%u (an image that both hosts see does not move: leave --disk out)",
                     n);
    if (ret)
        return ret;
    ret = has_overlay(b)    ? expect_overlay(b, disk, base_sum, err)
          : i->block_device ? expect_device(b, disk->size, err)
                            : expect_file(b, disk, err);
    if (ret)
        return error_prefix(err, "disk%u", n);
    b->capacity = disk->size;
    b->engine.shift = has_overlay(b) ? b->overlay.data_offset : 0;
    blk_space_capacity(b);
    return 0;
}

static int move_expect(struct device *dev, const struct disk_info *disk, uint32_t base_sum,
                       bool *kept, struct error *err)
{
    pthread_mutex_lock(&dev->lock);
    int ret = expect(blk_of_device(dev), disk, base_sum, err);
    *kept = !ret && blk_of_device(dev)->kept;
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

static int image_write(const struct blk_image *i, uint64_t offset, const void *data, uint64_t len,
                       struct error *err)
{
    for (uint64_t done = 0; done < len;) {
        ssize_t n = pwrite(i->fd, (const uint8_t *)data + done, (size_t)(len - done),
                           (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? error_errno(err, "%s: byte %llu", i->path, (unsigned long long)offset)
                     : error_set(err, -ENOSPC, "%s: byte %llu", i->path,
                                 (unsigned long long)offset);
        done += (uint64_t)n;
    }
    return 0;
}

static int move_write(struct device *dev, uint64_t offset, const void *data, uint64_t len,
                      struct error *err)
{
    static const uint8_t zeroes[DISK_BLOCK];
    struct virtio_blk *b = blk_of_device(dev);
    const struct blk_image *i = written_image(b);
    uint64_t at = offset + b->engine.shift;
    int ret = 0;
    if (data)
        ret = image_write(i, at, data, len, err);
    else if (fallocate(i->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)len))
        ret = image_write(i, at, zeroes, len, err);
    if (ret || !has_overlay(b))
        return ret;
    pthread_mutex_lock(&dev->lock);
    blk_overlay_set(&b->overlay, offset, len);
    pthread_mutex_unlock(&dev->lock);
    return 0;
}

static int move_sync(struct device *dev, struct error *err)
{
    struct virtio_blk *b = blk_of_device(dev);
    if (!has_overlay(b)) { // without the lock: the guest may run, with blocks still to come
        if (fdatasync(b->image.fd))
            return error_errno(err, "%s", b->image.path);
        // The kernel tells an error once: it may have told the guest's own flush.
        bool failed = __atomic_load_n(&b->engine.flush_failed, __ATOMIC_RELAXED);
        return failed && !b->flush_failed
                   ? error_set(err, -EIO, "%s: could not be written", b->image.path)
                   : 0;
    }
    pthread_mutex_lock(&dev->lock);
    int ret = blk_overlay_sync(&b->overlay, err);
    pthread_mutex_unlock(&dev->lock);
    return ret;
}

static void move_forget(struct device *dev)
{
    struct virtio_blk *b = blk_of_device(dev);
    struct blk_image *i = written_image(b);
    struct stat st;
    uint64_t bytes = 0;
    pthread_mutex_lock(&dev->lock);
    if (b->filling && ftruncate(i->fd, 0))
        log_write(&dev->vm->log, LOG_WARN, "%s: half of a disk is left in it: %s", i->path,
                  strerror(errno));
    bool ours = b->made && !stat(i->path, &st) && st.st_ino == i->inode && st.st_dev == i->device;
    if (ours && (has_overlay(b) || b->filling || (!blk_image_bytes(i, &bytes, NULL) && !bytes)))
        unlink(i->path);
    if (b->kept) // what came are blocks that will come again
        left_write(i, b->kept_id);
    b->filling = b->made = b->kept = false;
    pthread_mutex_unlock(&dev->lock);
}

const struct disk_ops blk_disk_ops = {
    .info = move_info,
    .base_sum = move_base_sum,
    .watch = move_watch,
    .data = move_data,
    .read = move_read,
    .changed = move_changed,
    .left = move_left,
    .expect = move_expect,
    .write = move_write,
    .sync = move_sync,
    .arrived = move_arrived,
    .forget = move_forget,
    .lack = blk_lack,
    .wanted = blk_wanted,
    .fill_begin = blk_fill_begin,
    .fill_end = blk_fill_end,
    .missing = blk_missing,
    .lack_end = blk_lack_end,
    .is_overlay = blk_is_overlay,
    .settle = blk_settle,
    .freeze = blk_freeze,
    .frozen_step = blk_frozen_step,
    .freeze_end = blk_freeze_end,
};
