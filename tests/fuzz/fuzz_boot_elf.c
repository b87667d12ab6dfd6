// SPDX-License-Identifier: Apache-2.0
#include "fuzz_boot.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const enum boot_protocol protocols[] = {BOOT_AUTO, BOOT_LINUX64, BOOT_PVH};
    return fuzz_boot(data, size, protocols, ARRAY_SIZE(protocols));
}
