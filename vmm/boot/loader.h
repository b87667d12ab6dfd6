// SPDX-License-Identifier: Apache-2.0
// What the loaders share. Only vmm/boot, its tests and its fuzzers include this; everybody else
// uses boot.h. Kernels are hostile input: every field is checked against the file and against RAM
// before it is used.
#pragma once

#include <elf.h>
#include <stddef.h>

#include "vmm/boot/boot.h"
#include "vmm/error.h"
#include "vmm/layout.h"
#include "vmm/ram.h"
#include "vmm/util.h"

// --- image.c: bytes of a kernel or initrd, in a file or in memory

struct image {
    char name[256]; // starts every message: "kernel /boot/vmlinux"
    int fd;         // -1: the bytes are at `data`
    const uint8_t *data;
    uint64_t size; // bytes
};

// Opens a regular, non-empty file; `what` is "kernel" or "initrd". On error nothing is left open.
int image_open(struct image *img, const char *what, const char *path, struct error *err);
void image_close(struct image *img);
// Image of bytes that the caller keeps until the load is over.
struct image image_from_memory(const char *name, const void *data, uint64_t size);
// Bytes [offset, offset+len); -ENOEXEC when the image has not that many.
int image_read(const struct image *img, uint64_t offset, void *data, uint64_t len,
               struct error *err);
// The same into guest RAM, which must still be all zero there: holes and zero pages are not
// touched. -EFAULT unless the range is RAM.
int image_read_ram(const struct image *img, uint64_t offset, struct ram *ram, uint64_t gpa,
                   uint64_t len, struct error *err);

// --- one load in progress

struct load {
    struct ram *ram;
    const struct boot_config *config;
    const struct image *kernel; // the file; loaders get the image to load beside it
    const struct image *initrd; // NULL for none
    struct boot_entry *entry;
    uint32_t cmdline_max;  // bytes without the final zero that this kernel takes
    uint64_t initrd_limit; // the initrd must end at or below this address
};

// What Linux takes when the image does not say (COMMAND_LINE_SIZE less the final zero).
enum { LINUX_CMDLINE_MAX = 2047 };

// Loads from images that are open already; boot_load is this plus the opening of files.
int boot_load_images(struct ram *ram, const struct boot_config *config, const struct image *kernel,
                     const struct image *initrd, struct boot_entry *entry, struct error *err);

// --- place.c: what every protocol hands to the guest

enum boot_memory_type { BOOT_MEMORY_RAM = 1, BOOT_MEMORY_RESERVED = 2 }; // as e820 has them

struct boot_memory {
    uint64_t gpa, size;
    enum boot_memory_type type;
};

enum { BOOT_MEMORY_MAX = 8 };

// The memory map in order of address, without overlaps; returns the number of entries.
unsigned boot_memory_map(const struct ram *ram, struct boot_memory map[BOOT_MEMORY_MAX]);
// End of RAM below 4 GiB.
uint64_t boot_low_end(const struct ram *ram);
// Flat segments at LAYOUT_GDT, accessed bit set: code at selector 0x10, data at 0x18 (Linux's
// __BOOT_CS and __BOOT_DS; the other protocols leave the choice to us). 0 or -EFAULT.
int boot_place_gdt(struct ram *ram, bool long_mode);
// Writes the command line to LAYOUT_CMDLINE.
int boot_place_cmdline(const struct load *load, struct error *err);
// Loads the initrd, if any, as high as it may lie and clear of the kernel; sets entry->initrd_*.
int boot_place_initrd(const struct load *load, struct error *err);
// boot_place_cmdline, then boot_place_initrd.
int boot_place_parameters(const struct load *load, struct error *err);

// --- elf.c

enum { ELF_SEGMENTS_MAX = 64 };

struct elf_segment {
    unsigned index; // in the program header table
    uint64_t offset, filesz, paddr, memsz;
    bool executable;
};

struct elf {
    const struct image *img;
    bool is64;
    uint16_t machine;
    uint64_t entry;
    unsigned nr_segments; // PT_LOAD with memory
    struct elf_segment segments[ELF_SEGMENTS_MAX];
    bool has_pvh;
    uint64_t pvh_entry;
};

bool elf_recognise(const struct image *img);
// Reads and checks headers and notes; writes nothing to RAM.
int elf_parse(struct elf *elf, const struct image *img, struct error *err);
// Whether `address` can be the first instruction: in the file part of an executable segment.
bool elf_executable_at(const struct elf *elf, uint64_t address);
// Checks that the segments fit RAM, loads them and sets entry->kernel_start/end.
int elf_load(const struct elf *elf, const struct load *load, struct error *err);

// --- bzimage.c: the setup header of a bzImage (Documentation/arch/x86/boot.rst of Linux)

struct bzimage {
    const struct image *img;
    uint8_t header[0x290 - 0x1f1]; // bytes 0x1f1 ... of the file, as the zero page wants them
    unsigned header_len;           // how many of them the kernel has
    uint16_t version;
    uint16_t xloadflags;
    uint64_t setup_size;                     // bytes before the protected-mode part
    uint64_t protected_size;                 // bytes of the protected-mode part
    uint32_t payload_offset, payload_length; // from the protected-mode part
    bool relocatable;
    uint32_t alignment;
    uint64_t pref_address;
    uint32_t init_size;
    uint32_t cmdline_size;
    uint32_t initrd_addr_max; // highest address of the initrd's last byte
};

bool bzimage_recognise(const struct image *img);
int bzimage_parse(struct bzimage *bz, const struct image *img, struct error *err);
// Limits that the setup header puts on command line and initrd.
void bzimage_apply_limits(const struct bzimage *bz, struct load *load);
// Unpacks the kernel inside; at most as many bytes as the guest has memory.
struct unpacked;
int bzimage_unpack(const struct bzimage *bz, const struct ram *ram, struct unpacked *out,
                   struct error *err);
// BOOT_BZIMAGE: the guest decompresses itself.
int bzimage_load(const struct bzimage *bz, const struct load *load, struct error *err);

// --- unpack.c

struct unpacked {
    const char *format; // "gzip", "xz", ...
    uint8_t *data;
    size_t size;    // bytes
    size_t map_len; // bytes mapped
};

// Unpacks the payload of a bzImage: a compressed stream followed, except for gzip, by its unpacked
// size as a 32-bit number. More than `limit` bytes are refused. `name` starts the messages.
int unpack(struct unpacked *out, const char *name, const uint8_t *in, size_t len, uint64_t limit,
           struct error *err);
void unpack_free(struct unpacked *out);

// --- protocols

// `bz` is NULL when the kernel was no bzImage.
int linux64_load(const struct elf *elf, const struct bzimage *bz, const struct load *load,
                 struct error *err);
// Zero page, page tables, GDT and the entry registers of the 64-bit boot protocol. The kernel lies
// in RAM already.
int linux64_prepare(const struct load *load, const struct bzimage *bz, uint64_t rip,
                    struct error *err);
int pvh_load(const struct elf *elf, const struct load *load, struct error *err);
bool multiboot_recognise(const struct image *img);
int multiboot_load(const struct load *load, struct error *err);
int real_load(const struct load *load, struct error *err);
