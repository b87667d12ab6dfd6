// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

// End of the legacy video and ROM area that starts at 640 KiB.
#define BASE_MEMORY_END 0xa0000

uint64_t boot_low_end(const struct ram *ram)
{
    return ram->regions[0].gpa + ram->regions[0].size;
}

unsigned boot_memory_map(const struct ram *ram, struct boot_memory map[BOOT_MEMORY_MAX])
{
    unsigned n = 0;
    map[n++] = (struct boot_memory) {0, LAYOUT_EBDA, BOOT_MEMORY_RAM};
    map[n++] =
        (struct boot_memory) {LAYOUT_EBDA, BASE_MEMORY_END - LAYOUT_EBDA, BOOT_MEMORY_RESERVED};
    map[n++] =
        (struct boot_memory) {LAYOUT_ACPI, LAYOUT_MPTABLE_END - LAYOUT_ACPI, BOOT_MEMORY_RESERVED};
    map[n++] =
        (struct boot_memory) {LAYOUT_KERNEL, boot_low_end(ram) - LAYOUT_KERNEL, BOOT_MEMORY_RAM};
    // Linux uses ECAM only where firmware reserved it.
    map[n++] =
        (struct boot_memory) {LAYOUT_ECAM, LAYOUT_ECAM_END - LAYOUT_ECAM, BOOT_MEMORY_RESERVED};
    map[n++] = (struct boot_memory) {LAYOUT_IDENTITY_PT, LAYOUT_RAM_HIGH - LAYOUT_IDENTITY_PT,
                                     BOOT_MEMORY_RESERVED};
    for (unsigned i = 1; i < ram->nr_regions; i++)
        map[n++] =
            (struct boot_memory) {ram->regions[i].gpa, ram->regions[i].size, BOOT_MEMORY_RAM};
    return n;
}

int boot_place_gdt(struct ram *ram, bool long_mode)
{
    const uint64_t code = long_mode ? 0x00af9b000000ffff : 0x00cf9b000000ffff;
    const uint64_t gdt[] = {0, 0, code, 0x00cf93000000ffff};
    return ram_write(ram, LAYOUT_GDT, gdt, sizeof(gdt));
}

int boot_place_cmdline(const struct load *load, struct error *err)
{
    const char *text = load->config->cmdline ? load->config->cmdline : "";
    size_t len = strlen(text), max = load->cmdline_max;
    if (max > LAYOUT_CMDLINE_MAX - 1)
        max = LAYOUT_CMDLINE_MAX - 1;
    if (len > max)
        return error_set(err, -E2BIG, "command line of %zu bytes: %s takes at most %zu; shorten it",
                         len, load->kernel->name, max);
    return ram_write(load->ram, LAYOUT_CMDLINE, text, len + 1)
               ? error_set(err, -EFAULT, "command line: no RAM at %#x", LAYOUT_CMDLINE)
               : 0;
}

// Room of `gap` for page-aligned data, as bytes.
static uint64_t gap_room(uint64_t start, uint64_t end)
{
    start = align_up(start, PAGE_SIZE);
    end = align_down(end, PAGE_SIZE);
    return end > start ? end - start : 0;
}

static uint64_t lower(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

int boot_place_initrd(const struct load *load, struct error *err)
{
    struct boot_entry *entry = load->entry;
    entry->initrd_start = entry->initrd_end = 0;
    if (!load->initrd)
        return 0;

    uint64_t size = load->initrd->size;
    uint64_t limit = lower(load->initrd_limit, boot_low_end(load->ram));
    uint64_t above = gap_room(entry->kernel_end, limit);
    uint64_t below = gap_room(LAYOUT_KERNEL, lower(entry->kernel_start, limit));
    uint64_t top = above >= size ? limit : entry->kernel_start;
    if (above < size && below < size)
        return error_set(
            err, -E2BIG,
            "%s: %llu KiB do not fit: beside the kernel (%#llx..%#llx) there are %llu "
            "KiB in one piece below %#llx; give the guest more memory or make the "
            "initrd smaller",
            load->initrd->name, (unsigned long long)((size + KiB - 1) / KiB),
            (unsigned long long)entry->kernel_start, (unsigned long long)entry->kernel_end,
            (unsigned long long)((above > below ? above : below) / KiB), (unsigned long long)limit);
    uint64_t start = align_down(lower(top, limit) - size, PAGE_SIZE);
    int ret = image_read_ram(load->initrd, 0, load->ram, start, size, err);
    if (ret)
        return ret;
    entry->initrd_start = start;
    entry->initrd_end = start + size;
    return 0;
}

int boot_place_parameters(const struct load *load, struct error *err)
{
    int ret = boot_place_cmdline(load, err);
    return ret ? ret : boot_place_initrd(load, err);
}
