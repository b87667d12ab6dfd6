// SPDX-License-Identifier: Apache-2.0
// An overlay as it is at one instant, copied while its disk is written to: what is about to change
// is copied first, everything else a stretch at a time by whoever wants the copy. At the instant
// itself only the table is copied, in memory (32 KiB for each GiB of disk).
//
//   cluster   not in the overlay then   nothing: the base has it
//             in it                     todo --step, or keep before its first change--> copied
#pragma once

#include <stdint.h>

#include "devices/blk_overlay.h"
#include "vmm/error.h"

struct blk_frozen;

// `to` is empty, and the caller's until blk_frozen_free. Nothing of the overlay is being changed;
// its data is in its file. Keeps no pointer to it.
int blk_frozen_create(struct blk_frozen **f, const struct blk_overlay *o, int to,
                      struct error *err);
void blk_frozen_free(struct blk_frozen *f); // NULL is fine

// Before bytes [offset, offset + len) of the disk change; len > 0. An error is blk_frozen_step's:
// the change may be made all the same.
void blk_frozen_keep(struct blk_frozen *f, uint64_t offset, uint64_t len);
// The next stretch, from any thread. 1: there may be more; 0: the copy is a complete overlay,
// though not synced.
int blk_frozen_step(struct blk_frozen *f, struct error *err);
