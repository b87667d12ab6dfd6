// SPDX-License-Identifier: Apache-2.0
// The compressed kernel inside a bzImage, unpacked on the host: at host speed, and once, while a
// guest's own decompressor may run on slow emulated instructions.
#include <errno.h>
#include <lz4.h>
#include <lzma.h>
#include <string.h>
#include <sys/mman.h>
#include <zlib.h>
#include <zstd.h>

#include "vmm/boot/loader.h"

// The legacy LZ4 frame (lz4_Frame_format.md, "Legacy frame"): magic, then blocks of a 32-bit length
// and that many bytes, each of at most 8 MiB unpacked.
#define LZ4_LEGACY_MAGIC 0x184c2102u
#define LZ4_LEGACY_BLOCK (8u << 20)

// Linux packs with a 32 MiB dictionary.
#define XZ_MEMORY_LIMIT (256 * MiB)

struct stream {
    const char *name; // of the image, for messages
    const uint8_t *in;
    size_t len;
    uint8_t *out;
    size_t size; // bytes expected, no more are written
};

// Unpackers return the number of bytes produced, at most s->size, or -errno.
typedef int64_t (*unpacker)(const struct stream *s, struct error *err);

static int64_t unpack_gzip(const struct stream *s, struct error *err)
{
    z_stream z = {.next_in = (Bytef *)s->in,
                  .avail_in = (uInt)s->len,
                  .next_out = s->out,
                  .avail_out = (uInt)s->size};
    if (inflateInit2(&z, MAX_WBITS + 16) != Z_OK) // + 16: expect a gzip header
        return error_set(err, -ENOMEM, "%s: no memory to unpack gzip", s->name);
    int ret = inflate(&z, Z_FINISH);
    int64_t n = (int64_t)z.total_out;
    if (ret != Z_STREAM_END)
        n = error_set(err, -ENOEXEC, "%s: gzip payload is damaged: %s", s->name,
                      z.msg                                ? z.msg
                      : z.avail_out || z.total_in < s->len ? "the stream ends early"
                                                           : "it is longer than it says");
    inflateEnd(&z);
    return n;
}

static int64_t unpack_xz(const struct stream *s, struct error *err)
{
    uint64_t memory = XZ_MEMORY_LIMIT;
    size_t in = 0, out = 0;
    lzma_ret ret =
        lzma_stream_buffer_decode(&memory, 0, NULL, s->in, &in, s->len, s->out, &out, s->size);
    if (ret == LZMA_OK)
        return (int64_t)out;
    if (ret == LZMA_MEMLIMIT_ERROR)
        return error_set(err, -ENOEXEC,
                         "%s: xz payload needs %llu MiB to unpack: at most %llu are allowed",
                         s->name, (unsigned long long)(memory / MiB), XZ_MEMORY_LIMIT / MiB);
    return error_set(err, -ENOEXEC, "%s: xz payload is damaged: %s (liblzma code %d)", s->name,
                     ret == LZMA_BUF_ERROR ? "it ends early or is longer than it says"
                                           : "it cannot be decoded",
                     ret);
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, sizeof(value));
    return value;
}

static int64_t unpack_lz4(const struct stream *s, struct error *err)
{
    size_t in = 0, out = 0;
    while (in < s->len) {
        if (s->len - in < 4)
            return error_set(err, -ENOEXEC, "%s: lz4 payload ends inside a block header at %#zx",
                             s->name, in);
        uint32_t block = get32(s->in + in);
        in += 4;
        if (block == LZ4_LEGACY_MAGIC)
            continue; // the first frame's magic, or that of one appended
        if (block > LZ4_COMPRESSBOUND(LZ4_LEGACY_BLOCK) || block > s->len - in)
            return error_set(err, -ENOEXEC,
                             "%s: lz4 payload: block of %u bytes at %#zx, %zu are left", s->name,
                             block, in - 4, s->len - in);
        size_t room = s->size - out;
        int n = LZ4_decompress_safe((const char *)s->in + in, (char *)s->out + out, (int)block,
                                    (int)(room < LZ4_LEGACY_BLOCK ? room : LZ4_LEGACY_BLOCK));
        if (n < 0)
            return error_set(err, -ENOEXEC,
                             "%s: lz4 payload: the block at %#zx is damaged or longer than the "
                             "payload says",
                             s->name, in - 4);
        in += block;
        out += (size_t)n;
    }
    return (int64_t)out;
}

static int64_t unpack_zstd(const struct stream *s, struct error *err)
{
    size_t n = ZSTD_decompress(s->out, s->size, s->in, s->len);
    if (ZSTD_isError(n))
        return error_set(err, -ENOEXEC, "%s: zstd payload is damaged: %s", s->name,
                         ZSTD_getErrorName(n));
    return (int64_t)n;
}

static const struct format {
    const char *name;
    uint8_t magic[6];
    uint8_t magic_len;
    uint8_t size_word; // bytes of the size behind the stream; gzip has it inside
    unpacker run;      // NULL: known, not supported
} formats[] = {
    {"gzip", {0x1f, 0x8b}, 2, 0, unpack_gzip},
    {"xz", {0xfd, '7', 'z', 'X', 'Z', 0}, 6, 4, unpack_xz},
    {"lz4", {0x02, 0x21, 0x4c, 0x18}, 4, 4, unpack_lz4},
    {"zstd", {0x28, 0xb5, 0x2f, 0xfd}, 4, 4, unpack_zstd},
    {"bzip2", {'B', 'Z', 'h'}, 3, 4, NULL},
    {"lzma", {0x5d, 0, 0}, 3, 4, NULL},
    {"lzo", {0x89, 'L', 'Z', 'O'}, 4, 4, NULL},
};

static const struct format *format_find(const uint8_t *in, size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++)
        if (len >= formats[i].magic_len && !memcmp(in, formats[i].magic, formats[i].magic_len))
            return &formats[i];
    return NULL;
}

static int format_check(const struct format *f, const char *name, const uint8_t *in, size_t len,
                        struct error *err)
{
    if (!f)
        return error_set(err, -ENOEXEC,
                         "%s: payload starts with %02x %02x %02x %02x: expected gzip, xz, lz4 "
                         "(legacy frame) or zstd",
                         name, len > 0 ? in[0] : 0, len > 1 ? in[1] : 0, len > 2 ? in[2] : 0,
                         len > 3 ? in[3] : 0);
    if (!f->run)
        return error_set(
            err, -ENOTSUP,
            "%s: payload is packed with %s: gzip, xz, lz4 and zstd are supported; --boot "
            "bzimage lets the guest unpack it",
            name, f->name);
    if (len < f->magic_len + 4u)
        return error_set(err, -ENOEXEC, "%s: %s payload of %zu bytes is too short", name, f->name,
                         len);
    return 0;
}

int unpack(struct unpacked *out, const char *name, const uint8_t *in, size_t len, uint64_t limit,
           struct error *err)
{
    *out = (struct unpacked) {0};
    const struct format *f = format_find(in, len);
    int ret = format_check(f, name, in, len, err);
    if (ret)
        return ret;
    uint32_t size = get32(in + len - 4);
    if (!size || size > limit)
        return error_set(err, -ENOEXEC,
                         "%s: unpacked kernel of %u KiB: expected at most the guest's %llu KiB of "
                         "memory",
                         name, size / 1024, (unsigned long long)(limit / KiB));

    // A mapping of its own goes back to the system whole, and may have huge pages.
    size_t map_len = align_up(size, 2 * MiB);
    uint8_t *data = mmap(NULL, map_len, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
        return error_errno(err, "%s: %u KiB to unpack the kernel", name, size / 1024);
    madvise(data, map_len, MADV_HUGEPAGE);
    *out = (struct unpacked) {.format = f->name, .data = data, .size = size, .map_len = map_len};

    struct stream s = {
        .name = name, .in = in, .len = len - f->size_word, .out = data, .size = size};
    int64_t n = f->run(&s, err);
    ret = n < 0 ? (int)n : 0;
    if (n >= 0 && n != size)
        ret = error_set(err, -ENOEXEC, "%s: %s payload unpacks to %lld bytes, it says %u", name,
                        f->name, (long long)n, size);
    if (ret)
        unpack_free(out);
    return ret;
}

void unpack_free(struct unpacked *out)
{
    if (out->data)
        munmap(out->data, out->map_len);
    *out = (struct unpacked) {0};
}
