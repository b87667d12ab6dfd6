// SPDX-License-Identifier: Apache-2.0
// An io_uring that can do a few things only. What a ring is asked to do passes by the seccomp
// filters: a thread in the wrong hands could open files through it. So each ring says at its birth
// what it is for, and the kernel refuses the rest (-EACCES) for ever.
#pragma once

#include <liburing.h>

#include "vmm/error.h"

// A ring that takes nothing yet. 0 or -errno, as io_uring_queue_init_params.
int ring_create(struct io_uring *ring, unsigned entries, unsigned completions);
// Only `ops` (IORING_OP_...) from now on; with `registered_only` only on files that have been
// registered. Before the first use, once everything has been registered.
int ring_open(struct io_uring *ring, const uint8_t *ops, unsigned nr_ops, bool registered_only,
              struct error *err);
