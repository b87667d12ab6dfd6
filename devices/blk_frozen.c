// SPDX-License-Identifier: Apache-2.0
#include "devices/blk_frozen.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vmm/util.h"

enum { STRETCH = 256 * 1024 }; // bytes at a time: what a writer may have to wait for

struct blk_frozen {
    int from, to;
    uint64_t data_offset, size, clusters; // size: bytes of the disk
    size_t table_bytes;
    uint8_t header[BLK_SECTOR];
    uint8_t *table; // as it was
    pthread_mutex_t lock;
    uint8_t *todo;   // of `table`, what has not been copied
    uint64_t cursor; // no bit of todo below
    uint64_t alike;  // up to here the file is all a hole, or all data
    bool hole;
    int error;
    uint8_t data[STRETCH];
};

static bool bit_get(const uint8_t *bits, uint64_t c)
{
    return bits[c / 8] >> c % 8 & 1;
}

// The next cluster from `c` on, below `end`, that is still to be copied; `end`: none.
static uint64_t todo_find(const struct blk_frozen *f, uint64_t c, uint64_t end)
{
    for (; c < end; c++) {
        uint64_t word;
        while (c % 64 == 0 && c + 64 <= end) {
            memcpy(&word, f->todo + c / 8, sizeof(word)); // whole pages: it is there
            if (word)
                break;
            c += 64;
        }
        if (c < end && bit_get(f->todo, c))
            break;
    }
    return c < end ? c : end;
}

int blk_frozen_create(struct blk_frozen **out, const struct blk_overlay *o, int to,
                      struct error *err)
{
    struct blk_frozen *f = calloc(1, sizeof(*f));
    if (!f)
        return error_set(err, -ENOMEM, "no memory for a copy of %s", o->file.path);
    pthread_mutex_init(&f->lock, NULL);
    f->to = to;
    f->from = fcntl(o->file.fd, F_DUPFD_CLOEXEC, 0);
    f->data_offset = o->data_offset;
    f->size = o->size;
    f->table_bytes = o->table_bytes;
    f->clusters = (o->size + BLK_CLUSTER - 1) / BLK_CLUSTER;
    memcpy(f->header, o->header, sizeof(f->header));
    f->table = malloc(f->table_bytes);
    f->todo = malloc(f->table_bytes);
    int ret = 0;
    if (f->from < 0)
        ret = error_errno(err, "%s", o->file.path);
    else if (!f->table || !f->todo)
        ret = error_set(err, -ENOMEM, "no memory for a copy of %s", o->file.path);
    else if (ftruncate(to, (off_t)(o->data_offset + o->size)))
        ret = error_errno(err, "copying overlay %s", o->file.path);
    if (ret) {
        blk_frozen_free(f);
        return ret;
    }
    memcpy(f->table, o->present, f->table_bytes);
    memcpy(f->todo, o->present, f->table_bytes);
    *out = f;
    return 0;
}

void blk_frozen_free(struct blk_frozen *f)
{
    if (!f)
        return;
    if (f->from >= 0)
        close(f->from);
    pthread_mutex_destroy(&f->lock);
    free(f->table);
    free(f->todo);
    free(f);
}

// --- copying

static bool page_empty(const uint8_t *page)
{
    return !page[0] && !memcmp(page, page + 1, PAGE_SIZE - 1);
}

// Zeroes are there already.
static int bytes_write(struct blk_frozen *f, uint64_t at, size_t len)
{
    for (size_t done = 0, end; done < len; done = end) {
        bool whole = len - done >= PAGE_SIZE, empty = whole && page_empty(f->data + done);
        end = whole ? done + PAGE_SIZE : len;
        while (!empty && len - end >= PAGE_SIZE && !page_empty(f->data + end))
            end += PAGE_SIZE;
        while (!empty && done < end) {
            ssize_t n = pwrite(f->to, f->data + done, end - done, (off_t)(at + done));
            if (n < 0 && errno != EINTR)
                return -errno;
            done += n > 0 ? (size_t)n : 0;
        }
    }
    return 0;
}

static int bytes_copy(struct blk_frozen *f, uint64_t at, uint64_t end)
{
    int ret = 0;
    while (!ret && at < end) {
        ssize_t n = pread(f->from, f->data, end - at < STRETCH ? end - at : STRETCH, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        ret = n > 0 ? bytes_write(f, at, (size_t)n) : n ? -errno : -ENODATA;
        at += n > 0 ? (uint64_t)n : 0;
    }
    return ret;
}

// Whether the file has a hole (a discard's) at `at`, and how far that is so: asked once for each
// stretch of data or hole, since some file systems look at every page of it. What changes meanwhile
// has been copied.
static int hole_find(struct blk_frozen *f, uint64_t at)
{
    off_t data = lseek(f->from, (off_t)at, SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        return -errno;
    f->hole = data != (off_t)at;
    off_t end = data < 0 ? INT64_MAX : f->hole ? data : lseek(f->from, (off_t)at, SEEK_HOLE);
    if (end < 0)
        return -errno;
    f->alike = (uint64_t)end;
    return 0;
}

static int run_copy(struct blk_frozen *f, uint64_t first, uint64_t end, bool in_order)
{
    uint64_t at = f->data_offset + first * BLK_CLUSTER, stop = f->data_offset + end * BLK_CLUSTER;
    stop = stop < f->data_offset + f->size ? stop : f->data_offset + f->size;
    int ret = 0;
    for (uint64_t to; !ret && at < stop; at = to) {
        if (in_order && at >= f->alike)
            ret = hole_find(f, at);
        to = in_order && f->alike < stop ? f->alike : stop;
        if (!ret && !(in_order && f->hole))
            ret = bytes_copy(f, at, to);
    }
    return ret;
}

// The first run of clusters in [first, end), at most a stretch; gives where to go on. Locked.
static uint64_t run_take(struct blk_frozen *f, uint64_t first, uint64_t end, bool in_order)
{
    uint64_t c = todo_find(f, first, end), last = c;
    if (c == end || f->error)
        return end;
    while (last < end && last - c < STRETCH / BLK_CLUSTER && bit_get(f->todo, last))
        last++;
    f->error = run_copy(f, c, last, in_order);
    for (uint64_t i = c; i < last; i++)
        f->todo[i / 8] &= (uint8_t) ~(1u << i % 8);
    return last;
}

void blk_frozen_keep(struct blk_frozen *f, uint64_t offset, uint64_t len)
{
    uint64_t c = offset / BLK_CLUSTER, end = (offset + len - 1) / BLK_CLUSTER + 1;
    end = end < f->clusters ? end : f->clusters; // the disk may have grown
    pthread_mutex_lock(&f->lock);
    while (c < end)
        c = run_take(f, c, end, false);
    pthread_mutex_unlock(&f->lock);
}

static int table_write(struct blk_frozen *f)
{
    for (size_t at = 0; at < f->table_bytes; at += PAGE_SIZE)
        if (!page_empty(f->table + at) &&
            pwrite(f->to, f->table + at, PAGE_SIZE, (off_t)(BLK_OVERLAY_TABLE + at)) != PAGE_SIZE)
            return errno ? -errno : -EIO;
    if (pwrite(f->to, f->header, sizeof(f->header), 0) != sizeof(f->header))
        return errno ? -errno : -EIO;
    return 0;
}

int blk_frozen_step(struct blk_frozen *f, struct error *err)
{
    pthread_mutex_lock(&f->lock);
    f->cursor = run_take(f, f->cursor, f->clusters, true);
    bool more = !f->error && f->cursor < f->clusters;
    int ret = f->error;
    pthread_mutex_unlock(&f->lock);
    if (!more && !ret) {
        errno = 0;
        ret = table_write(f);
    }
    if (ret)
        return error_set(err, ret, "copying an overlay: %s", strerror(-ret));
    return more;
}
