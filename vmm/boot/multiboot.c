// SPDX-License-Identifier: Apache-2.0
// Multiboot 1 (GNU Multiboot Specification 0.6.96): 32-bit protected mode, EAX holds a magic, EBX
// points to an information block.
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

#define HEADER_MAGIC  0x1badb002u
#define HEADER_SEARCH 8192u
#define LOADER_MAGIC  0x2badb002u

// Header flags. A loader must refuse what it does not know in bits 0 to 15.
#define HEADER_PAGE_ALIGN 0x00000001u // modules on page boundaries: ours always are
#define HEADER_MEMORY     0x00000002u // memory information: always given
#define HEADER_ADDRESSES  0x00010000u // load addresses are in the header, not in an ELF

#define INFO_MEMORY  0x001u
#define INFO_CMDLINE 0x004u
#define INFO_MODULES 0x008u
#define INFO_MEMMAP  0x040u
#define INFO_LOADER  0x200u

struct mb_header {
    uint32_t magic, flags, checksum;
    uint32_t header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};

struct mb_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
    uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name;
};

struct mb_module {
    uint32_t start, end, string, reserved;
};

struct mb_memory {
    uint32_t size; // of the rest
    uint64_t gpa, len;
    uint32_t type;
} __attribute__((packed));

struct mb_block {
    struct mb_info info;
    struct mb_module modules[1];
    struct mb_memory map[BOOT_MEMORY_MAX];
    char loader[8];
};

_Static_assert(sizeof(struct mb_info) == 68 && sizeof(struct mb_memory) == 24, "layout");
_Static_assert(LAYOUT_MULTIBOOT + sizeof(struct mb_block) <= LAYOUT_CMDLINE, "room");

// The header lies 4-aligned within the first 8 KiB. `offset` gets its place in the file.
static bool header_find(const struct image *img, struct mb_header *h, uint32_t *offset)
{
    uint8_t start[HEADER_SEARCH];
    uint32_t len = img->size < sizeof(start) ? (uint32_t)img->size : sizeof(start);
    if (image_read(img, 0, start, len, NULL))
        return false;
    for (uint32_t at = 0; at + 12 <= len; at += 4) {
        *h = (struct mb_header) {0};
        memcpy(h, start + at, 12);
        if (h->magic != HEADER_MAGIC || h->magic + h->flags + h->checksum)
            continue;
        if (at + sizeof(*h) <= len)
            memcpy(h, start + at, sizeof(*h));
        else if (h->flags & HEADER_ADDRESSES)
            continue; // cut off
        *offset = at;
        return true;
    }
    return false;
}

bool multiboot_recognise(const struct image *img)
{
    struct mb_header h;
    uint32_t offset;
    return header_find(img, &h, &offset);
}

// The five address fields as one segment: the file from header_offset - (header_addr - load_addr),
// up to load_end_addr (0: the whole file), zeroes up to bss_end_addr.
static int addresses_check(const struct image *img, const struct mb_header *h, uint32_t offset,
                           struct elf_segment *s, struct error *err)
{
    const char *name = img->name;
    uint32_t before = h->header_addr - h->load_addr;
    if (h->load_addr > h->header_addr || before > offset)
        return error_set(err, -ENOEXEC,
                         "%s: multiboot load_addr %#x, header_addr %#x: expected at most %#x bytes "
                         "before the header",
                         name, h->load_addr, h->header_addr, offset);
    *s =
        (struct elf_segment) {.offset = offset - before, .paddr = h->load_addr, .executable = true};
    s->filesz =
        h->load_end_addr ? (uint64_t)h->load_end_addr - h->load_addr : img->size - s->offset;
    if (h->load_end_addr && h->load_end_addr <= h->load_addr)
        return error_set(err, -ENOEXEC, "%s: multiboot load_end_addr %#x: expected above %#x", name,
                         h->load_end_addr, h->load_addr);
    if (!range_within(s->offset, s->filesz, img->size))
        return error_set(err, -ENOEXEC,
                         "%s: multiboot load_end_addr %#x: %#llx bytes at offset %#llx lie outside "
                         "the file of %#llx",
                         name, h->load_end_addr, (unsigned long long)s->filesz,
                         (unsigned long long)s->offset, (unsigned long long)img->size);
    s->memsz = s->filesz;
    if (h->bss_end_addr) {
        if (h->bss_end_addr < s->paddr + s->filesz)
            return error_set(err, -ENOEXEC,
                             "%s: multiboot bss_end_addr %#x: expected at least %#llx", name,
                             h->bss_end_addr, (unsigned long long)(s->paddr + s->filesz));
        s->memsz = h->bss_end_addr - s->paddr;
    }
    return 0;
}

// Both ways to say what is loaded where, brought to one form.
static int layout_read(struct elf *elf, const struct image *img, struct error *err)
{
    struct mb_header h;
    uint32_t offset;
    if (!header_find(img, &h, &offset))
        return error_set(err, -ENOEXEC,
                         "%s: no multiboot header (%#x, 4-aligned, with a right checksum) in the "
                         "first 8 KiB",
                         img->name, HEADER_MAGIC);
    uint32_t unknown = h.flags & 0xffff & ~(HEADER_PAGE_ALIGN | HEADER_MEMORY);
    if (unknown)
        return error_set(err, -ENOTSUP,
                         "%s: multiboot flags %#x demand what Ferry does not have (%#x%s)",
                         img->name, h.flags, unknown, unknown & 4 ? ", a video mode" : "");
    if (h.flags & HEADER_ADDRESSES) {
        *elf = (struct elf) {.img = img, .nr_segments = 1, .entry = h.entry_addr};
        return addresses_check(img, &h, offset, &elf->segments[0], err);
    }
    if (!elf_recognise(img))
        return error_set(err, -ENOEXEC,
                         "%s: multiboot flags %#x without load addresses (bit 16): expected an ELF",
                         img->name, h.flags);
    int ret = elf_parse(elf, img, err);
    if (!ret && elf->is64)
        ret = error_set(err, -ENOEXEC, "%s: a 64-bit ELF: multiboot takes 32-bit ones", img->name);
    return ret;
}

static int block_write(const struct load *load)
{
    const struct boot_entry *entry = load->entry;
    struct mb_block b = {
        .info = {.flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMMAP | INFO_LOADER,
                 .mem_lower = LAYOUT_EBDA / KiB,
                 .mem_upper = (uint32_t)((boot_low_end(load->ram) - LAYOUT_KERNEL) / KiB),
                 .cmdline = LAYOUT_CMDLINE,
                 .mmap_addr = LAYOUT_MULTIBOOT + offsetof(struct mb_block, map),
                 .boot_loader_name = LAYOUT_MULTIBOOT + offsetof(struct mb_block, loader)},
        .loader = "ferry",
    };
    if (entry->initrd_end) {
        b.info.flags |= INFO_MODULES;
        b.info.mods_count = 1;
        b.info.mods_addr = LAYOUT_MULTIBOOT + offsetof(struct mb_block, modules);
        b.modules[0].start = (uint32_t)entry->initrd_start;
        b.modules[0].end = (uint32_t)entry->initrd_end;
    }
    struct boot_memory map[BOOT_MEMORY_MAX];
    unsigned n = boot_memory_map(load->ram, map);
    b.info.mmap_length = n * (uint32_t)sizeof(b.map[0]);
    for (unsigned i = 0; i < n; i++)
        b.map[i] = (struct mb_memory) {sizeof(b.map[i]) - sizeof(b.map[i].size), map[i].gpa,
                                       map[i].size, map[i].type};
    return ram_write(load->ram, LAYOUT_MULTIBOOT, &b, sizeof(b));
}

int multiboot_load(const struct load *load, struct error *err)
{
    struct elf elf;
    int ret = layout_read(&elf, load->kernel, err);
    if (ret)
        return ret;
    if (!elf_executable_at(&elf, elf.entry))
        return error_set(err, -ENOEXEC, "%s: multiboot entry %#llx lies in no executable segment",
                         load->kernel->name, (unsigned long long)elf.entry);
    ret = elf_load(&elf, load, err);
    if (!ret)
        ret = boot_place_parameters(load, err);
    if (ret)
        return ret;
    if (block_write(load) || boot_place_gdt(load->ram, false))
        return error_set(err, -EFAULT, "boot information: no RAM below 128 KiB");
    struct boot_entry *entry = load->entry;
    entry->protocol = BOOT_MULTIBOOT;
    entry->mode = BOOT_MODE_PROTECTED32;
    entry->rip = elf.entry;
    entry->rax = LOADER_MAGIC;
    entry->rbx = LAYOUT_MULTIBOOT;
    entry->rsp = LAYOUT_PML4;
    return 0;
}
