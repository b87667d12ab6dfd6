// SPDX-License-Identifier: Apache-2.0
// Resets the machine through the keyboard controller (8042 command 0xfe).
#include "../rt.h"

void guest_main(void)
{
    GUEST_SYNC(1);
    outb(0x64, 0xfe);
    cpu_park();
}
