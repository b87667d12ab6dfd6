// SPDX-License-Identifier: Apache-2.0
// What the fuzzers of vmm/boot share: one load of a kernel made of the input, and what must hold
// after it whatever the input was.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/boot/loader.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static inline void must(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "broken: %s\n", what);
    abort();
}

static inline void entry_check(const struct ram *ram, const struct boot_entry *e)
{
    must(e->kernel_end > e->kernel_start, "the kernel has a size");
    must(ram_contains(ram, e->kernel_start, e->kernel_end - e->kernel_start), "kernel in RAM");
    must(e->protocol != BOOT_AUTO, "the protocol is known");
    must(e->rip >= e->kernel_start && e->rip < e->kernel_end, "entry in the kernel");
    must(e->mode == BOOT_MODE_REAL || e->kernel_start >= LAYOUT_KERNEL, "kernel above 1 MiB");
    if (!e->initrd_end)
        return;
    must(ram_contains(ram, e->initrd_start, e->initrd_end - e->initrd_start), "initrd in RAM");
    must(e->initrd_start >= LAYOUT_KERNEL, "initrd above 1 MiB");
    must(e->initrd_end <= e->kernel_start || e->initrd_start >= e->kernel_end,
         "initrd clear of the kernel");
}

// The input is one byte of choices, then the kernel file.
static inline int fuzz_boot(const uint8_t *data, size_t size, const enum boot_protocol *protocols,
                            unsigned nr_protocols)
{
    if (size < 2)
        return 0;
    static const uint64_t sizes[] = {16 * MiB, 32 * MiB, 64 * MiB, 4 * GiB};
    static const uint8_t initrd_bytes[5000] = {1};
    struct ram ram;
    struct error err = {0};
    struct boot_entry entry;
    struct ram_config ram_config = {.size = sizes[data[0] & 3]};
    struct boot_config config = {.cmdline = "console=ttyS0",
                                 .protocol = protocols[(data[0] >> 3 & 15) % nr_protocols]};
    struct image kernel = image_from_memory("kernel fuzz", data + 1, size - 1);
    struct image initrd = image_from_memory("initrd fuzz", initrd_bytes, sizeof(initrd_bytes));
    must(!ram_create(&ram, &ram_config, &err), err.text);
    int ret = boot_load_images(&ram, &config, &kernel, data[0] & 4 ? &initrd : NULL, &entry, &err);
    if (ret)
        must(ret == err.code && err.text[0] && !strchr(err.text, '\n'), "an error says one line");
    else
        entry_check(&ram, &entry);
    ram_destroy(&ram);
    return 0;
}
