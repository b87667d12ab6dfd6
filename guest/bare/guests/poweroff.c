// SPDX-License-Identifier: Apache-2.0
// ACPI S5 by the hardware-reduced sleep control register.
#include "../rt.h"

void guest_main(void)
{
    GUEST_SYNC(1);
    outb(UCALL_SLEEP_PORT, UCALL_SLEEP_S5);
    cpu_park();
}
