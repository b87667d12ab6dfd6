// SPDX-License-Identifier: Apache-2.0
// A hostile overlay file over a base of 64 KiB: opened, looked through, written to, flushed, grown
// and opened again. Its checksum and what it says of its base are made right first when the first
// byte of the input is odd, so that the checks behind them are reached.
//
//   input := u8 how, header[64], then pieces of the file: u16 place in 16 bytes, u8 length, bytes
#include "devices/blk_overlay.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include "vmm/util.h"

enum { DISK = 64 * 1024, HEADER = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int base_fd(void)
{
    static int fd; // of the process
    if (!fd) {
        fd = memfd_create("base", 0);
        if (fd <= 0 || ftruncate(fd, DISK))
            abort();
    }
    return fd;
}

static void base_open(struct blk_image *base)
{
    char path[32];
    const struct blk_image_mode mode = {.read_only = true, .cached = true};
    snprintf(path, sizeof(path), "/proc/self/fd/%d", base_fd());
    if (blk_image_open(base, path, &mode, NULL))
        abort();
}

// A good overlay's file, then the input's header and pieces.
static void file_make(int fd, const char *path, struct blk_image *base, const uint8_t *data,
                      size_t size)
{
    struct blk_overlay o;
    uint8_t good[HEADER], h[HEADER] = {0};
    const struct blk_image_mode mode = {.cached = true, .create = true};
    uint8_t how = size ? data[0] : 0;
    if (blk_overlay_open(&o, path, &mode, base, false, NULL))
        abort();
    memcpy(good, o.header, sizeof(good));
    blk_overlay_close(&o);
    data += size ? 1 : 0;
    size -= size ? 1 : 0;
    size_t n = size < sizeof(h) ? size : sizeof(h);
    memcpy(h, data, n);
    if (how & 1) {
        memcpy(h, good, 24);           // magic, version, cluster, flags, base_head
        memcpy(h + 32, good + 32, 20); // base
        if (how & 2)
            memcpy(h + 24, good + 24, 8); // size
        if (how & 4)
            memcpy(h + 56, good + 56, 8); // data_offset
        memset(h + 52, 0, 4);
        uint32_t crc = (uint32_t)crc32(0, h, sizeof(h));
        memcpy(h + 52, &crc, 4);
    }
    if (pwrite(fd, h, sizeof(h), 0) != sizeof(h))
        abort();
    for (data += n, size -= n; size > 3;) {
        off_t at = (data[0] | data[1] << 8) * 16;
        size_t len = data[2] < size - 3 ? data[2] : size - 3;
        if (len && at >= HEADER && pwrite(fd, data + 3, len, at) != (ssize_t)len)
            abort();
        data += 3 + len;
        size -= 3 + len;
    }
    if (how & 8 && ftruncate(fd, 4096 * (how >> 4)))
        abort();
}

static void overlay_use(struct blk_overlay *o)
{
    bool present;
    struct error err;
    uint64_t end = o->size < 1 << 22 ? o->size : 1 << 22, sum = 0;
    for (uint64_t at = 0; at < end;) {
        uint64_t len = blk_overlay_run(o, at, end - at, &present);
        if (!len || len > end - at)
            abort();
        at += len;
        sum += present;
    }
    blk_overlay_set(o, o->size - 1, 1);
    if (blk_overlay_run(o, o->size - 1, 1, &present) != 1 || !present || sum > end)
        abort();
    blk_overlay_sync(o, &err);
    blk_overlay_grow(o, o->size + 512, &err);
    blk_overlay_set(o, 0, o->size < 1 << 22 ? o->size : 1 << 22);
    blk_overlay_sync(o, &err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[32];
    struct error err;
    struct blk_image base;
    struct blk_overlay o;
    const struct blk_image_mode mode = {.cached = true};
    int fd = memfd_create("overlay", 0);
    if (fd < 0)
        abort();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    base_open(&base);
    file_make(fd, path, &base, data, size);
    if (!blk_overlay_open(&o, path, &mode, &base, false, &err)) {
        overlay_use(&o);
        if (blk_overlay_load(&o, &err))
            abort(); // what we wrote ourselves
        blk_overlay_close(&o);
    }
    blk_image_close(&base);
    close(fd);
    return 0;
}
