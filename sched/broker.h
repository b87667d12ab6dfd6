// SPDX-License-Identifier: Apache-2.0
// For a VM in a jail, which does not see the scheduler's socket: a process outside that connects
// for it, also to the next daemon. What it hands in may register that VM and set its share, and
// nothing else (SCHED_CONFINE).
#pragma once

#include "vmm/error.h"

// Starts the process, before this one has threads or enters its jail; it ends with this one.
// Through `fd` sched_client_config.broker asks for connections to `socket`.
int sched_broker_start(const char *socket, int *fd, struct error *err);
