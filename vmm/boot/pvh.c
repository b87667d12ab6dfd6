// SPDX-License-Identifier: Apache-2.0
// The PVH entry (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h): 32-bit protected
// mode without paging, EBX points to a start-info block.
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

#define PVH_MAGIC 0x336ec578

struct pvh_start_info {
    uint32_t magic, version, flags, nr_modules;
    uint64_t modlist, cmdline, rsdp, memmap;
    uint32_t memmap_entries, reserved;
};

struct pvh_module {
    uint64_t gpa, size, cmdline, reserved;
};

struct pvh_memory {
    uint64_t gpa, size;
    uint32_t type, reserved;
};

// All that is handed over, in the page at LAYOUT_PVH_INFO.
struct pvh_block {
    struct pvh_start_info info;
    struct pvh_module modules[1];
    struct pvh_memory map[BOOT_MEMORY_MAX];
};

_Static_assert(sizeof(struct pvh_start_info) == 56, "version 1");
_Static_assert(sizeof(struct pvh_module) == 32 && sizeof(struct pvh_memory) == 24, "layout");
_Static_assert(LAYOUT_PVH_INFO + sizeof(struct pvh_block) <= LAYOUT_ZERO_PAGE, "one page");

static int block_write(const struct load *load)
{
    const struct boot_entry *entry = load->entry;
    struct pvh_block b = {.info = {.magic = PVH_MAGIC,
                                   .version = 1,
                                   .cmdline = LAYOUT_CMDLINE,
                                   .rsdp = load->config->rsdp,
                                   .memmap = LAYOUT_PVH_INFO + offsetof(struct pvh_block, map)}};
    if (entry->initrd_end) {
        b.info.nr_modules = 1;
        b.info.modlist = LAYOUT_PVH_INFO + offsetof(struct pvh_block, modules);
        b.modules[0].gpa = entry->initrd_start;
        b.modules[0].size = entry->initrd_end - entry->initrd_start;
    }
    struct boot_memory map[BOOT_MEMORY_MAX];
    b.info.memmap_entries = boot_memory_map(load->ram, map);
    for (unsigned i = 0; i < b.info.memmap_entries; i++)
        b.map[i] = (struct pvh_memory) {map[i].gpa, map[i].size, map[i].type, 0};
    return ram_write(load->ram, LAYOUT_PVH_INFO, &b, sizeof(b));
}

int pvh_load(const struct elf *elf, const struct load *load, struct error *err)
{
    const char *name = elf->img->name;
    if (!elf->has_pvh)
        return error_set(
            err, -ENOEXEC,
            "%s: no PVH entry: the ELF has no note 18 of owner Xen (Linux: CONFIG_PVH)", name);
    if (!elf_executable_at(elf, elf->pvh_entry))
        return error_set(err, -ENOEXEC, "%s: PVH entry %#llx lies in no executable segment", name,
                         (unsigned long long)elf->pvh_entry);
    int ret = elf_load(elf, load, err);
    if (!ret)
        ret = boot_place_parameters(load, err);
    if (ret)
        return ret;
    if (block_write(load) || boot_place_gdt(load->ram, false))
        return error_set(err, -EFAULT, "boot information: no RAM below 64 KiB");
    struct boot_entry *entry = load->entry;
    entry->protocol = BOOT_PVH;
    entry->mode = BOOT_MODE_PROTECTED32;
    entry->rip = elf->pvh_entry;
    entry->rbx = LAYOUT_PVH_INFO;
    entry->rsp = LAYOUT_PML4; // as free here as under the 64-bit protocol
    return 0;
}
