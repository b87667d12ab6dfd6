// SPDX-License-Identifier: Apache-2.0
// The least a VMM must do: load, enter, memory map, command line, output, ring 3 and back.
#include "../rt.h"

static uint64_t user_add(void *arg)
{
    GUEST_SYNC(2); // port I/O from ring 3
    return *(uint64_t *)arg + 1;
}

void guest_main(void)
{
    uint64_t ram = 0, value = 41;
    for (unsigned i = 0; i < ram_range_count; i++)
        ram += ram_ranges[i].bytes;
    print("hello from %s, %lu MiB, %u cpus, cmdline \"%s\"\n",
          boot_kind == BOOT_PVH ? "PVH" : "64-bit boot", ram >> 20, cpu_count, boot_cmdline);
    guest_value(UCALL_V_BOOT, boot_kind, 0);
    guest_value(UCALL_V_RAM_BYTES, ram, 0);
    guest_value(UCALL_V_CPUS, cpu_count, 0);
    GUEST_SYNC(1);
    GUEST_ASSERT_EQ(ring3_run(user_add, &value), 42);
    GUEST_SYNC(3);
}
