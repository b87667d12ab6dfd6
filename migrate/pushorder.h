// SPDX-License-Identifier: Apache-2.0
// In which order post-copy pushes pages: a pure choice behind a small interface, so that the same
// code is driven by the pusher and by a simulator. Plain pushing goes upwards once; bubbling orders
// take their place here.
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct pushorder;

struct pushorder_ops {
    const char *name;
    // A page was demanded (and has been taken out of `unsent` already, if it was there).
    void (*fault)(struct pushorder *order, uint64_t page);
    // The next run of at most `max` unsent pages: its first page in `*first`, its length returned;
    // 0 when nothing is left. Does not change `unsent`: the caller clears what it sends.
    uint64_t (*next)(struct pushorder *order, const uint64_t *unsent, uint64_t max,
                     uint64_t *first);
};

struct pushorder {
    const struct pushorder_ops *ops;
    uint64_t pages;  // pages of the guest
    uint64_t cursor; // plain: where the last run ended
};

extern const struct pushorder_ops pushorder_plain;

void pushorder_init(struct pushorder *order, const struct pushorder_ops *ops, uint64_t pages);
