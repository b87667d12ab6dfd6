// SPDX-License-Identifier: Apache-2.0
// Where pages land that come while the guest runs: guest memory under userfaultfd, and the two ways
// of putting a page there.
//
//   COPY      pages of 4 KiB: a page is received into a buffer, and the kernel copies it into a new
//             page of the guest's (UFFDIO_COPY).
//   CONTINUE  huge pages, 4 KiB at a time: each is received into the memfd itself, through a second
//             mapping that is not guarded. When all of a huge page have come it is shown to the
//             guest (UFFDIO_CONTINUE). Until then the guest waits for what is in the file but not
//             shown (a minor fault) as for what is not there at all (a missing fault: a hole).
//
// A memfd of 4 KiB pages could be filled by CONTINUE as well, and is not: touching a new page in
// the second mapping costs more than the copy that it saves (docs/migration.md has the figures).
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmm/error.h"
#include "vmm/ram.h"

struct landing {
    struct ram *ram;
    int uffd;
    uint8_t *second;         // the second mapping; NULL: COPY
    uint64_t unit;           // pages that the guest gets at once: 1, or 512 with CONTINUE
    _Atomic uint64_t *there; // CONTINUE: bits of the units that the memfd has (maybe); a bitmap
};

// Whether it can be done with this memory, which must not hold anything yet. -EOPNOTSUPP: not with
// its backing on this kernel; -EPERM: no userfaultfd allowed.
int landing_possible(struct ram *ram, struct error *err);

// landing_close in any case.
int landing_open(struct landing *l, struct ram *ram, struct error *err);
// From now on whoever touches a page without its bit in `here`, or one of the same unit, waits.
// Those pages are dropped (a unit as a whole, or not at all: the second mapping has the old).
int landing_guard(struct landing *l, const uint64_t *here, struct error *err);
// Everybody who waits goes on, with whatever is there.
void landing_unguard(struct landing *l);
void landing_close(struct landing *l); // unguards

// The first page of the unit that `page` lies in.
static inline uint64_t landing_unit(const struct landing *l, uint64_t page)
{
    return page - page % l->unit;
}
// The unit of `page` is complete, going by the bitmap `here`.
bool landing_whole(const struct landing *l, const uint64_t *here, uint64_t page);
// COPY: puts pages there and wakes who waits. A page that is there already stays as it is.
int landing_copy(struct landing *l, uint64_t first, const void *data, uint64_t count,
                 struct error *err);

// CONTINUE: makes room in the second mapping, so that touching it there cannot fail.
int landing_room(struct landing *l, uint64_t first, uint64_t count, struct error *err);
static inline void *landing_page(const struct landing *l, uint64_t page)
{
    return l->second + page * PAGE_SIZE;
}
// Makes these pages, of one unit, zero.
void landing_clear(struct landing *l, uint64_t first, uint64_t count);
// Shows the unit of `page`, if there is anything, and wakes who waits. False: all of it is zero and
// was never placed, which is left to landing_serve.
int landing_show(struct landing *l, uint64_t page, bool *shown, struct error *err);

// Who waits for the unit of `page`, which is complete, gets it: whatever has come, zeroes where
// nothing has.
int landing_serve(struct landing *l, uint64_t page, struct error *err);
