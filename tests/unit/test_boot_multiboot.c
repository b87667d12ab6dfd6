// SPDX-License-Identifier: Apache-2.0
// Test guests' protocols: multiboot ELF32, multiboot with load addresses, raw real-mode images.
#include "test_boot_images.h"

enum {
    MB_AT = 0x1004, // of the header in elf32_make's file
    MB_FLAGS = MB_AT + 4,
};

static void header_put(struct bytes b, size_t at, uint32_t flags)
{
    bytes_put(b, at, 4, 0x1badb002);
    bytes_put(b, at + 4, 4, flags);
    bytes_put(b, at + 8, 4, (uint32_t) - (0x1badb002 + flags));
}

START_TEST(elf32)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "a b"};
    struct bytes elf = elf32_make(false, true, 3), initrd = bytes_new(9000);
    struct image kernel = image_from_memory("kernel test", elf.data, elf.len);
    struct image module = image_from_memory("initrd test", initrd.data, initrd.len);
    ram_make(&ram, 5 * GiB);
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &module, &entry, &err), "%s", err.text);
    ck_assert_int_eq(entry.protocol, BOOT_MULTIBOOT);
    ck_assert_int_eq(entry.mode, BOOT_MODE_PROTECTED32);
    ck_assert_uint_eq(entry.rax, 0x2badb002);
    ck_assert_uint_eq(entry.rbx, LAYOUT_MULTIBOOT);
    ck_assert_uint_eq(entry.rip, ELF32_GPA + 0x20);
    ck_assert_uint_eq(entry.kernel_end, ELF32_GPA + 0x4000);
    ck_assert_mem_eq(ram_at(&ram, ELF32_GPA, 0x1000), elf.data + 0x1000, 0x1000);

    ck_assert_uint_eq(ram_get(&ram, LAYOUT_GDT + 0x10, 8), 0x00cf9b000000ffff);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_GDT + 0x18, 8), 0x00cf93000000ffff);
    uint64_t info = LAYOUT_MULTIBOOT;
    ck_assert_uint_eq(ram_get(&ram, info, 4), 0x24d); // memory, cmdline, modules, map, name
    ck_assert_uint_eq(ram_get(&ram, info + 4, 4), 639);
    ck_assert_uint_eq(ram_get(&ram, info + 8, 4), 3 * 1024 * 1024 - 1024);
    ck_assert_str_eq(ram_at(&ram, ram_get(&ram, info + 16, 4), 4), "a b");
    ck_assert_uint_eq(ram_get(&ram, info + 20, 4), 1);
    uint64_t mod = ram_get(&ram, info + 24, 4);
    ck_assert_uint_eq(ram_get(&ram, mod, 4), entry.initrd_start);
    ck_assert_uint_eq(ram_get(&ram, mod + 4, 4), entry.initrd_start + initrd.len);
    ck_assert_str_eq(ram_at(&ram, ram_get(&ram, info + 64, 4), 6), "ferry");
    uint64_t len = ram_get(&ram, info + 44, 4), at = ram_get(&ram, info + 48, 4);
    uint64_t end = at + len, usable = 0;
    while (at < end) {
        if (ram_get(&ram, at + 20, 4) == 1)
            usable += ram_get(&ram, at + 12, 8);
        at += ram_get(&ram, at, 4) + 4;
    }
    ck_assert_uint_eq(at, end);
    ck_assert_uint_eq(usable, 5 * GiB - (LAYOUT_KERNEL - LAYOUT_EBDA));
    ram_destroy(&ram);
    free(elf.data);
    free(initrd.data);
}
END_TEST

enum { RAW_LEN = 0x900, RAW_HEADER = 0x80, RAW_LOAD = 0x100000 };

// A raw file: header at 0x80, the file's start belongs at 1 MiB.
static struct bytes raw_make(void)
{
    struct bytes b = bytes_new(RAW_LEN);
    for (size_t i = 0; i < b.len; i++)
        b.data[i] = (uint8_t)(i | 1);
    header_put(b, RAW_HEADER, 0x10003);
    bytes_put(b, RAW_HEADER + 12, 4, RAW_LOAD + RAW_HEADER); // header_addr
    bytes_put(b, RAW_HEADER + 16, 4, RAW_LOAD);              // load_addr
    bytes_put(b, RAW_HEADER + 20, 4, RAW_LOAD + 0x800);      // load_end_addr
    bytes_put(b, RAW_HEADER + 24, 4, RAW_LOAD + 0x2000);     // bss_end_addr
    bytes_put(b, RAW_HEADER + 28, 4, RAW_LOAD + 0x10);       // entry_addr
    return b;
}

START_TEST(load_addresses)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "", .protocol = BOOT_MULTIBOOT};
    struct bytes raw = raw_make();
    ram_make(&ram, 16 * MiB);
    ck_assert_msg(!load_bytes(&ram, &config, raw, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(entry.rip, RAW_LOAD + 0x10);
    ck_assert_uint_eq(entry.kernel_start, RAW_LOAD);
    ck_assert_uint_eq(entry.kernel_end, RAW_LOAD + 0x2000);
    ck_assert_mem_eq(ram_at(&ram, RAW_LOAD, 0x800), raw.data, 0x800);
    ck_assert_uint_eq(ram_get(&ram, RAW_LOAD + 0x800, 8), 0);
    ram_destroy(&ram);

    // Without end addresses all of the file counts; the part before load_addr does not.
    bytes_put(raw, RAW_HEADER + 16, 4, RAW_LOAD + 0x40);
    bytes_put(raw, RAW_HEADER + 20, 4, 0);
    bytes_put(raw, RAW_HEADER + 24, 4, 0);
    bytes_put(raw, RAW_HEADER + 28, 4, RAW_LOAD + 0x40);
    ram_make(&ram, 16 * MiB);
    ck_assert_msg(!load_bytes(&ram, &config, raw, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(entry.kernel_start, RAW_LOAD + 0x40);
    ck_assert_uint_eq(entry.kernel_end, RAW_LOAD + RAW_LEN);
    ck_assert_mem_eq(ram_at(&ram, RAW_LOAD + 0x40, RAW_LEN - 0x40), raw.data + 0x40,
                     RAW_LEN - 0x40);
    ck_assert_uint_eq(ram_get(&ram, RAW_LOAD, 8), 0);
    ram_destroy(&ram);
    free(raw.data);
}
END_TEST

START_TEST(fields)
{
    static const struct bad_field elf_bad[] = {
        {MB_AT, 4, 0x1badb003, "no multiboot header"},
        {MB_AT + 8, 4, 0, "no multiboot header"},
        {24, 4, ELF32_GPA + 0x1000, "multiboot entry 0x201000 lies in no executable segment"},
        {24, 4, ELF32_GPA - 1, "lies in no executable segment"},
        {52 + 20, 4, 0xffffffff,
         "segment 0: 0xffffffff bytes at address 0x200000: expected within"},
        {52 + 20, 4, 0xfff, "p_filesz 0x1000 is more than p_memsz 0xfff"},
        {18, 2, EM_ARM, "ELF machine 40: expected 3 (i386)"},
        {42, 2, 56, "e_phentsize 56: expected 32"},
        {28, 4, 0xfffffff0, "too short: 1 program headers"},
        {0, 1, 0, "without load addresses (bit 16): expected an ELF"},
    };
    struct bytes elf = elf32_make(false, true, 3);
    expect_bad_fields(elf, elf_bad, ARRAY_SIZE(elf_bad), BOOT_MULTIBOOT, 16 * MiB);

    static const struct bad_field none[] = {{0x2fff, 1, 0,
                                             "demand what Ferry does not have (0x4, "
                                             "a video mode)"}};
    header_put(elf, MB_AT, 7);
    expect_bad_fields(elf, none, 1, BOOT_MULTIBOOT, 16 * MiB);
    static const struct bad_field unknown[] = {{0x2fff, 1, 0, "does not have (0x8)"}};
    header_put(elf, MB_AT, 8);
    expect_bad_fields(elf, unknown, 1, BOOT_MULTIBOOT, 16 * MiB);
    free(elf.data);

    struct bytes wide = elf64_make();
    static const struct bad_field is64[] = {{0x5fff, 1, 0, "a 64-bit ELF: multiboot takes 32-bit"}};
    header_put(wide, 0x800, 0);
    expect_bad_fields(wide, is64, 1, BOOT_MULTIBOOT, 32 * MiB);
    free(wide.data);

    static const struct bad_field raw_bad[] = {
        {RAW_HEADER + 12, 4, RAW_LOAD - 1, "expected at most 0x80 bytes before the header"},
        {RAW_HEADER + 12, 4, RAW_LOAD + 0x81, "expected at most 0x80 bytes before the header"},
        {RAW_HEADER + 20, 4, RAW_LOAD, "load_end_addr 0x100000: expected above 0x100000"},
        {RAW_HEADER + 20, 4, RAW_LOAD + RAW_LEN + 1, "load_end_addr 0x100901: 0x901 bytes"},
        {RAW_HEADER + 24, 4, RAW_LOAD + 0x7ff, "bss_end_addr 0x1007ff: expected at least 0x100800"},
        {RAW_HEADER + 24, 4, 0xffffffff, "at address 0x100000: expected within"},
        {RAW_HEADER + 28, 4, RAW_LOAD + 0x800, "entry 0x100800 lies in no executable segment"},
        {RAW_HEADER + 28, 4, 0, "entry 0 lies in no executable segment"},
    };
    struct bytes raw = raw_make();
    expect_bad_fields(raw, raw_bad, ARRAY_SIZE(raw_bad), BOOT_MULTIBOOT, 16 * MiB);
    // A raw file is taken for multiboot only when asked for.
    static const struct bad_field not_auto[] = {{RAW_LEN - 1, 1, 0, "not a kernel Ferry knows"}};
    expect_bad_fields(raw, not_auto, 1, BOOT_AUTO, 16 * MiB);
    free(raw.data);
}
END_TEST

// 4-aligned, within the first 8 KiB, and wholly there.
START_TEST(header_search)
{
    struct bytes b = bytes_new(8192 + 64);
    struct image img = image_from_memory("k", b.data, b.len);
    static const struct {
        size_t at;
        uint32_t flags;
        bool found;
    } cases[] = {{0, 0, true},           {8180, 0, true},        {8184, 0, false},
                 {8192, 0, false},       {102, 0, false},        {8160, 0x10000, true},
                 {8164, 0x10000, false}, {8180, 0x10000, false}, {8176, 2, true}};
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        memset(b.data, 0, b.len);
        header_put(b, cases[i].at, cases[i].flags);
        ck_assert_msg(multiboot_recognise(&img) == cases[i].found, "case %zu", i);
    }
    free(b.data);
}
END_TEST

START_TEST(real)
{
    const size_t max = LAYOUT_EBDA - LAYOUT_REAL_IMAGE;
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "", .protocol = BOOT_REAL};
    struct bytes raw = bytes_new(max + 1);
    memset(raw.data, 0xf4, raw.len);
    ram_make(&ram, 16 * MiB);
    expect_error(load_bytes(&ram, &config, raw, &entry, &err), &err, "has room for 622592");
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_REAL_IMAGE, 1), 0);
    raw.len = max;
    ck_assert_msg(!load_bytes(&ram, &config, raw, &entry, &err), "%s", err.text);
    ck_assert_int_eq(entry.mode, BOOT_MODE_REAL);
    ck_assert_int_eq(entry.protocol, BOOT_REAL);
    ck_assert_uint_eq(entry.rip, 0x7c00);
    ck_assert_uint_eq(entry.kernel_end, LAYOUT_EBDA);
    ck_assert_uint_eq(ram_get(&ram, 0x7c00, 1), 0xf4);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_EBDA - 1, 1), 0xf4);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_EBDA, 1), 0);

    config.cmdline = "x";
    expect_error(load_bytes(&ram, &config, raw, &entry, &err), &err, "--boot real takes none");
    config.cmdline = "";
    struct image kernel = image_from_memory("kernel test", raw.data, 512);
    expect_error(boot_load_images(&ram, &config, &kernel, &kernel, &entry, &err), &err,
                 "--boot real takes no initrd");
    ram_destroy(&ram);
    free(raw.data);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("boot_multiboot");
    TCase *t = tcase_create("multiboot");
    tcase_add_test(t, elf32);
    tcase_add_test(t, load_addresses);
    tcase_add_test(t, fields);
    tcase_add_test(t, header_search);
    tcase_add_test(t, real);
    tcase_set_timeout(t, 60);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
