// SPDX-License-Identifier: Apache-2.0
// Dynamic self-ballooning (Hines and Gopalan, VEE'09) as a pure function: how much of its memory a
// guest should give up while it moves, so that nothing of that has to be sent.
//
//  - It gives up 95 % of what it has to spare: what its kernel calls available, which is free
//    memory and the part of the page cache that can be dropped, less a reserve to work with.
//  - What it has to spare is looked at again and again; when it uses more, the balloon wants less.
//  - Pressure (less to spare than half the reserve, pages swapped out, a burst of pages read back
//    from disk) gives a quarter of what was taken back at once, at least what the reserve lacks,
//    and from then on nothing more is taken: a guest that needs its memory is left alone.
//
// The guest says all these numbers and may lie; it then only has less memory than it could have.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/ram.h"

#define SELFBALLOON_RESERVE_MIN (16 * MiB)
#define SELFBALLOON_RESERVE_MAX (1024 * MiB)

enum {
    SELFBALLOON_RESERVE_PART = 16, // of the guest's memory is its reserve
    SELFBALLOON_LEAVE_PART = 20,   // of what can be spared is not taken
    SELFBALLOON_BURST = 256,       // pages read from disk between two looks
};
#define SELFBALLOON_STEP MiB // less is not worth an interrupt

struct selfballoon {
    uint64_t memory; // bytes, the guest's
    uint64_t most;   // bytes that may be taken
    uint64_t taken;  // wanted now, beyond what the balloon's user wants; a multiple of the step
    bool pressed;    // there was pressure
    bool known;      // the two below are
    uint64_t swapped_out, major_faults; // as last said
};

// `most` 0: nothing is ever taken.
void selfballoon_init(struct selfballoon *s, uint64_t memory, uint64_t most);

// A new statement of the guest: s->taken becomes what should be taken now. True: it changed.
bool selfballoon_look(struct selfballoon *s, const struct ram_guest_says *says);
