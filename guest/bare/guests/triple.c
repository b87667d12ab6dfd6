// SPDX-License-Identifier: Apache-2.0
// Triple fault: an exception without an interrupt descriptor table.
#include "../rt.h"

void guest_main(void)
{
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) none = {0, 0};
    GUEST_SYNC(1);
    __asm__ volatile("lidt %0; ud2" : : "m"(none));
}
