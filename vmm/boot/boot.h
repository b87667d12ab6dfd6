// SPDX-License-Identifier: Apache-2.0
// Loading a guest: which loader takes a kernel image, what it puts where in RAM, and in which state
// vCPU 0 starts. No KVM here: loaders work on `struct ram` alone, so they are tested and fuzzed
// without a VM.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/ram.h"

enum boot_protocol {
    BOOT_AUTO,
    BOOT_LINUX64,   // ELF vmlinux or bzImage payload, 64-bit Linux boot protocol
    BOOT_PVH,       // ELF with a PVH note, 32-bit protected mode
    BOOT_BZIMAGE,   // bzImage as it is: the guest runs its own decompressor (64-bit entry)
    BOOT_MULTIBOOT, // multiboot 1 ELF32
    BOOT_REAL,      // raw image at 0x7c00, real mode
};

struct boot_config {
    const char *kernel;  // path
    const char *initrd;  // path or NULL
    const char *cmdline; // "" for none
    enum boot_protocol protocol;
    uint64_t rsdp; // GPA of the ACPI RSDP, 0 = none
};

// How vCPU 0 starts. Segment state follows from the mode.
enum boot_mode { BOOT_MODE_REAL, BOOT_MODE_PROTECTED32, BOOT_MODE_LONG64 };

struct boot_entry {
    enum boot_mode mode;
    uint64_t rip, rax, rbx, rsi, rsp;
    uint64_t cr3;                      // LONG64: page tables that map the first 4 GiB one to one
    enum boot_protocol protocol;       // what BOOT_AUTO became
    uint64_t kernel_start, kernel_end; // GPA range of the loaded image
    uint64_t initrd_start, initrd_end; // 0,0 without
};

const char *boot_protocol_name(enum boot_protocol protocol);
int boot_protocol_parse(const char *text, enum boot_protocol *protocol, struct error *err);

// Kernel and initrd, opened: what a guest was started from, whatever becomes of the names.
struct boot_files;
int boot_open(struct boot_files **files, const struct boot_config *config, struct error *err);
void boot_close(struct boot_files *files); // NULL is fine

// Loads kernel, initrd and command line, writes page tables, GDT and boot information.
int boot_load_files(struct ram *ram, const struct boot_config *config,
                    const struct boot_files *files, struct boot_entry *entry, struct error *err);
// The same with the files that `config` names.
int boot_load(struct ram *ram, const struct boot_config *config, struct boot_entry *entry,
              struct error *err);
