// SPDX-License-Identifier: Apache-2.0
// The host's side of the bare-metal guests' calls; the contract is guest/bare/ucall_abi.h.
// The device exists only when asked for: it lets a guest end the VM and write log lines.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest/bare/ucall_abi.h"
#include "vmm/device.h"

// One call, copied out of guest memory once and checked.
struct ucall_message {
    struct vm *vm;
    unsigned cpu;     // vCPU that calls; UINT_MAX when no vCPU thread does (unit tests)
    uint64_t gpa;     // of the guest's struct ucall
    uint64_t nr;      // enum ucall_nr
    uint64_t args[6]; // as the guest wrote them
    uint64_t result;  // goes back to the guest; 0, or UCALL_NONE for UCALL_GET and unknown calls
    // UCALL_PRINT: the text; UCALL_ASSERT: file and expression. Printable ASCII, newline and tab;
    // other bytes are shown as \xNN. "" otherwise.
    const char *text, *file, *expression;
};

struct ucall_config {
    // Sees every call first, in the calling vCPU's thread and without a device lock (so several
    // vCPUs may be inside at once). True: dealt with; false: the device does what it does by
    // default. Must not wait for vm_pause; ucall_hold waits in a way that vm_pause can end.
    bool (*handle)(void *arg, struct ucall_message *message);
    void *arg;
    // What UCALL_GET answers by default: bit n of `params_set` says that params[n] counts.
    uint64_t params[UCALL_P_COUNT];
    uint64_t params_set;
};

// By default: PRINT, SYNC and VALUE become log lines (LOG_INFO, rate-limited), GET answers from
// `params`, STOP holds the vCPU until the VM was paused, DONE ends the VM with its status
// (VM_STOP_DEBUG_EXIT), ASSERT and ABORT end it as VM_STOP_PANIC with the reason.
extern const struct device_class ucall_class;

// Keeps the calling vCPU until somebody pauses or stops the VM: the guest is then saved exactly
// behind its call, and goes on there when resumed. For use in `handle`.
void ucall_hold(struct vm *vm);

const char *ucall_value_name(uint64_t id); // "cpus" ...; NULL when unknown
