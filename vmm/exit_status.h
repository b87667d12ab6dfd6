// SPDX-License-Identifier: Apache-2.0
// Exit statuses of the ferry program; docs/ferry.1 lists the same.
#pragma once

enum exit_status {
    EXIT_OK = 0,     // done; of `run`: the guest powered off (or debug exit 0, or migrated away)
    EXIT_FAILED = 1, // a failure of ferry, KVM or the host
    EXIT_USAGE = 2,  // bad option or bad input file
    EXIT_HOST = 3,   // this host lacks what is needed (see `ferry check`)
    EXIT_GUEST_REBOOT = 16,
    EXIT_GUEST_PANIC = 17,
    EXIT_GUEST_TRIPLE_FAULT = 18,
    EXIT_GUEST_EMULATION = 19, // KVM could not run an instruction of the guest
    EXIT_STOPPED = 20,         // `ferry stop`, escape key, SIGTERM
    EXIT_DEBUG_BASE = 100,     // + the value a guest wrote to the debug-exit port, 1 to 27
    EXIT_DEBUG_MAX = 27,
};
