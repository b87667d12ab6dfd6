// SPDX-License-Identifier: Apache-2.0
// bzImages: the payload unpacked on the host in every format, or left to the guest.
#include "test_boot_images.h"

static void expect_elf_loaded(const struct ram *ram)
{
    for (uint64_t i = 0; i < TEXT_SIZE; i++)
        ck_assert_uint_eq(ram_get(ram, TEXT_GPA + i, 1), (uint8_t)(i * 7 + 1));
    for (uint64_t i = 0; i < DATA_MEM; i++)
        ck_assert_uint_eq(ram_get(ram, DATA_GPA + i, 1), i < DATA_SIZE ? (uint8_t)(i * 3 + 2) : 0);
}

static struct bytes bzimage_of_elf(enum packing packing)
{
    struct bytes elf = elf64_make();
    struct bytes payload = payload_make(elf, packing);
    struct bytes bz = bzimage_make(payload);
    free(elf.data);
    free(payload.data);
    return bz;
}

START_TEST(unpacked_and_loaded)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "quiet"};
    struct bytes bz = bzimage_of_elf((enum packing)_i);
    ram_make(&ram, 32 * MiB);
    ck_assert_msg(!load_bytes(&ram, &config, bz, &entry, &err), "%s", err.text);
    ck_assert_int_eq(entry.protocol, BOOT_LINUX64);
    ck_assert_uint_eq(entry.rip, TEXT_GPA);
    ck_assert_uint_eq(entry.kernel_end, KERNEL_END);
    expect_elf_loaded(&ram);
    // The setup header goes into the zero page up to its end, with the loader's own fields changed.
    const uint8_t *zp = ram_at(&ram, LAYOUT_ZERO_PAGE, 4096);
    ck_assert_mem_eq(zp + BZ_BOOT_FLAG, bz.data + BZ_BOOT_FLAG, 0x210 - BZ_BOOT_FLAG);
    ck_assert_uint_eq(zp[0x210], 0xff);
    ck_assert_mem_eq(zp + BZ_INITRD_MAX, bz.data + BZ_INITRD_MAX, 0x26c - BZ_INITRD_MAX);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x228, 4), LAYOUT_CMDLINE);
    ram_destroy(&ram);

    config.protocol = BOOT_PVH;
    ram_make(&ram, 32 * MiB);
    ck_assert_msg(!load_bytes(&ram, &config, bz, &entry, &err), "%s", err.text);
    ck_assert_int_eq(entry.protocol, BOOT_PVH);
    ck_assert_uint_eq(entry.rip, PVH_ENTRY);
    expect_elf_loaded(&ram);
    ram_destroy(&ram);
    free(bz.data);
}
END_TEST

// Bytes past the header's end are the kernel's code: they must not reach the zero page.
START_TEST(header_end)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = ""};
    struct bytes bz = bzimage_of_elf(PACK_LZ4);
    memset(bz.data + 0x26c, 0xee, 0x300 - 0x26c);
    ram_make(&ram, 32 * MiB);
    ck_assert_msg(!load_bytes(&ram, &config, bz, &entry, &err), "%s", err.text);
    for (uint64_t at = 0x26c; at < 0x2d0; at++)
        ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + at, 1), 0);
    ram_destroy(&ram);
    free(bz.data);
}
END_TEST

START_TEST(guest_unpacks)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "", .protocol = BOOT_BZIMAGE};
    struct bytes bz = bzimage_of_elf(PACK_ZSTD), initrd = bytes_new(10000);
    struct image kernel = image_from_memory("kernel test", bz.data, bz.len);
    struct image second = image_from_memory("initrd test", initrd.data, initrd.len);
    bytes_put(bz, BZ_INITRD_MAX, 4, 0x1ffffff);
    ram_make(&ram, 48 * MiB);
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &second, &entry, &err), "%s", err.text);
    ck_assert_int_eq(entry.protocol, BOOT_BZIMAGE);
    ck_assert_int_eq(entry.mode, BOOT_MODE_LONG64);
    ck_assert_uint_eq(entry.rip, 0x1000200);
    ck_assert_uint_eq(entry.kernel_start, 0x1000000);
    ck_assert_uint_eq(entry.kernel_end, 0x1500000);
    ck_assert_uint_eq(align_up(entry.initrd_end, PAGE_SIZE), 0x2000000); // initrd_addr_max
    ck_assert_mem_eq(ram_at(&ram, 0x1000000, bz.len - BZ_SETUP_SIZE), bz.data + BZ_SETUP_SIZE,
                     bz.len - BZ_SETUP_SIZE);
    ram_destroy(&ram);

    bytes_put(bz, BZ_RELOCATABLE, 1, 0); // then it starts at 1 MiB and moves itself
    ram_make(&ram, 48 * MiB);
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &second, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(entry.rip, 0x100200);
    ck_assert_uint_eq(entry.kernel_start, 0x100000);
    ck_assert_uint_eq(entry.kernel_end, 0x1500000);
    ram_destroy(&ram);
    free(bz.data);
    free(initrd.data);
}
END_TEST

START_TEST(initrd_addr_max)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = ""};
    struct bytes bz = bzimage_of_elf(PACK_GZIP), initrd = bytes_new(64);
    struct image kernel = image_from_memory("kernel test", bz.data, bz.len);
    struct image second = image_from_memory("initrd test", initrd.data, initrd.len);
    ram_make(&ram, 3 * GiB);
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &second, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(align_up(entry.initrd_end, PAGE_SIZE), 0x80000000);
    bytes_put(bz, BZ_INITRD_MAX, 4, 0x101000); // below the kernel there is one page and 1 byte
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &second, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(entry.initrd_start, 0x100000);
    bytes_put(bz, BZ_INITRD_MAX, 4, 0);
    expect_error(boot_load_images(&ram, &config, &kernel, &second, &entry, &err), &err,
                 "KiB in one piece below 0x1");
    ram_destroy(&ram);
    free(bz.data);
    free(initrd.data);
}
END_TEST

START_TEST(header_fields)
{
    static const struct bad_field both[] = {
        {BZ_BOOT_FLAG, 2, 0xaa54, "boot_flag 0xaa54: expected 0xaa55"},
        {BZ_MAGIC, 4, 0, "not a kernel Ferry knows: it starts with 00 00"},
        {BZ_VERSION, 2, 0x0207, "boot protocol 2.07: expected 2.08 or later"},
        {BZ_JUMP, 1, 0x10, "setup header ends at 0x212: expected 0x264 or later"},
        {BZ_SETUP_SECTS, 1, 64, "setup_sects 64: the kernel would start at byte 33280"},
        {BZ_SYSSIZE, 4, 0, "syssize says 0 bytes"},
        {BZ_SYSSIZE, 4, 0xffffffff, "syssize says 68719476720 bytes of kernel"},
        {BZ_LOADFLAGS, 1, 0, "a zImage (loadflags 0)"},
        {BZ_ALIGNMENT, 4, 0, "kernel_alignment 0: expected a power of two"},
        {BZ_ALIGNMENT, 4, 0x300000, "kernel_alignment 0x300000: expected a power of two"},
    };
    static const struct bad_field payload[] = {
        {BZ_PAYLOAD_LENGTH, 4, 0, "payload_length 0"},
        {BZ_PAYLOAD_LENGTH, 4, 0x7fffffff, "payload of 0x7fffffff bytes at 0x400 lies outside"},
        {BZ_PAYLOAD_OFFSET, 4, 0xffffffff, "lies outside the"},
        {BZ_PAYLOAD_OFFSET, 4, BZ_STUB - 1, "payload starts with f4 28 b5 2f: expected gzip"},
        {BZ_CMDLINE_SIZE, 4, 2, "command line of 3 bytes: kernel test takes at most 2"},
    };
    static const struct bad_field guest[] = {
        {BZ_MAGIC, 4, 0, "not a bzImage"},
        {BZ_VERSION, 2, 0x020b, "no 64-bit entry (boot protocol 2.11"},
        {BZ_XLOADFLAGS, 2, 0xfffe, "no 64-bit entry (boot protocol 2.15, xloadflags 0xfffe)"},
        {BZ_PREF_ADDRESS, 8, 0x1100000, "pref_address 0x1100000: expected a multiple of"},
        {BZ_PREF_ADDRESS, 8, 0, "wants 0x500000 bytes at pref_address 0 "},
        {BZ_PREF_ADDRESS, 8, 32 * MiB, "the guest's 32 MiB of memory"},
        {BZ_PREF_ADDRESS, 8, 0xffffffffffe00000, "the guest's 32 MiB of memory"},
        {BZ_INIT_SIZE, 4, 0x1000001, "wants 0x1000001 bytes at pref_address 0x1000000"},
        {BZ_SYSSIZE, 4, 0x20, "the 64-bit entry is at 0x200"},
        {BZ_CMDLINE_SIZE, 4, 2, "takes at most 2"},
    };
    struct bytes bz = bzimage_of_elf(PACK_ZSTD);
    static const enum boot_protocol protocols[] = {BOOT_AUTO, BOOT_LINUX64, BOOT_PVH};
    for (size_t p = 0; p < ARRAY_SIZE(protocols); p++)
        expect_bad_fields(bz, both, ARRAY_SIZE(both), protocols[p], 32 * MiB);

    struct boot_config config = {.cmdline = "abc"};
    for (size_t i = 0; i < ARRAY_SIZE(payload) + ARRAY_SIZE(guest); i++) {
        bool by_guest = i >= ARRAY_SIZE(payload);
        const struct bad_field *bad = by_guest ? &guest[i - ARRAY_SIZE(payload)] : &payload[i];
        config.protocol = by_guest ? BOOT_BZIMAGE : BOOT_AUTO;
        struct ram ram;
        struct boot_entry entry;
        struct error err = {0};
        struct bytes b = bytes_new(bz.len);
        memcpy(b.data, bz.data, bz.len);
        bytes_put(b, bad->offset, bad->width, bad->value);
        ram_make(&ram, 32 * MiB);
        expect_error(load_bytes(&ram, &config, b, &entry, &err), &err, bad->message);
        ram_destroy(&ram);
        free(b.data);
    }
    free(bz.data);
}
END_TEST

START_TEST(cut_short)
{
    struct bytes bz = bzimage_of_elf(PACK_LZ4);
    struct ram ram;
    ram_make(&ram, 32 * MiB);
    for (size_t len = 0x206; len < bz.len - 16; len += 61) {
        struct boot_entry entry;
        struct error err = {0};
        struct boot_config config = {.cmdline = "", .protocol = _i ? BOOT_BZIMAGE : BOOT_AUTO};
        struct bytes cut = bytes_new(len);
        memcpy(cut.data, bz.data, len);
        expect_error(load_bytes(&ram, &config, cut, &entry, &err), &err,
                     len < 0x290            ? "too short for its setup header"
                     : len <= BZ_SETUP_SIZE ? "setup_sects 1"
                                            : "is it complete?");
        free(cut.data);
    }
    ram_destroy(&ram);
    free(bz.data);
}
END_TEST

// --- unpack

static struct bytes content_make(size_t len)
{
    struct bytes b = bytes_new(len);
    uint32_t x = 1;
    for (size_t i = 0; i < len; i++) {
        x = x * 1664525 + 1013904223;
        b.data[i] = i % 64 < 48 ? (uint8_t)(i >> 12) : (uint8_t)(x >> 24);
    }
    return b;
}

static const struct {
    const char *name;
    size_t tail; // bytes of size word behind the stream
} packers[] = {[PACK_GZIP] = {"gzip", 0},
               [PACK_XZ] = {"xz", 4},
               [PACK_LZ4] = {"lz4", 4},
               [PACK_ZSTD] = {"zstd", 4}};

START_TEST(unpack_formats)
{
    // Three lz4 blocks of 8 MiB, the last not full.
    struct bytes in = content_make(17 * MiB + 12345), packed = payload_make(in, (enum packing)_i);
    struct unpacked out;
    struct error err = {0};
    ck_assert_msg(!unpack(&out, "k", packed.data, packed.len, in.len, &err), "%s", err.text);
    ck_assert_str_eq(out.format, packers[_i].name);
    ck_assert_uint_eq(out.size, in.len);
    ck_assert_int_eq(memcmp(out.data, in.data, in.len), 0);
    unpack_free(&out);
    expect_error(unpack(&out, "k", packed.data, packed.len, in.len - 1, &err), &err,
                 "expected at most the guest's");
    ck_assert_ptr_null(out.data);
    free(in.data);
    free(packed.data);
}
END_TEST

// A size word that is wrong in either direction, a stream that is cut, garbage behind it.
START_TEST(unpack_damaged)
{
    struct bytes in = content_make(100000), packed = payload_make(in, (enum packing)_i);
    struct unpacked out;
    struct error err = {0};
    const char *name = packers[_i].name;
    for (int delta = -1; delta <= 1; delta += 2) {
        bytes_put(packed, packed.len - 4, 4, (uint64_t)(100000 + delta));
        expect_error(unpack(&out, "k", packed.data, packed.len, GiB, &err), &err, name);
    }
    bytes_put(packed, packed.len - 4, 4, 100000);
    for (size_t len = 0; len < packed.len; len += 997) {
        // The right size word behind too little.
        struct bytes cut = bytes_new(len + 4);
        memcpy(cut.data, packed.data, len);
        bytes_put(cut, len, 4, 100000);
        expect_error(unpack(&out, "k", cut.data, cut.len, GiB, &err), &err, "k: ");
        free(cut.data);
    }
    size_t middle = (packed.len - packers[_i].tail) / 2;
    for (size_t i = 0; i < 64; i++)
        packed.data[middle + i] = 0xff;
    expect_error(unpack(&out, "k", packed.data, packed.len, GiB, &err), &err, name);
    free(in.data);
    free(packed.data);
}
END_TEST

START_TEST(unpack_refused)
{
    static const struct {
        uint8_t magic[6];
        const char *message;
    } cases[] = {
        {"BZh91A", "packed with bzip2: gzip, xz, lz4 and zstd are supported"},
        {{0x5d, 0, 0, 0, 4, 0xff}, "packed with lzma"},
        {{0x89, 'L', 'Z', 'O', 0, 0xd}, "packed with lzo"},
        {{0x04, 0x22, 0x4d, 0x18, 0x64, 0x40},
         "payload starts with 04 22 4d 18"}, // lz4, not legacy
        {"MZabcd", "payload starts with 4d 5a 61 62"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct unpacked out;
        struct error err = {0};
        uint8_t payload[64] = {0};
        memcpy(payload, cases[i].magic, 6);
        expect_error(unpack(&out, "k", payload, sizeof(payload), GiB, &err), &err,
                     cases[i].message);
    }
    struct unpacked out;
    struct error err = {0};
    static const uint8_t tiny[] = {0x1f, 0x8b, 1};
    expect_error(unpack(&out, "k", tiny, sizeof(tiny), GiB, &err), &err, "too short");
    expect_error(unpack(&out, "k", tiny, 0, GiB, &err), &err, "payload starts with 00 00");
}
END_TEST

// What is packed must be an ELF, and is checked as one.
START_TEST(payload_content)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = ""};
    struct bytes text = content_make(5000), elf = elf64_make();
    bytes_put(elf, PHDR(1, PH_PADDR), 8, GiB);
    struct bytes payloads[] = {payload_make(text, PACK_XZ), payload_make(elf, PACK_XZ)};
    static const char *const messages[] = {"the unpacked xz payload starts with",
                                           "segment 1: 0x5000 bytes at address 0x40000000"};
    ram_make(&ram, 32 * MiB);
    for (size_t i = 0; i < ARRAY_SIZE(payloads); i++) {
        struct bytes bz = bzimage_make(payloads[i]);
        expect_error(load_bytes(&ram, &config, bz, &entry, &err), &err, messages[i]);
        free(bz.data);
        free(payloads[i].data);
    }
    ram_destroy(&ram);
    free(text.data);
    free(elf.data);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("boot_bzimage");
    TCase *t = tcase_create("bzimage");
    tcase_add_loop_test(t, unpacked_and_loaded, PACK_GZIP, PACK_ZSTD + 1);
    tcase_add_test(t, header_end);
    tcase_add_test(t, guest_unpacks);
    tcase_add_test(t, initrd_addr_max);
    tcase_add_test(t, header_fields);
    tcase_add_loop_test(t, cut_short, 0, 2);
    tcase_add_loop_test(t, unpack_formats, PACK_GZIP, PACK_ZSTD + 1);
    tcase_add_loop_test(t, unpack_damaged, PACK_GZIP, PACK_ZSTD + 1);
    tcase_add_test(t, unpack_refused);
    tcase_add_test(t, payload_content);
    tcase_set_timeout(t, 60);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
