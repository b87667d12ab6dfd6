// SPDX-License-Identifier: Apache-2.0
// ELF kernels by the 64-bit protocol and PVH; initrd and command line; files that are no kernel.
#include <fcntl.h>
#include <sys/stat.h>

#include "test_boot_images.h"

struct placed {
    uint64_t gpa, size;
    uint32_t type;
};

static struct placed e820_entry(const struct ram *ram, unsigned i)
{
    uint64_t at = LAYOUT_ZERO_PAGE + 0x2d0 + i * 20;
    return (struct placed) {ram_get(ram, at, 8), ram_get(ram, at + 8, 8),
                            (uint32_t)ram_get(ram, at + 16, 4)};
}

// What the guest's paging unit would find for `address`: the physical address, or -1.
static uint64_t walk(const struct ram *ram, uint64_t cr3, uint64_t address)
{
    uint64_t table = cr3;
    for (int shift = 39; shift >= 21; shift -= 9) {
        uint64_t e = ram_get(ram, table + 8 * (address >> shift & 511), 8);
        if ((e & 3) != 3) // present, writable
            return UINT64_MAX;
        table = e & 0x000ffffffffff000;
        if (e & 0x80)
            return shift == 21 && !(table & 0x1fffff) ? table + (address & 0x1fffff) : UINT64_MAX;
    }
    return UINT64_MAX;
}

static void expect_kernel_in_ram(const struct ram *ram)
{
    for (uint64_t i = 0; i < TEXT_SIZE; i++)
        ck_assert_uint_eq(ram_get(ram, TEXT_GPA + i, 1), (uint8_t)(i * 7 + 1));
    for (uint64_t i = 0; i < DATA_SIZE; i++)
        ck_assert_uint_eq(ram_get(ram, DATA_GPA + i, 1), (uint8_t)(i * 3 + 2));
    for (uint64_t i = DATA_SIZE; i < DATA_MEM; i++)
        ck_assert_uint_eq(ram_get(ram, DATA_GPA + i, 1), 0);
}

static void expect_e820(const struct ram *ram, uint64_t size)
{
    unsigned n = (unsigned)ram_get(ram, LAYOUT_ZERO_PAGE + 0x1e8, 1);
    uint64_t usable = 0, end = 0;
    ck_assert_uint_le(n, BOOT_MEMORY_MAX);
    for (unsigned i = 0; i < n; i++) {
        struct placed e = e820_entry(ram, i);
        ck_assert_uint_ge(e.gpa, end); // in order, no overlap
        ck_assert_uint_gt(e.size, 0);
        end = e.gpa + e.size;
        ck_assert(e.type == 1 || e.type == 2);
        if (e.type == 1) {
            ck_assert(ram_contains(ram, e.gpa, e.size));
            ck_assert(e.gpa + e.size <= LAYOUT_EBDA || e.gpa >= LAYOUT_KERNEL);
            usable += e.size;
        }
    }
    ck_assert_uint_eq(usable, size - (LAYOUT_KERNEL - LAYOUT_EBDA));
}

START_TEST(linux64)
{
    static const uint64_t sizes[] = {32 * MiB, 3 * GiB, 3 * GiB + 4096, 5 * GiB};
    uint64_t size = sizes[_i];
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "console=ttyS0", .rsdp = LAYOUT_ACPI};
    struct bytes elf = elf64_make();
    ram_make(&ram, size);
    ck_assert_msg(!load_bytes(&ram, &config, elf, &entry, &err), "%s", err.text);

    ck_assert_int_eq(entry.protocol, BOOT_LINUX64);
    ck_assert_int_eq(entry.mode, BOOT_MODE_LONG64);
    ck_assert_uint_eq(entry.rip, TEXT_GPA);
    ck_assert_uint_eq(entry.rsi, LAYOUT_ZERO_PAGE);
    ck_assert_uint_eq(entry.kernel_start, TEXT_GPA);
    ck_assert_uint_eq(entry.kernel_end, KERNEL_END);
    ck_assert_uint_eq(entry.initrd_end, 0);
    expect_kernel_in_ram(&ram);
    expect_e820(&ram, size);

    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x1fe, 2), 0xaa55);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x202, 4), 0x53726448);
    ck_assert_uint_ge(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x206, 2), 0x020c);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x210, 1), 0xff);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x211, 1), 1);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x070, 8), LAYOUT_ACPI);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x1ef, 1), 0); // sentinel
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x218, 8), 0); // no ramdisk
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x228, 4), LAYOUT_CMDLINE);
    ck_assert_str_eq(ram_at(&ram, LAYOUT_CMDLINE, 64), "console=ttyS0");

    ck_assert_uint_eq(entry.cr3, LAYOUT_PML4);
    for (uint64_t a = 0; a < 4 * GiB; a += 2 * MiB)
        ck_assert_uint_eq(walk(&ram, entry.cr3, a + 0x12345), a + 0x12345);
    ck_assert_uint_eq(walk(&ram, entry.cr3, 4 * GiB), UINT64_MAX);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_PT_END, 8), 0);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_GDT + 0x10, 8), 0x00af9b000000ffff);
    ck_assert_uint_eq(ram_get(&ram, LAYOUT_GDT + 0x18, 8), 0x00cf93000000ffff);
    ram_destroy(&ram);
    free(elf.data);
}
END_TEST

START_TEST(pvh)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = "quiet", .protocol = BOOT_PVH, .rsdp = LAYOUT_ACPI};
    struct bytes elf = elf64_make(), initrd = bytes_new(5000);
    memset(initrd.data, 0x5a, initrd.len);
    ram_make(&ram, 4 * GiB);
    struct image kernel = image_from_memory("kernel test", elf.data, elf.len);
    struct image second = image_from_memory("initrd test", initrd.data, initrd.len);
    ck_assert_msg(!boot_load_images(&ram, &config, &kernel, &second, &entry, &err), "%s", err.text);

    ck_assert_int_eq(entry.protocol, BOOT_PVH);
    ck_assert_int_eq(entry.mode, BOOT_MODE_PROTECTED32);
    ck_assert_uint_eq(entry.rip, PVH_ENTRY);
    ck_assert_uint_eq(entry.rbx, LAYOUT_PVH_INFO);
    expect_kernel_in_ram(&ram);
    uint64_t at = LAYOUT_PVH_INFO;
    ck_assert_uint_eq(ram_get(&ram, at, 4), 0x336ec578);
    ck_assert_uint_eq(ram_get(&ram, at + 4, 4), 1);
    ck_assert_uint_eq(ram_get(&ram, at + 12, 4), 1); // modules
    uint64_t module = ram_get(&ram, at + 16, 8);
    ck_assert_uint_eq(ram_get(&ram, at + 24, 8), LAYOUT_CMDLINE);
    ck_assert_uint_eq(ram_get(&ram, at + 32, 8), LAYOUT_ACPI);
    uint64_t map = ram_get(&ram, at + 40, 8), entries = ram_get(&ram, at + 48, 4), usable = 0;
    ck_assert_uint_eq(ram_get(&ram, module, 8), entry.initrd_start);
    ck_assert_uint_eq(ram_get(&ram, module + 8, 8), initrd.len);
    ck_assert_uint_eq(entry.initrd_end - entry.initrd_start, initrd.len);
    ck_assert_uint_eq(entry.initrd_start % PAGE_SIZE, 0);
    ck_assert_uint_eq(align_up(entry.initrd_end, PAGE_SIZE), LAYOUT_RAM_LOW_MAX);
    ck_assert_mem_eq(ram_at(&ram, entry.initrd_start, initrd.len), initrd.data, initrd.len);
    for (uint64_t i = 0; i < entries; i++)
        if (ram_get(&ram, map + 24 * i + 16, 4) == 1)
            usable += ram_get(&ram, map + 24 * i + 8, 8);
    ck_assert_uint_eq(usable, 4 * GiB - (LAYOUT_KERNEL - LAYOUT_EBDA));
    ram_destroy(&ram);
    free(elf.data);
    free(initrd.data);
}
END_TEST

// What BOOT_AUTO makes of the ELF kinds.
START_TEST(auto_kinds)
{
    struct bytes images[] = {elf64_make(), elf64_make(), elf32_make(true, false, 0),
                             elf32_make(true, true, 3), elf32_make(false, true, 3)};
    static const enum boot_protocol expected[] = {BOOT_LINUX64, BOOT_PVH, BOOT_PVH, BOOT_PVH,
                                                  BOOT_MULTIBOOT};
    bytes_put(images[1], E_ENTRY, 8, DATA_GPA); // not executable: only PVH is left
    for (size_t i = 0; i < ARRAY_SIZE(images); i++) {
        struct ram ram;
        struct boot_entry entry;
        struct error err = {0};
        struct boot_config config = {.cmdline = ""};
        ram_make(&ram, 32 * MiB);
        ck_assert_msg(!load_bytes(&ram, &config, images[i], &entry, &err), "%zu: %s", i, err.text);
        ck_assert_int_eq(entry.protocol, expected[i]);
        ram_destroy(&ram);
        free(images[i].data);
    }
}
END_TEST

START_TEST(elf_fields)
{
    static const struct bad_field bad[] = {
        {E_CLASS, 1, 3, "ELF class 3: expected 1"},
        {E_DATA, 1, 2, "ELF data encoding 2"},
        {E_TYPE, 2, ET_DYN, "ELF type 3: expected 2"},
        {E_MACHINE, 2, EM_AARCH64, "ELF machine 183: expected 62 (x86-64)"},
        {E_VERSION, 4, 0, "ELF version 0"},
        {E_PHENTSIZE, 2, 55, "e_phentsize 55: expected 56"},
        {E_PHNUM, 2, 0, "0 program headers"},
        {E_PHNUM, 2, 0xffff, "65535 program headers: expected 1 to 256"},
        {E_PHOFF, 8, 0x5ff0, "too short: 3 program headers at offset 0x5ff0"},
        {E_PHOFF, 8, UINT64_MAX - 8, "too short: 3 program headers"},
        {E_ENTRY, 8, DATA_GPA, "entry 0x1004000 lies in no executable segment"},
        {E_ENTRY, 8, TEXT_GPA + TEXT_SIZE, "lies in no executable segment"},
        {E_ENTRY, 8, 0xffffffff81000000, "lies in no executable segment"},
        {PHDR(0, PH_FLAGS), 4, PF_R, "lies in no executable segment"},
        {PHDR(0, PH_FILESZ), 8, 0x3001, "segment 0: p_filesz 0x3001 is more than p_memsz 0x3000"},
        {PHDR(1, PH_OFFSET), 8, 0x5801, "segment 1: 0x800 bytes at offset 0x5801 lie outside"},
        {PHDR(1, PH_OFFSET), 8, UINT64_MAX - 5, "segment 1: 0x800 bytes"},
        {PHDR(1, PH_PADDR), 8, TEXT_GPA + 0x2fff, "segments 0 (0x1000000..0x1003000) and 1"},
        {PHDR(1, PH_PADDR), 8, TEXT_GPA, "overlap"},
        {PHDR(1, PH_PADDR), 8, 0xff000, "segment 1: 0x5000 bytes at address 0xff000: expected"},
        {PHDR(1, PH_PADDR), 8, 32 * MiB - DATA_MEM + 1, "the guest's 32 MiB of memory"},
        {PHDR(1, PH_PADDR), 8, UINT64_MAX - 1, "segment 1"},
        {PHDR(1, PH_MEMSZ), 8, UINT64_MAX, "segment 1: 0xffffffffffffffff bytes"},
        {PHDR(2, PH_FILESZ), 8, 0x10001, "0x10001 bytes of notes: expected at most 0x10000"},
        {PHDR(2, PH_OFFSET), 8, 0x5fe0, "too short"},
        {NOTE_AT, 4, 0x7fffffff, "note at 0 (name 2147483647"},
        {NOTE_AT, 4, 0xffffffff, "runs past the segment's 0x30 bytes"},
        {NOTE_AT + 4, 4, 0xfffffff0, "runs past the segment's 0x30 bytes"},
    };
    struct bytes elf = elf64_make();
    // A 64-bit entry that is wrong would fall back to PVH under BOOT_AUTO.
    expect_bad_fields(elf, bad, ARRAY_SIZE(bad), BOOT_LINUX64, 32 * MiB);

    static const struct bad_field bad_pvh[] = {
        {NOTE_XEN + 8, 4, 6, "no PVH entry"},           // another type
        {NOTE_XEN + 12, 4, 0x00554e47, "no PVH entry"}, // another owner
        {NOTE_XEN + 16, 4, 0x100000, "PVH entry 0x100000 lies in no executable segment"},
        {NOTE_XEN + 16, 4, DATA_GPA, "lies in no executable segment"},
    };
    expect_bad_fields(elf, bad_pvh, ARRAY_SIZE(bad_pvh), BOOT_PVH, 32 * MiB);

    static const struct bad_field none[] = {{PHDR(0, PH_TYPE), 4, PT_NULL, "no segment to load"}};
    bytes_put(elf, PHDR(1, PH_TYPE), 4, PT_NULL);
    expect_bad_fields(elf, none, 1, BOOT_AUTO, 32 * MiB);
    free(elf.data);

    struct bytes elf32 = elf32_make(false, false, 0);
    static const struct bad_field plain[] = {{0x1000, 1, 0, "neither a PVH note nor a multiboot"}};
    expect_bad_fields(elf32, plain, 1, BOOT_AUTO, 32 * MiB);
    static const struct bad_field wide[] = {{0x1000, 1, 0, "a 32-bit ELF: expected a 64-bit"}};
    expect_bad_fields(elf32, wide, 1, BOOT_LINUX64, 32 * MiB);
    free(elf32.data);
}
END_TEST

START_TEST(too_many_segments)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.cmdline = ""};
    struct bytes elf = elf64_make();
    struct bytes more = bytes_new(elf.len + 56 * 256);
    memcpy(more.data, elf.data, elf.len);
    bytes_put(more, E_PHOFF, 8, elf.len);
    bytes_put(more, E_PHNUM, 2, ELF_SEGMENTS_MAX + 1);
    for (unsigned i = 0; i <= ELF_SEGMENTS_MAX; i++) {
        Elf64_Phdr p = {PT_LOAD, PF_X, 0, 0, TEXT_GPA + i * 4096, 16, 16, 1};
        memcpy(more.data + elf.len + i * sizeof(p), &p, sizeof(p));
    }
    ram_make(&ram, 32 * MiB);
    expect_error(load_bytes(&ram, &config, more, &entry, &err), &err,
                 "more than 64 segments to load");
    bytes_put(more, E_PHNUM, 2, ELF_SEGMENTS_MAX);
    ck_assert_msg(!load_bytes(&ram, &config, more, &entry, &err), "%s", err.text);
    ram_destroy(&ram);
    free(elf.data);
    free(more.data);
}
END_TEST

// Every length a file can be cut to: an error or, once all used bytes are there, a load.
START_TEST(cut_short)
{
    struct bytes elf = elf64_make();
    struct ram ram;
    ram_make(&ram, 32 * MiB);
    for (size_t len = 1; len <= elf.len; len += len < 300 ? 1 : 97) {
        struct boot_entry entry;
        struct error err = {0};
        struct boot_config config = {.cmdline = ""};
        // A copy of just this length, so that ASan sees every byte too many.
        struct bytes cut = bytes_new(len);
        memcpy(cut.data, elf.data, len);
        int ret = load_bytes(&ram, &config, cut, &entry, &err);
        ck_assert_msg(len < NOTE_AT + NOTE_LEN ? ret < 0 : ret == 0, "%zu: %s", len, err.text);
        free(cut.data);
    }
    ram_destroy(&ram);
    free(elf.data);
}
END_TEST

START_TEST(command_line)
{
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    char text[LINUX_CMDLINE_MAX + 2];
    memset(text, 'x', sizeof(text));
    struct boot_config config = {.cmdline = text};
    struct bytes elf = elf64_make();
    ram_make(&ram, 32 * MiB);
    text[LINUX_CMDLINE_MAX + 1] = 0;
    expect_error(load_bytes(&ram, &config, elf, &entry, &err), &err,
                 "command line of 2048 bytes: kernel test takes at most 2047");
    text[LINUX_CMDLINE_MAX] = 0;
    ck_assert_msg(!load_bytes(&ram, &config, elf, &entry, &err), "%s", err.text);
    ck_assert_str_eq(ram_at(&ram, LAYOUT_CMDLINE, sizeof(text)), text);
    ram_destroy(&ram);
    free(elf.data);
}
END_TEST

static int load_with_initrd(struct ram *ram, struct bytes elf, struct bytes initrd,
                            struct boot_entry *entry, struct error *err)
{
    struct boot_config config = {.cmdline = ""};
    struct image kernel = image_from_memory("kernel test", elf.data, elf.len);
    struct image second = image_from_memory("initrd test", initrd.data, initrd.len);
    ram_make(ram, 32 * MiB);
    return boot_load_images(ram, &config, &kernel, &second, entry, err);
}

// Page-aligned, as high as it goes; below the kernel where there is more room; else refused.
START_TEST(initrd_place)
{
    const uint64_t above = 32 * MiB - KERNEL_END, below = TEXT_GPA - LAYOUT_KERNEL;
    const struct {
        uint64_t kernel_shift, size, end; // end 0: does not fit
    } cases[] = {
        {0, 1, 32 * MiB},
        {0, above, 32 * MiB},
        {0, above + 1, 0},
        {8 * MiB, below + 8 * MiB, TEXT_GPA + 8 * MiB},
        {8 * MiB, below + 8 * MiB + 1, 0},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct ram ram;
        struct boot_entry entry;
        struct error err = {0};
        struct bytes elf = elf64_make(), initrd = bytes_new(cases[i].size);
        initrd.data[0] = 0x11;
        initrd.data[initrd.len - 1] = 0x22;
        bytes_put(elf, E_ENTRY, 8, TEXT_GPA + cases[i].kernel_shift);
        bytes_put(elf, PHDR(0, PH_PADDR), 8, TEXT_GPA + cases[i].kernel_shift);
        bytes_put(elf, PHDR(1, PH_PADDR), 8, DATA_GPA + cases[i].kernel_shift);
        int ret = load_with_initrd(&ram, elf, initrd, &entry, &err);
        if (cases[i].end) {
            ck_assert_msg(!ret, "%zu: %s", i, err.text);
            ck_assert_uint_eq(align_up(entry.initrd_end, PAGE_SIZE), cases[i].end);
            ck_assert_uint_eq(entry.initrd_end - entry.initrd_start, initrd.len);
            ck_assert_uint_eq(entry.initrd_start % PAGE_SIZE, 0);
            ck_assert(entry.initrd_end <= entry.kernel_start ||
                      entry.initrd_start >= entry.kernel_end);
            ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x218, 4), entry.initrd_start);
            ck_assert_uint_eq(ram_get(&ram, LAYOUT_ZERO_PAGE + 0x21c, 4), initrd.len);
            ck_assert_uint_eq(ram_get(&ram, entry.initrd_end - 1, 1), 0x22);
        } else {
            expect_error(ret, &err, "KiB do not fit: beside the kernel");
            ck_assert_ptr_nonnull(strstr(err.text, "give the guest more memory"));
        }
        ram_destroy(&ram);
        free(elf.data);
        free(initrd.data);
    }
}
END_TEST

static int load_path(const char *kernel, const char *initrd, struct error *err)
{
    struct ram ram;
    struct boot_entry entry;
    struct boot_config config = {.kernel = kernel, .initrd = initrd, .cmdline = ""};
    ram_make(&ram, 32 * MiB);
    int ret = boot_load(&ram, &config, &entry, err);
    if (!ret)
        expect_kernel_in_ram(&ram);
    ram_destroy(&ram);
    return ret;
}

static void file_write(const char *path, const void *data, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write_all(fd, data, len), 0);
    close(fd);
}

START_TEST(files)
{
    char dir[] = "/tmp/ferry-test-boot-XXXXXX", file[64], fifo[64];
    struct error err = {0};
    struct bytes elf = elf64_make();
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(file, sizeof(file), "%s/kernel", dir);
    snprintf(fifo, sizeof(fifo), "%s/fifo", dir);
    ck_assert_int_eq(mkfifo(fifo, 0600), 0);

    expect_error(load_path("/nonexistent/k", NULL, &err), &err,
                 "kernel /nonexistent/k: No such file or directory");
    expect_error(load_path(dir, NULL, &err), &err, "is a directory, expected a file");
    expect_error(load_path(fifo, NULL, &err), &err, "is not a regular file");
    expect_error(load_path("/dev/zero", NULL, &err), &err, "is not a regular file");
    file_write(file, "", 0);
    expect_error(load_path(file, NULL, &err), &err, "the file is empty");
    file_write(file, "#!/bin/sh\n", 10);
    expect_error(load_path(file, NULL, &err), &err, "starts with 23 21 2f 62 69 6e 2f 73");
    ck_assert_ptr_nonnull(strstr(err.text, "accepted are a bzImage"));
    file_write(file, "\x7f", 1);
    expect_error(load_path(file, NULL, &err), &err, "starts with 7f (of 1 bytes)");

    file_write(file, elf.data, elf.len);
    ck_assert_msg(!load_path(file, NULL, &err), "%s", err.text);
    ck_assert_msg(!load_path(file, file, &err), "%s", err.text);
    expect_error(load_path(file, dir, &err), &err, "initrd /tmp/ferry-test-boot-");
    expect_error(load_path(file, "/nonexistent/i", &err), &err, "initrd /nonexistent/i: No such");

    unlink(fifo);
    unlink(file);
    rmdir(dir);
    free(elf.data);
}
END_TEST

// A sparse file gives the same memory as a dense one.
START_TEST(sparse_file)
{
    char path[] = "/tmp/ferry-test-boot-XXXXXX";
    struct ram ram;
    struct boot_entry entry;
    struct error err = {0};
    struct boot_config config = {.kernel = path, .cmdline = ""};
    struct bytes elf = elf64_make();
    bytes_put(elf, PHDR(1, PH_OFFSET), 8, 0x100000);
    bytes_put(elf, PHDR(1, PH_FILESZ), 8, 0x300000);
    bytes_put(elf, PHDR(1, PH_MEMSZ), 8, 0x300000);
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write_all(fd, elf.data, elf.len), 0);
    ck_assert_int_eq(pwrite(fd, "tick", 4, 0x200000), 4); // between holes
    ck_assert_int_eq(pwrite(fd, "tock", 4, 0x300000), 4);
    ck_assert_int_eq(ftruncate(fd, 0x400000), 0);
    close(fd);
    ram_make(&ram, 32 * MiB);
    ck_assert_msg(!boot_load(&ram, &config, &entry, &err), "%s", err.text);
    ck_assert_uint_eq(ram_get(&ram, TEXT_GPA + TEXT_SIZE - 1, 1), (uint8_t)(0x2344 * 7 + 1));
    ck_assert_mem_eq(ram_at(&ram, DATA_GPA + 0x100000, 4), "tick", 4);
    ck_assert_mem_eq(ram_at(&ram, DATA_GPA + 0x200000, 4), "tock", 4);
    ck_assert_uint_eq(ram_get(&ram, DATA_GPA + 0xffff8, 8), 0);
    ck_assert_uint_eq(ram_get(&ram, DATA_GPA + 0x2ffff8, 8), 0);
    ram_destroy(&ram);
    unlink(path);
    free(elf.data);
}
END_TEST

START_TEST(protocol_names)
{
    struct error err = {0};
    for (int i = BOOT_AUTO; i <= BOOT_REAL; i++) {
        enum boot_protocol p = (enum boot_protocol) - 1;
        ck_assert_int_eq(boot_protocol_parse(boot_protocol_name((enum boot_protocol)i), &p, &err),
                         0);
        ck_assert_int_eq(p, i);
    }
    enum boot_protocol p;
    expect_error(boot_protocol_parse("efi", &p, &err), &err, "boot protocol 'efi': expected auto");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("boot");
    TCase *t = tcase_create("elf");
    tcase_add_loop_test(t, linux64, 0, 4);
    tcase_add_test(t, pvh);
    tcase_add_test(t, auto_kinds);
    tcase_add_test(t, elf_fields);
    tcase_add_test(t, too_many_segments);
    tcase_add_test(t, cut_short);
    tcase_add_test(t, command_line);
    tcase_add_test(t, initrd_place);
    tcase_add_test(t, files);
    tcase_add_test(t, sparse_file);
    tcase_add_test(t, protocol_names);
    tcase_set_timeout(t, 60);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
