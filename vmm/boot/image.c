// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "vmm/boot/loader.h"

int image_open(struct image *img, const char *what, const char *path, struct error *err)
{
    *img = (struct image) {.fd = -1};
    snprintf(img->name, sizeof(img->name), "%s %s", what, path);
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "%s", img->name);
    struct stat st;
    if (fstat(fd, &st))
        return error_errno(err, "%s", img->name);
    if (S_ISDIR(st.st_mode))
        return error_set(err, -EISDIR, "%s: is a directory, expected a file", img->name);
    if (!S_ISREG(st.st_mode))
        return error_set(err, -EINVAL, "%s: is not a regular file", img->name);
    if (!st.st_size)
        return error_set(err, -ENOEXEC, "%s: the file is empty", img->name);
    img->size = (uint64_t)st.st_size;
    img->fd = take_fd(&fd);
    return 0;
}

void image_close(struct image *img)
{
    if (img->fd >= 0)
        close(img->fd);
    img->fd = -1;
}

struct image image_from_memory(const char *name, const void *data, uint64_t size)
{
    struct image img = {.fd = -1, .data = data, .size = size};
    snprintf(img.name, sizeof(img.name), "%s", name);
    return img;
}

// pread until all is there: the file may shrink while we read it.
static int file_read(const struct image *img, uint64_t offset, void *data, uint64_t len,
                     struct error *err)
{
    uint8_t *p = data;
    while (len) {
        ssize_t n = pread(img->fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_errno(err, "%s: reading at offset %#llx", img->name,
                               (unsigned long long)offset);
        if (!n)
            return error_set(err, -EIO, "%s: became shorter than %#llx bytes while it was read",
                             img->name, (unsigned long long)img->size);
        p += n;
        offset += (uint64_t)n;
        len -= (uint64_t)n;
    }
    return 0;
}

static int range_check(const struct image *img, uint64_t offset, uint64_t len, struct error *err)
{
    if (range_within(offset, len, img->size))
        return 0;
    return error_set(err, -ENOEXEC,
                     "%s: too short: %#llx bytes at offset %#llx expected, the file has %#llx",
                     img->name, (unsigned long long)len, (unsigned long long)offset,
                     (unsigned long long)img->size);
}

int image_read(const struct image *img, uint64_t offset, void *data, uint64_t len,
               struct error *err)
{
    int ret = range_check(img, offset, len, err);
    if (ret)
        return ret;
    if (img->fd >= 0)
        return file_read(img, offset, data, len, err);
    memcpy(data, img->data + offset, len);
    return 0;
}

// Makes the pages there in one call instead of one fault each, and as huge pages where whole ones
// will be filled anyway, so that they waste nothing; only a matter of speed (3x on a 10 MiB
// kernel).
static void populate(uint8_t *start, uint64_t len)
{
#ifdef MADV_POPULATE_WRITE
    uintptr_t huge = align_up((uintptr_t)start, HUGE_PAGE);
    uintptr_t huge_end = align_down((uintptr_t)start + len, HUGE_PAGE);
    if (huge_end > huge)
        madvise((void *)huge, huge_end - huge, MADV_HUGEPAGE);
    uintptr_t from = align_down((uintptr_t)start, PAGE_SIZE);
    madvise((void *)from, align_up((uintptr_t)start + len, PAGE_SIZE) - from, MADV_POPULATE_WRITE);
#else
    (void)start, (void)len;
#endif
}

// Reads the parts of the file that are not holes: neither the page cache nor guest RAM is touched
// for the rest. File systems without SEEK_DATA report one part.
static int file_read_sparse(const struct image *img, uint64_t offset, uint8_t *to, uint64_t len,
                            struct error *err)
{
    uint64_t end = offset + len;
    for (uint64_t at = offset; at < end;) {
        off_t data = lseek(img->fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return 0; // a hole up to the end of the file
        off_t hole = data < 0 ? -1 : lseek(img->fd, data, SEEK_HOLE);
        uint64_t start = data < 0 ? at : (uint64_t)data;
        uint64_t stop = hole <= data || (uint64_t)hole > end ? end : (uint64_t)hole;
        if (start >= end)
            return 0;
        populate(to + (start - offset), stop - start);
        int ret = file_read(img, start, to + (start - offset), stop - start, err);
        if (ret)
            return ret;
        at = stop;
    }
    return 0;
}

static bool all_zero(const uint8_t *p, uint64_t len)
{
    return !len || (!p[0] && !memcmp(p, p + 1, len - 1));
}

static void copy_nonzero_pages(uint8_t *to, const uint8_t *from, uint64_t len)
{
    while (len) {
        uint64_t n = PAGE_SIZE - (uintptr_t)to % PAGE_SIZE;
        n = n < len ? n : len;
        if (!all_zero(from, n))
            memcpy(to, from, n);
        to += n;
        from += n;
        len -= n;
    }
}

int image_read_ram(const struct image *img, uint64_t offset, struct ram *ram, uint64_t gpa,
                   uint64_t len, struct error *err)
{
    uint8_t *to = ram_at(ram, gpa, len);
    if (!to)
        return error_set(err, -EFAULT, "%s: %#llx bytes at address %#llx are not RAM", img->name,
                         (unsigned long long)len, (unsigned long long)gpa);
    int ret = range_check(img, offset, len, err);
    if (ret)
        return ret;
    if (img->fd >= 0)
        ret = file_read_sparse(img, offset, to, len, err);
    else
        copy_nonzero_pages(to, img->data + offset, len);
    ram_mark_dirty(ram, gpa, len);
    return ret;
}
