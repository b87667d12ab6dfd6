// SPDX-License-Identifier: Apache-2.0
// Post-copy, the side that lacks pages: userfaultfd over guest memory, a thread that turns faults
// into requests, and the placing of what arrives.
#pragma once

#include <stdint.h>

#include "migrate/blockmove.h"
#include "migrate/channel.h"
#include "vmm/error.h"
#include "vmm/ram.h"

struct postcopy_dest;

// `valid` has a bit for each page whose content is here (copied). All others are dropped, and from
// now on whoever touches one waits until it has come. `demand` and `disks`, whose blocks may come
// as well (migrate/blockpost.h), must outlive this.
int postcopy_dest_create(struct postcopy_dest **pd, struct ram *ram, const uint64_t *valid,
                         struct channel *demand, struct block_intake *disks, struct error *err);

// The guest's state has been loaded, which may have touched missing pages. Before this a failure,
// or a page that takes longer than `demand`'s time-out, ends the guard, so that loading goes on and
// this fails; after it the guest waits.
int postcopy_dest_loaded(struct postcopy_dest *pd, struct error *err);

// Places a PAGES record whose data is unread in `w`. Any thread, one at a time per `buffer`
// (WIRE_BATCH_PAGES pages).
int postcopy_dest_place(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                        void *buffer, struct error *err);

// The same for a LATE record: blocks of a disk.
int postcopy_dest_late(struct postcopy_dest *pd, struct wire *w, const struct wire_record *record,
                       void *buffer, struct error *err);

// Waits until every page and every block is here. -ETIMEDOUT when none came for timeout_ms; the
// demand connection's error when it broke.
int postcopy_dest_wait(struct postcopy_dest *pd, unsigned timeout_ms, struct error *err);

// When its own threads failed, puts their error in `err`: the main connection's is a consequence.
void postcopy_dest_cause(struct postcopy_dest *pd, struct error *err);
uint64_t postcopy_dest_missing(struct postcopy_dest *pd);
void postcopy_dest_counts(struct postcopy_dest *pd, uint64_t *faults, uint64_t *requested);

void postcopy_dest_latency(struct postcopy_dest *pd, struct wire_faults *latency);

// Sets the bits of the pages that are not here.
void postcopy_dest_lacks(struct postcopy_dest *pd, uint64_t *missing);

// After postcopy_dest_stop, `demand` is a new connection: asks again for what was asked for, and
// goes on.
int postcopy_dest_resume(struct postcopy_dest *pd, struct error *err);

// Stops asking. Who waits for a missing page goes on waiting: guest memory stays guarded.
void postcopy_dest_stop(struct postcopy_dest *pd);
// Ends the guard: a missing page now reads as zero, so only when none is missing or the VM has
// ended.
void postcopy_dest_free(struct postcopy_dest *pd);
