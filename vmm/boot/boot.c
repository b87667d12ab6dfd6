// SPDX-License-Identifier: Apache-2.0
#include "vmm/boot/boot.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/boot/loader.h"

static const char *const protocol_names[] = {
    [BOOT_AUTO] = "auto",       [BOOT_LINUX64] = "linux64",     [BOOT_PVH] = "pvh",
    [BOOT_BZIMAGE] = "bzimage", [BOOT_MULTIBOOT] = "multiboot", [BOOT_REAL] = "real",
};

const char *boot_protocol_name(enum boot_protocol protocol)
{
    return (size_t)protocol < ARRAY_SIZE(protocol_names) ? protocol_names[protocol] : "?";
}

int boot_protocol_parse(const char *text, enum boot_protocol *protocol, struct error *err)
{
    for (size_t i = 0; i < ARRAY_SIZE(protocol_names); i++)
        if (!strcmp(text, protocol_names[i])) {
            *protocol = (enum boot_protocol)i;
            return 0;
        }
    return error_set(err, -EINVAL,
                     "boot protocol '%s': expected auto, linux64, pvh, bzimage, multiboot or real",
                     text);
}

static int load_elf(const struct image *img, const struct bzimage *bz, const struct load *load,
                    struct error *err)
{
    struct elf elf;
    enum boot_protocol protocol = load->config->protocol;
    int ret = elf_parse(&elf, img, err);
    if (ret)
        return ret;
    if (protocol == BOOT_AUTO) {
        bool entry64 = elf.is64 && elf_executable_at(&elf, elf.entry);
        protocol = elf.has_pvh && !entry64 ? BOOT_PVH : BOOT_LINUX64;
        if (!bz && !elf.is64 && !elf.has_pvh) {
            if (!multiboot_recognise(img))
                return error_set(err, -ENOEXEC,
                                 "%s: a 32-bit ELF with neither a PVH note nor a multiboot header: "
                                 "it says no way to start it",
                                 img->name);
            return multiboot_load(load, err);
        }
    }
    return protocol == BOOT_PVH ? pvh_load(&elf, load, err) : linux64_load(&elf, bz, load, err);
}

static int load_bzimage(struct load *load, struct error *err)
{
    struct bzimage bz;
    int ret = bzimage_parse(&bz, load->kernel, err);
    if (ret)
        return ret;
    bzimage_apply_limits(&bz, load);
    if (load->config->protocol == BOOT_BZIMAGE)
        return bzimage_load(&bz, load, err);

    struct unpacked kernel;
    ret = bzimage_unpack(&bz, load->ram, &kernel, err);
    if (ret)
        return ret;
    struct image inner = image_from_memory(load->kernel->name, kernel.data, kernel.size);
    if (elf_recognise(&inner))
        ret = load_elf(&inner, &bz, load, err);
    else
        ret = error_set(
            err, -ENOEXEC, "%s: the unpacked %s payload starts with %02x %02x: expected an ELF",
            inner.name, kernel.format, inner.data[0], inner.size > 1 ? inner.data[1] : 0);
    unpack_free(&kernel);
    return ret;
}

static int unknown_image(const struct image *img, struct error *err)
{
    uint8_t first[8] = {0};
    char hex[3 * sizeof(first) + 1] = "";
    size_t n = img->size < sizeof(first) ? (size_t)img->size : sizeof(first);
    int ret = image_read(img, 0, first, n, err);
    if (ret)
        return ret;
    for (size_t i = 0; i < n; i++)
        snprintf(hex + 3 * i, 4, " %02x", first[i]);
    return error_set(
        err, -ENOEXEC,
        "%s: not a kernel Ferry knows: it starts with%s (of %llu bytes); accepted are "
        "a bzImage, an ELF vmlinux, an ELF with a PVH note or a multiboot header, and, "
        "with --boot real, a raw image",
        img->name, hex, (unsigned long long)img->size);
}

static int load_dispatch(struct load *load, struct error *err)
{
    const struct image *img = load->kernel;
    enum boot_protocol protocol = load->config->protocol;
    switch (protocol) {
    case BOOT_REAL:
        return real_load(load, err);
    case BOOT_MULTIBOOT:
        return multiboot_load(load, err);
    case BOOT_BZIMAGE:
        if (!bzimage_recognise(img))
            return error_set(err, -ENOEXEC, "%s: not a bzImage: no \"HdrS\" at byte 0x202",
                             img->name);
        return load_bzimage(load, err);
    case BOOT_AUTO:
    case BOOT_LINUX64:
    case BOOT_PVH:
        if (elf_recognise(img))
            return load_elf(img, NULL, load, err);
        if (bzimage_recognise(img))
            return load_bzimage(load, err);
        return unknown_image(img, err);
    }
    return error_set(err, -EINVAL, "boot protocol %d is unknown", protocol);
}

int boot_load_images(struct ram *ram, const struct boot_config *config, const struct image *kernel,
                     const struct image *initrd, struct boot_entry *entry, struct error *err)
{
    *entry = (struct boot_entry) {0};
    struct load load = {
        .ram = ram,
        .config = config,
        .kernel = kernel,
        .initrd = initrd,
        .entry = entry,
        .cmdline_max = LINUX_CMDLINE_MAX,
        .initrd_limit = UINT64_MAX,
    };
    return load_dispatch(&load, err);
}

struct boot_files {
    struct image kernel, initrd;
    bool has_initrd;
};

int boot_open(struct boot_files **out, const struct boot_config *config, struct error *err)
{
    struct boot_files *files = calloc(1, sizeof(*files));
    if (!files)
        return error_set(err, -ENOMEM, "no memory to load %s", config->kernel);
    files->initrd.fd = -1;
    int ret = image_open(&files->kernel, "kernel", config->kernel, err);
    if (!ret && config->initrd) {
        ret = image_open(&files->initrd, "initrd", config->initrd, err);
        files->has_initrd = true;
    }
    if (ret) {
        boot_close(files);
        return ret;
    }
    *out = files;
    return 0;
}

void boot_close(struct boot_files *files)
{
    if (!files)
        return;
    image_close(&files->kernel);
    image_close(&files->initrd);
    free(files);
}

int boot_load_files(struct ram *ram, const struct boot_config *config,
                    const struct boot_files *files, struct boot_entry *entry, struct error *err)
{
    return boot_load_images(ram, config, &files->kernel, files->has_initrd ? &files->initrd : NULL,
                            entry, err);
}

int boot_load(struct ram *ram, const struct boot_config *config, struct boot_entry *entry,
              struct error *err)
{
    struct boot_files *files;
    int ret = boot_open(&files, config, err);
    if (ret)
        return ret;
    ret = boot_load_files(ram, config, files, entry, err);
    boot_close(files);
    return ret;
}
