// SPDX-License-Identifier: Apache-2.0
// Numbers of another process's threads, when it has a PID namespace of its own.
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "vmm/error.h"

enum { THREADS_LOOKS_MAX = 256 };

// `tids`, as the process itself numbers them, to numbers of this process's namespace, in place.
// Returns how many threads had to be looked at (0 if both count alike, at most
// THREADS_LOOKS_MAX), or -errno: -ESRCH for a thread that is not among them.
int threads_translate(pid_t pid, int32_t *tids, unsigned nr, struct error *err);
