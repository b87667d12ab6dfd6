// SPDX-License-Identifier: Apache-2.0
// COM1: a 16550A whose line speed is infinite.
//
// Output. A byte written to THR goes to the console at once. What the console does not take now
// waits in `out`; when that is nearly full, LSR.THRE stays clear, so a guest that polls or waits
// for the THRE interrupt waits for the console's reader, and no vCPU ever blocks in a write. Only a
// guest that writes on without THRE loses bytes; they are counted and logged.
//
// Input. Bytes of the console wait in `in` and enter the receive FIFO only when the guest can be
// expected to read them: it enabled the receive interrupt or polls LSR. Otherwise a driver that
// clears the FIFO while it opens the port would throw typed-ahead input away. When `in` is full
// the console is not read any more.
//
// Saved state holds both buffers: what the guest wrote and the console did not take moves with the
// guest, what the console took does not.
#pragma once

#include <stdint.h>

#include "vmm/device.h"

struct console;

enum {
    SERIAL_FIFO = 16,
    SERIAL_OUT_MAX = 4096,
    SERIAL_OUT_HIGH = SERIAL_OUT_MAX - 256, // bytes waiting from which THRE is held back
    SERIAL_IN_MAX = 4096,
};

struct serial_config {
    struct console *console; // NULL: output is discarded
    // Sets the interrupt line; NULL = vm_irq_set. Tests watch the line here.
    int (*irq_set)(struct vm *vm, unsigned gsi, unsigned level);
};

extern const struct device_class serial_class;

// Output bytes dropped because the guest wrote without THRE.
uint64_t serial_dropped(struct device *dev);
