// SPDX-License-Identifier: Apache-2.0
// The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): RSI
// points to the zero page, memory is mapped one to one, interrupts are off.
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

// Page-table entries. Accessed and dirty are set from the start: a hypervisor that shadows the
// tables would otherwise map pages read-only first, to see the first write.
#define PTE_PRESENT  0x01ull
#define PTE_WRITE    0x02ull
#define PTE_ACCESSED 0x20ull
#define PTE_DIRTY    0x40ull
#define PTE_LARGE    0x80ull
#define PTE_TABLE    (PTE_PRESENT | PTE_WRITE | PTE_ACCESSED)
#define PTE_PAGE_2M  (PTE_TABLE | PTE_DIRTY | PTE_LARGE)

enum { TABLE_ENTRIES = 512, DIRECTORIES = 4 };

// The zero page (struct boot_params, arch/x86/include/uapi/asm/bootparam.h): byte offsets.
enum {
    ZP_ACPI_RSDP = 0x070,
    ZP_EXT_RAMDISK_IMAGE = 0x0c0,
    ZP_EXT_RAMDISK_SIZE = 0x0c4,
    ZP_EXT_CMD_LINE = 0x0c8,
    ZP_E820_ENTRIES = 0x1e8,
    ZP_HEADER = 0x1f1,
    ZP_BOOT_FLAG = 0x1fe,
    ZP_MAGIC = 0x202,
    ZP_VERSION = 0x206,
    ZP_TYPE_OF_LOADER = 0x210,
    ZP_LOADFLAGS = 0x211,
    ZP_RAMDISK_IMAGE = 0x218,
    ZP_RAMDISK_SIZE = 0x21c,
    ZP_CMD_LINE_PTR = 0x228,
    ZP_KERNEL_ALIGNMENT = 0x230,
    ZP_CMDLINE_SIZE = 0x238,
    ZP_E820_TABLE = 0x2d0,
    ZP_SIZE = 0x1000,
};

#define E820_ENTRY_SIZE  20
#define LOADER_UNDEFINED 0xff
#define LOADED_HIGH      0x01
#define HEADER_MAGIC     0x53726448 // "HdrS"
#define HEADER_VERSION   0x020f     // what an ELF vmlinux, which has no header, is told
#define ELF_KERNEL_ALIGN 0x200000
#define ELF_BOOT_FLAG    0xaa55

static void put16(uint8_t *page, unsigned offset, uint16_t value)
{
    memcpy(page + offset, &value, sizeof(value));
}

static void put32(uint8_t *page, unsigned offset, uint64_t value)
{
    uint32_t low = (uint32_t)value;
    memcpy(page + offset, &low, sizeof(low));
}

static void put64(uint8_t *page, unsigned offset, uint64_t value)
{
    memcpy(page + offset, &value, sizeof(value));
}

static void zero_page_header(uint8_t *page, const struct bzimage *bz, uint32_t cmdline_max)
{
    if (bz) {
        memcpy(page + ZP_HEADER, bz->header, bz->header_len);
    } else {
        put16(page, ZP_BOOT_FLAG, ELF_BOOT_FLAG);
        put32(page, ZP_MAGIC, HEADER_MAGIC);
        put16(page, ZP_VERSION, HEADER_VERSION);
        put32(page, ZP_KERNEL_ALIGNMENT, ELF_KERNEL_ALIGN);
        put32(page, ZP_CMDLINE_SIZE, cmdline_max);
    }
    page[ZP_TYPE_OF_LOADER] = LOADER_UNDEFINED;
    page[ZP_LOADFLAGS] |= LOADED_HIGH;
}

static void zero_page_e820(uint8_t *page, const struct ram *ram)
{
    struct boot_memory map[BOOT_MEMORY_MAX];
    unsigned n = boot_memory_map(ram, map);
    page[ZP_E820_ENTRIES] = (uint8_t)n;
    for (unsigned i = 0; i < n; i++) {
        uint8_t *e = page + ZP_E820_TABLE + i * E820_ENTRY_SIZE;
        put64(e, 0, map[i].gpa);
        put64(e, 8, map[i].size);
        put32(e, 16, map[i].type);
    }
}

static int zero_page_write(const struct load *load, const struct bzimage *bz)
{
    const struct boot_entry *entry = load->entry;
    uint64_t initrd_size = entry->initrd_end - entry->initrd_start;
    uint8_t page[ZP_SIZE] = {0};
    zero_page_header(page, bz, load->cmdline_max);
    zero_page_e820(page, load->ram);
    put64(page, ZP_ACPI_RSDP, load->config->rsdp);
    put32(page, ZP_CMD_LINE_PTR, LAYOUT_CMDLINE);
    put32(page, ZP_EXT_CMD_LINE, 0);
    put32(page, ZP_RAMDISK_IMAGE, entry->initrd_start);
    put32(page, ZP_RAMDISK_SIZE, initrd_size);
    put32(page, ZP_EXT_RAMDISK_IMAGE, entry->initrd_start >> 32);
    put32(page, ZP_EXT_RAMDISK_SIZE, initrd_size >> 32);
    return ram_write(load->ram, LAYOUT_ZERO_PAGE, page, sizeof(page));
}

// PML4[0] -> one PDPT -> four directories of 2 MiB pages: the first 4 GiB one to one.
static int page_tables_write(struct ram *ram)
{
    uint64_t bytes = (2 + DIRECTORIES) * PAGE_SIZE;
    uint64_t *pml4 = ram_at(ram, LAYOUT_PML4, bytes);
    if (!pml4)
        return -EFAULT;
    uint64_t *pdpt = pml4 + TABLE_ENTRIES, *pd = pdpt + TABLE_ENTRIES;
    pml4[0] = (LAYOUT_PML4 + PAGE_SIZE) | PTE_TABLE;
    for (uint64_t i = 0; i < DIRECTORIES; i++)
        pdpt[i] = (LAYOUT_PML4 + (2 + i) * PAGE_SIZE) | PTE_TABLE;
    for (uint64_t i = 0; i < (uint64_t)DIRECTORIES * TABLE_ENTRIES; i++)
        pd[i] = i * 2 * MiB | PTE_PAGE_2M;
    ram_mark_dirty(ram, LAYOUT_PML4, bytes);
    return 0;
}

int linux64_prepare(const struct load *load, const struct bzimage *bz, uint64_t rip,
                    struct error *err)
{
    int ret = boot_place_parameters(load, err);
    if (ret)
        return ret;
    if (zero_page_write(load, bz) || page_tables_write(load->ram) ||
        boot_place_gdt(load->ram, true))
        return error_set(err, -EFAULT, "boot information: no RAM below 64 KiB");
    struct boot_entry *entry = load->entry;
    entry->mode = BOOT_MODE_LONG64;
    entry->rip = rip;
    entry->rsi = LAYOUT_ZERO_PAGE;
    entry->rsp = LAYOUT_PML4; // grows down into the free page between zero page and page tables
    entry->cr3 = LAYOUT_PML4;
    return 0;
}

int linux64_load(const struct elf *elf, const struct bzimage *bz, const struct load *load,
                 struct error *err)
{
    const char *name = elf->img->name;
    if (!elf->is64)
        return error_set(err, -ENOEXEC, "%s: a 32-bit ELF: expected a 64-bit kernel", name);
    if (!elf_executable_at(elf, elf->entry))
        return error_set(err, -ENOEXEC,
                         "%s: entry %#llx lies in no executable segment (segments are placed and "
                         "entered at their physical address)",
                         name, (unsigned long long)elf->entry);
    int ret = elf_load(elf, load, err);
    if (ret)
        return ret;
    load->entry->protocol = BOOT_LINUX64;
    return linux64_prepare(load, bz, elf->entry, err);
}
