// SPDX-License-Identifier: Apache-2.0
// A raw image at 0x7c00, as a PC's firmware loads a boot sector, but of any size that fits.
#include <errno.h>

#include "vmm/boot/loader.h"

int real_load(const struct load *load, struct error *err)
{
    const struct image *img = load->kernel;
    const uint64_t max = LAYOUT_EBDA - LAYOUT_REAL_IMAGE;
    if (img->size > max)
        return error_set(err, -EFBIG,
                         "%s: %llu bytes: a real-mode image has room for %llu (%#x..%#x)",
                         img->name, (unsigned long long)img->size, (unsigned long long)max,
                         LAYOUT_REAL_IMAGE, LAYOUT_EBDA);
    if (load->initrd)
        return error_set(err, -EINVAL, "%s: --boot real takes no initrd", load->initrd->name);
    if (load->config->cmdline && load->config->cmdline[0])
        return error_set(err, -EINVAL, "command line \"%.64s\": --boot real takes none",
                         load->config->cmdline);
    int ret = image_read_ram(img, 0, load->ram, LAYOUT_REAL_IMAGE, img->size, err);
    if (ret)
        return ret;
    struct boot_entry *entry = load->entry;
    entry->protocol = BOOT_REAL;
    entry->mode = BOOT_MODE_REAL;
    entry->rip = LAYOUT_REAL_IMAGE;
    entry->rsp = LAYOUT_REAL_IMAGE;
    entry->kernel_start = LAYOUT_REAL_IMAGE;
    entry->kernel_end = LAYOUT_REAL_IMAGE + img->size;
    return 0;
}
