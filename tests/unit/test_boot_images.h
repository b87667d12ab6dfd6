// SPDX-License-Identifier: Apache-2.0
// Kernel images made in code, for the tests of vmm/boot.
#pragma once

#include <check.h>
#include <errno.h>
#include <lz4.h>
#include <lzma.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "vmm/boot/loader.h"

struct bytes {
    uint8_t *data;
    size_t len;
};

static inline struct bytes bytes_new(size_t len)
{
    struct bytes b = {calloc(1, len ? len : 1), len};
    ck_assert_ptr_nonnull(b.data);
    return b;
}

static inline void bytes_put(struct bytes b, size_t offset, unsigned width, uint64_t value)
{
    ck_assert(offset + width <= b.len);
    memcpy(b.data + offset, &value, width);
}

static inline uint64_t ram_get(const struct ram *ram, uint64_t gpa, unsigned width)
{
    uint64_t value = 0;
    ck_assert_int_eq(ram_read(ram, gpa, &value, width), 0);
    return value;
}

static inline void ram_make(struct ram *ram, uint64_t size)
{
    struct error err = {0};
    struct ram_config config = {.size = size};
    ck_assert_msg(ram_create(ram, &config, &err) == 0, "%s", err.text);
}

// A change to a good image and what the loader must say about it.
struct bad_field {
    size_t offset;
    unsigned width;
    uint64_t value;
    const char *message;
};

static inline int load_bytes(struct ram *ram, const struct boot_config *config, struct bytes b,
                             struct boot_entry *entry, struct error *err)
{
    struct image img = image_from_memory("kernel test", b.data, b.len);
    return boot_load_images(ram, config, &img, NULL, entry, err);
}

static inline void expect_error(int ret, const struct error *err, const char *message)
{
    ck_assert_msg(ret < 0, "loaded, expected: %s", message);
    ck_assert_int_eq(ret, err->code);
    ck_assert_msg(strstr(err->text, message) != NULL, "got \"%s\", expected \"%s\"", err->text,
                  message);
    ck_assert_msg(!strchr(err->text, '\n'), "more than one line: %s", err->text);
}

static inline void expect_bad_fields(struct bytes good, const struct bad_field *bad, size_t n,
                                     enum boot_protocol protocol, uint64_t ram_size)
{
    for (size_t i = 0; i < n; i++) {
        struct ram ram;
        struct boot_entry entry;
        struct error err = {0};
        struct boot_config config = {.cmdline = "", .protocol = protocol};
        struct bytes b = bytes_new(good.len);
        memcpy(b.data, good.data, good.len);
        bytes_put(b, bad[i].offset, bad[i].width, bad[i].value);
        ram_make(&ram, ram_size);
        expect_error(load_bytes(&ram, &config, b, &entry, &err), &err, bad[i].message);
        ram_destroy(&ram);
        free(b.data);
    }
}

// --- ELF

enum {
    E_CLASS = 4,
    E_DATA = 5,
    E_TYPE = 16,
    E_MACHINE = 18,
    E_VERSION = 20,
    E_ENTRY = 24,
    E_PHOFF = 32,
    E_PHENTSIZE = 54,
    E_PHNUM = 56,
    PH_TYPE = 0,
    PH_FLAGS = 4,
    PH_OFFSET = 8,
    PH_PADDR = 24,
    PH_FILESZ = 32,
    PH_MEMSZ = 40,
};

#define PHDR(i, field) (64 + 56 * (i) + (field))

#define TEXT_GPA   0x1000000ull
#define TEXT_SIZE  0x2345ull
#define DATA_GPA   0x1004000ull
#define DATA_SIZE  0x800ull
#define DATA_MEM   0x5000ull
#define KERNEL_END (DATA_GPA + DATA_MEM)
#define PVH_ENTRY  0x1000010ull
#define NOTE_AT    0x5000
#define NOTE_LEN   0x30
#define NOTE_XEN   (NOTE_AT + 0x1c) // the second note: 12 bytes, "Xen", entry

static inline void elf64_segment(struct bytes b, unsigned i, const Elf64_Phdr *p)
{
    memcpy(b.data + PHDR(i, 0), p, sizeof(*p));
}

// Text, data with bss, and a note segment with a PVH entry behind a note of another owner.
static inline struct bytes elf64_make(void)
{
    struct bytes b = bytes_new(0x6000);
    Elf64_Ehdr h = {.e_type = ET_EXEC,
                    .e_machine = EM_X86_64,
                    .e_version = EV_CURRENT,
                    .e_entry = TEXT_GPA,
                    .e_phoff = 64,
                    .e_ehsize = 64,
                    .e_phentsize = 56,
                    .e_phnum = 3};
    memcpy(h.e_ident, ELFMAG, SELFMAG);
    h.e_ident[EI_CLASS] = ELFCLASS64;
    h.e_ident[EI_DATA] = ELFDATA2LSB;
    h.e_ident[EI_VERSION] = EV_CURRENT;
    memcpy(b.data, &h, sizeof(h));
    // The virtual addresses are a kernel's: they must not matter.
    elf64_segment(b, 0,
                  &(Elf64_Phdr) {PT_LOAD, PF_R | PF_X, 0x1000, 0xffffffff81000000, TEXT_GPA,
                                 TEXT_SIZE, 0x3000, 0x1000});
    elf64_segment(
        b, 1,
        &(Elf64_Phdr) {PT_LOAD, PF_R | PF_W, 0x4000, 0, DATA_GPA, DATA_SIZE, DATA_MEM, 0x1000});
    elf64_segment(b, 2, &(Elf64_Phdr) {PT_NOTE, PF_R, NOTE_AT, 0, 0, NOTE_LEN, NOTE_LEN, 4});
    for (size_t i = 0; i < TEXT_SIZE; i++)
        b.data[0x1000 + i] = (uint8_t)(i * 7 + 1);
    for (size_t i = 0; i < DATA_SIZE; i++)
        b.data[0x4000 + i] = (uint8_t)(i * 3 + 2);
    static const uint32_t other[] = {6, 5, 18, 0x756e694c, 0x78, 0xaaaaaaaa, 0xaa}; // "Linux"
    static const uint32_t xen[] = {4, 4, 18, 0x006e6558, PVH_ENTRY};
    memcpy(b.data + NOTE_AT, other, sizeof(other));
    memcpy(b.data + NOTE_AT + sizeof(other), xen, sizeof(xen));
    return b;
}

#define ELF32_GPA 0x200000u

// One executable segment; `note` adds a PVH note, `multiboot` a multiboot header with these flags.
static inline struct bytes elf32_make(bool note, bool multiboot, uint32_t flags)
{
    struct bytes b = bytes_new(0x3000);
    Elf32_Ehdr h = {.e_type = ET_EXEC,
                    .e_machine = EM_386,
                    .e_version = EV_CURRENT,
                    .e_entry = ELF32_GPA + 0x20,
                    .e_phoff = 52,
                    .e_phentsize = 32,
                    .e_phnum = note ? 2 : 1};
    memcpy(h.e_ident, ELFMAG, SELFMAG);
    h.e_ident[EI_CLASS] = ELFCLASS32;
    h.e_ident[EI_DATA] = ELFDATA2LSB;
    memcpy(b.data, &h, sizeof(h));
    Elf32_Phdr p[] = {
        {PT_LOAD, 0x1000, 0xc0200000, ELF32_GPA, 0x1000, 0x4000, PF_R | PF_X, 0x1000},
        {PT_NOTE, 0x2000, 0, 0, 20, 20, PF_R, 4},
    };
    memcpy(b.data + 52, p, sizeof(p));
    memset(b.data + 0x1000, 0x90, 0x1000);
    static const uint32_t xen[] = {4, 4, 18, 0x006e6558, ELF32_GPA + 0x40};
    if (note)
        memcpy(b.data + 0x2000, xen, sizeof(xen));
    uint32_t header[3] = {0x1badb002, flags, -(0x1badb002 + flags)};
    if (multiboot)
        memcpy(b.data + 0x1004, header, sizeof(header));
    return b;
}

// --- packers

enum packing { PACK_GZIP, PACK_XZ, PACK_LZ4, PACK_ZSTD };

static inline size_t pack_lz4(uint8_t *out, size_t room, struct bytes in)
{
    static const uint8_t magic[] = {0x02, 0x21, 0x4c, 0x18};
    memcpy(out, magic, 4);
    size_t n = 4;
    for (size_t at = 0; at < in.len; at += 8 * MiB) {
        size_t len = in.len - at < 8 * MiB ? in.len - at : 8 * MiB;
        int packed = LZ4_compress_default((char *)in.data + at, (char *)out + n + 4, (int)len,
                                          (int)(room - n - 4));
        ck_assert_int_gt(packed, 0);
        memcpy(out + n, &packed, 4);
        n += 4 + (size_t)packed;
    }
    return n;
}

static inline size_t pack_gzip(uint8_t *out, size_t room, struct bytes in)
{
    z_stream z = {
        .next_in = in.data, .avail_in = (uInt)in.len, .next_out = out, .avail_out = (uInt)room};
    ck_assert_int_eq(deflateInit2(&z, 1, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
    ck_assert_int_eq(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return z.total_out;
}

// With a checksum, as the zstd command does.
static inline size_t pack_zstd(uint8_t *out, size_t room, struct bytes in)
{
    ZSTD_CCtx *z = ZSTD_createCCtx();
    ck_assert(!ZSTD_isError(ZSTD_CCtx_setParameter(z, ZSTD_c_checksumFlag, 1)));
    size_t n = ZSTD_compress2(z, out, room, in.data, in.len);
    ck_assert(!ZSTD_isError(n));
    ZSTD_freeCCtx(z);
    return n;
}

// As Linux's build makes a payload: the stream, then its unpacked size where it has none inside.
static inline struct bytes payload_make(struct bytes in, enum packing packing)
{
    size_t room = in.len + in.len / 8 + 1024, n = 0;
    struct bytes out = bytes_new(room + 4);
    switch (packing) {
    case PACK_GZIP:
        n = pack_gzip(out.data, room, in);
        break;
    case PACK_XZ:
        ck_assert_int_eq(
            lzma_easy_buffer_encode(0, LZMA_CHECK_CRC32, NULL, in.data, in.len, out.data, &n, room),
            LZMA_OK);
        break;
    case PACK_LZ4:
        n = pack_lz4(out.data, room, in);
        break;
    case PACK_ZSTD:
        n = pack_zstd(out.data, room, in);
        break;
    }
    uint32_t size = (uint32_t)in.len;
    if (packing != PACK_GZIP) {
        memcpy(out.data + n, &size, 4);
        n += 4;
    }
    out.len = n;
    return out;
}

// --- bzImage

enum {
    BZ_SETUP_SECTS = 0x1f1,
    BZ_SYSSIZE = 0x1f4,
    BZ_BOOT_FLAG = 0x1fe,
    BZ_JUMP = 0x201,
    BZ_MAGIC = 0x202,
    BZ_VERSION = 0x206,
    BZ_LOADFLAGS = 0x211,
    BZ_INITRD_MAX = 0x22c,
    BZ_ALIGNMENT = 0x230,
    BZ_RELOCATABLE = 0x234,
    BZ_XLOADFLAGS = 0x236,
    BZ_CMDLINE_SIZE = 0x238,
    BZ_PAYLOAD_OFFSET = 0x248,
    BZ_PAYLOAD_LENGTH = 0x24c,
    BZ_PREF_ADDRESS = 0x258,
    BZ_INIT_SIZE = 0x260,
    BZ_SETUP_SIZE = 1024,
    BZ_STUB = 0x400, // bytes of "decompressor" before the payload
};

static inline struct bytes bzimage_make(struct bytes payload)
{
    size_t protected_size = align_up(BZ_STUB + payload.len, 16);
    struct bytes b = bytes_new(BZ_SETUP_SIZE + protected_size);
    bytes_put(b, BZ_SETUP_SECTS, 1, 1);
    bytes_put(b, BZ_SYSSIZE, 4, protected_size / 16);
    bytes_put(b, BZ_BOOT_FLAG, 2, 0xaa55);
    bytes_put(b, BZ_JUMP - 1, 2, 0x6aeb); // ends at 0x26c
    memcpy(b.data + BZ_MAGIC, "HdrS", 4);
    bytes_put(b, BZ_VERSION, 2, 0x020f);
    bytes_put(b, BZ_LOADFLAGS, 1, 1);
    bytes_put(b, BZ_INITRD_MAX, 4, 0x7fffffff);
    bytes_put(b, BZ_ALIGNMENT, 4, 0x200000);
    bytes_put(b, BZ_RELOCATABLE, 1, 1);
    bytes_put(b, BZ_XLOADFLAGS, 2, 1);
    bytes_put(b, BZ_CMDLINE_SIZE, 4, 100);
    bytes_put(b, BZ_PAYLOAD_OFFSET, 4, BZ_STUB);
    bytes_put(b, BZ_PAYLOAD_LENGTH, 4, payload.len);
    bytes_put(b, BZ_PREF_ADDRESS, 8, 0x1000000);
    bytes_put(b, BZ_INIT_SIZE, 4, 0x500000);
    memset(b.data + BZ_SETUP_SIZE, 0xf4, BZ_STUB);
    memcpy(b.data + BZ_SETUP_SIZE + BZ_STUB, payload.data, payload.len);
    return b;
}
