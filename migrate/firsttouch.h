// SPDX-License-Identifier: Apache-2.0
// What a guest that starts elsewhere will touch before it gets anywhere, going by its registers:
// the pages where its vCPUs' instructions and stacks are, what their registers point to, and the
// page tables on the way there. In post-copy each of them would be a fault, one after the other.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/ram.h"
#include "vmm/vm.h"

enum {
    FIRST_TOUCH_MAX = 256, // pages; what is more is left out
};

struct first_touch {
    uint64_t page[FIRST_TOUCH_MAX]; // ascending after first_touch_find, each once
    unsigned nr;
};

// Where a vCPU translates its addresses.
struct first_touch_paging {
    bool on, long_mode; // on without long_mode: not walked
    uint64_t cr3;
    unsigned levels; // 4 or 5
};

// The page of this linear address and those of the tables that lead there; a guest's tables may say
// anything.
void first_touch_add(struct first_touch *f, const struct ram *ram,
                     const struct first_touch_paging *paging, uint64_t linear);
// Of all vCPUs of a VM that is paused.
void first_touch_find(struct first_touch *f, struct vm *vm);
