// SPDX-License-Identifier: Apache-2.0
// Free page hinting on request (PATCH /balloon/hinting/start): the guest names the pages it does
// not need, and the host takes their memory back.
//
// A hint may be old when it is read: the guest is free to use the page again. So the dirty log runs
// meanwhile, and when the guest has named everything it is paused for as long as it takes to give
// back what was hinted and has not been written since. Loop's thread.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/loop.h"
#include "vmm/ram.h"

struct vm;

struct hinting {
    struct vm *vm; // NULL before the first run
    struct loop_timer timer;
    _Atomic uint64_t *hinted; // a bit for each page
    bool asks; // the balloon writes to `hinted`; the guest holds the pages until the end
    struct ram_dirty dirty; // what the guest has written since its hints began
    bool acknowledge;
    uint64_t seen, news_ns; // progress, and when it last changed
};

// `acknowledge`: the guest may use the pages again as soon as they have been taken; otherwise when
// hinting_stop says so. -EBUSY: a run is under way, or a migration is; -ENODEV: no balloon;
// -ENOTCONN: the guest gives no hints.
int hinting_start(struct hinting *h, struct vm *vm, bool acknowledge, struct error *err);
void hinting_stop(struct hinting *h); // what has not been taken yet stays where it is
// Before the VM goes. Its memory must outlive the loop.
void hinting_end(struct hinting *h);
