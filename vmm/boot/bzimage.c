// SPDX-License-Identifier: Apache-2.0
// bzImage: 512-byte sectors of real-mode code with the setup header, then the protected-mode part:
// a decompressor around the packed kernel (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel
// Header").
#include <errno.h>
#include <string.h>

#include "vmm/boot/loader.h"

// Setup header: byte offsets in the file.
enum {
    HDR_START = 0x1f1, // setup_sects, 8 bit
    HDR_SYSSIZE = 0x1f4,
    HDR_BOOT_FLAG = 0x1fe,
    HDR_JUMP = 0x200, // short jump over the header: its target is the header's end
    HDR_MAGIC = 0x202,
    HDR_VERSION = 0x206,
    HDR_LOADFLAGS = 0x211,
    HDR_INITRD_ADDR_MAX = 0x22c,
    HDR_ALIGNMENT = 0x230,
    HDR_RELOCATABLE = 0x234,
    HDR_XLOADFLAGS = 0x236,
    HDR_CMDLINE_SIZE = 0x238,
    HDR_PAYLOAD_OFFSET = 0x248,
    HDR_PAYLOAD_LENGTH = 0x24c,
    HDR_END_2_08 = 0x250,
    HDR_PREF_ADDRESS = 0x258,
    HDR_INIT_SIZE = 0x260,
    HDR_END_2_10 = 0x264,
    HDR_LIMIT = 0x290, // where the zero page's room for the header ends
};

#define BOOT_FLAG         0xaa55
#define LOADED_HIGH       0x01
#define XLF_KERNEL_64     0x01
#define ENTRY_64_OFFSET   0x200
#define VERSION_PAYLOAD   0x0208
#define VERSION_PREFERRED 0x020a // pref_address, init_size
#define VERSION_XLOAD     0x020c // xloadflags

enum { SECTOR = 512, SETUP_SECTS_DEFAULT = 4 };

typedef unsigned long long ull;

bool bzimage_recognise(const struct image *img)
{
    char magic[4];
    return !image_read(img, HDR_MAGIC, magic, sizeof(magic), NULL) && !memcmp(magic, "HdrS", 4);
}

static uint64_t field(const struct bzimage *bz, unsigned offset, unsigned bytes)
{
    uint64_t value = 0;
    memcpy(&value, bz->header + (offset - HDR_START), bytes);
    return value;
}

// Reads the header as far as its jump says, and checks that this covers what the version promises.
static int header_read(struct bzimage *bz, struct error *err)
{
    const char *name = bz->img->name;
    _Static_assert(sizeof(bz->header) == HDR_LIMIT - HDR_START, "header room");
    if (bz->img->size < HDR_LIMIT)
        return error_set(err, -ENOEXEC, "%s: bzImage of %llu bytes: too short for its setup header",
                         name, (ull)bz->img->size);
    int ret = image_read(bz->img, HDR_START, bz->header, sizeof(bz->header), err);
    if (ret)
        return ret;
    if (field(bz, HDR_BOOT_FLAG, 2) != BOOT_FLAG)
        return error_set(err, -ENOEXEC, "%s: bzImage boot_flag %#llx: expected %#x", name,
                         (ull)field(bz, HDR_BOOT_FLAG, 2), BOOT_FLAG);
    bz->version = (uint16_t)field(bz, HDR_VERSION, 2);
    if (bz->version < VERSION_PAYLOAD)
        return error_set(err, -ENOEXEC,
                         "%s: boot protocol %u.%02u: expected 2.08 or later (Linux 2.6.26)", name,
                         bz->version >> 8, bz->version & 0xff);
    unsigned end = HDR_MAGIC + (unsigned)field(bz, HDR_JUMP + 1, 1);
    unsigned needed = bz->version < VERSION_PREFERRED ? HDR_END_2_08 : HDR_END_2_10;
    if (end < needed)
        return error_set(err, -ENOEXEC,
                         "%s: the setup header ends at %#x: expected %#x or later for boot "
                         "protocol %u.%02u",
                         name, end, needed, bz->version >> 8, bz->version & 0xff);
    end = end < HDR_LIMIT ? end : HDR_LIMIT;
    bz->header_len = end - HDR_START;
    memset(bz->header + bz->header_len, 0, sizeof(bz->header) - bz->header_len);
    return 0;
}

static int sizes_check(struct bzimage *bz, struct error *err)
{
    const struct image *img = bz->img;
    uint64_t sects = field(bz, HDR_START, 1);
    bz->setup_size = ((sects ? sects : SETUP_SECTS_DEFAULT) + 1) * SECTOR;
    bz->protected_size = field(bz, HDR_SYSSIZE, 4) * 16;
    if (bz->setup_size >= img->size)
        return error_set(err, -ENOEXEC,
                         "%s: setup_sects %llu: the kernel would start at byte %llu, the file has "
                         "%llu",
                         img->name, (ull)sects, (ull)bz->setup_size, (ull)img->size);
    uint64_t rest = img->size - bz->setup_size;
    if (!bz->protected_size || bz->protected_size > align_up(rest, 16))
        return error_set(
            err, -ENOEXEC,
            "%s: syssize says %llu bytes of kernel, the file has %llu: is it complete?", img->name,
            (ull)bz->protected_size, (ull)rest);
    if (bz->protected_size > rest) // syssize counts 16-byte units
        bz->protected_size = rest;
    return 0;
}

int bzimage_parse(struct bzimage *bz, const struct image *img, struct error *err)
{
    *bz = (struct bzimage) {.img = img};
    int ret = header_read(bz, err);
    if (!ret)
        ret = sizes_check(bz, err);
    if (ret)
        return ret;
    if (!(field(bz, HDR_LOADFLAGS, 1) & LOADED_HIGH))
        return error_set(err, -ENOEXEC, "%s: a zImage (loadflags %#llx): expected a bzImage",
                         img->name, (ull)field(bz, HDR_LOADFLAGS, 1));
    bz->initrd_addr_max = (uint32_t)field(bz, HDR_INITRD_ADDR_MAX, 4);
    bz->alignment = (uint32_t)field(bz, HDR_ALIGNMENT, 4);
    bz->relocatable = field(bz, HDR_RELOCATABLE, 1);
    bz->cmdline_size = (uint32_t)field(bz, HDR_CMDLINE_SIZE, 4);
    bz->payload_offset = (uint32_t)field(bz, HDR_PAYLOAD_OFFSET, 4);
    bz->payload_length = (uint32_t)field(bz, HDR_PAYLOAD_LENGTH, 4);
    if (bz->version >= VERSION_PREFERRED) {
        bz->pref_address = field(bz, HDR_PREF_ADDRESS, 8);
        bz->init_size = (uint32_t)field(bz, HDR_INIT_SIZE, 4);
    }
    if (bz->version >= VERSION_XLOAD)
        bz->xloadflags = (uint16_t)field(bz, HDR_XLOADFLAGS, 2);
    if (bz->relocatable && (!bz->alignment || bz->alignment & (bz->alignment - 1)))
        return error_set(err, -ENOEXEC, "%s: kernel_alignment %#x: expected a power of two",
                         img->name, bz->alignment);
    return 0;
}

void bzimage_apply_limits(const struct bzimage *bz, struct load *load)
{
    load->cmdline_max = bz->cmdline_size;
    load->initrd_limit = (uint64_t)bz->initrd_addr_max + 1;
}

int bzimage_unpack(const struct bzimage *bz, const struct ram *ram, struct unpacked *out,
                   struct error *err)
{
    const struct image *img = bz->img;
    if (!bz->payload_length)
        return error_set(err, -ENOEXEC,
                         "%s: payload_length 0: the bzImage has no payload to unpack; --boot "
                         "bzimage lets the guest do it",
                         img->name);
    if (!range_within(bz->payload_offset, bz->payload_length, bz->protected_size))
        return error_set(
            err, -ENOEXEC, "%s: payload of %#x bytes at %#x lies outside the %#llx bytes of kernel",
            img->name, bz->payload_length, bz->payload_offset, (ull)bz->protected_size);
    autofree uint8_t *payload = malloc(bz->payload_length);
    if (!payload)
        return error_set(err, -ENOMEM, "%s: no memory for its payload of %u bytes", img->name,
                         bz->payload_length);
    int ret =
        image_read(img, bz->setup_size + bz->payload_offset, payload, bz->payload_length, err);
    return ret ? ret : unpack(out, img->name, payload, bz->payload_length, ram->size, err);
}

// Where the protected-mode part goes. The decompressor moves itself to pref_address in any case, so
// the memory there must exist.
static int address_choose(const struct bzimage *bz, const struct ram *ram, uint64_t *address,
                          struct error *err)
{
    const char *name = bz->img->name;
    uint64_t low_end = boot_low_end(ram);
    *address = bz->relocatable ? bz->pref_address : LAYOUT_KERNEL;
    if (bz->relocatable && bz->pref_address % bz->alignment)
        return error_set(err, -ENOEXEC,
                         "%s: pref_address %#llx: expected a multiple of kernel_alignment %#x",
                         name, (ull)bz->pref_address, bz->alignment);
    if (bz->pref_address < LAYOUT_KERNEL || !range_within(bz->pref_address, bz->init_size, low_end))
        return error_set(err, -ENOEXEC,
                         "%s: wants %#x bytes at pref_address %#llx to unpack itself: expected "
                         "within %#x..%#llx, the guest's %llu MiB of memory",
                         name, bz->init_size, (ull)bz->pref_address, LAYOUT_KERNEL, (ull)low_end,
                         (ull)(ram->size / MiB));
    if (!range_within(*address, bz->protected_size, low_end))
        return error_set(err, -ENOEXEC,
                         "%s: %llu KiB at %#llx do not fit the guest's %llu MiB of memory", name,
                         (ull)(bz->protected_size / KiB), (ull)*address, (ull)(ram->size / MiB));
    return 0;
}

int bzimage_load(const struct bzimage *bz, const struct load *load, struct error *err)
{
    const char *name = bz->img->name;
    if (bz->version < VERSION_XLOAD || !(bz->xloadflags & XLF_KERNEL_64))
        return error_set(
            err, -ENOEXEC,
            "%s: no 64-bit entry (boot protocol %u.%02u, xloadflags %#x): expected 2.12 "
            "or later with bit 0 set",
            name, bz->version >> 8, bz->version & 0xff, bz->xloadflags);
    if (bz->protected_size <= ENTRY_64_OFFSET)
        return error_set(err, -ENOEXEC, "%s: %llu bytes of kernel: the 64-bit entry is at %#x",
                         name, (ull)bz->protected_size, ENTRY_64_OFFSET);
    uint64_t address;
    int ret = address_choose(bz, load->ram, &address, err);
    if (!ret)
        ret = image_read_ram(bz->img, bz->setup_size, load->ram, address, bz->protected_size, err);
    if (ret)
        return ret;
    uint64_t end = address + bz->protected_size, unpacked_end = bz->pref_address + bz->init_size;
    struct boot_entry *entry = load->entry;
    entry->protocol = BOOT_BZIMAGE;
    entry->kernel_start = address < bz->pref_address ? address : bz->pref_address;
    entry->kernel_end = end > unpacked_end ? end : unpacked_end;
    return linux64_prepare(load, bz, address + ENTRY_64_OFFSET, err);
}
