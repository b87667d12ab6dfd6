// SPDX-License-Identifier: Apache-2.0
// Several page connections, the side that takes pages in: one thread for each places what comes,
// beside the main connection, which says when (wire.h: ROUND, PREPARE).
//
// Each connection has its shard of the pages (pages.h) and nothing else is accepted there, so two
// of them never write the same page or the same word of a bitmap.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "migrate/channel.h"
#include "migrate/pages.h"
#include "vmm/error.h"

struct streams_dest;

// `nr` connections are to come, for pages into `intake`, which counts none of its own until
// streams_dest_end. The one that fails first makes reading `main` end, with -ENODATA. `main` and
// `intake` must outlive this.
int streams_dest_create(struct streams_dest **sd, unsigned nr, struct page_intake *intake,
                        struct channel *main, unsigned idle_ms, struct error *err);

// Any thread, one at a time. Whether this one is to come, and has not; then takes it over (`c`
// becomes closed). -ECANCELED when they have ended.
bool streams_dest_wants(struct streams_dest *sd, unsigned index);
int streams_dest_take(struct streams_dest *sd, unsigned index, struct channel *c,
                      struct error *err);

// Waits until each connection has ended this pass. -ETIMEDOUT when nothing moves on any.
int streams_dest_wait(struct streams_dest *sd, uint32_t pass, struct error *err);
// Between these two nobody places a page.
void streams_dest_hold(struct streams_dest *sd);
void streams_dest_go_on(struct streams_dest *sd);

// When one of them failed, puts its error in `err`: the main connection's is a consequence. Returns
// it, or `ret`.
int streams_dest_cause(struct streams_dest *sd, int ret, struct error *err);

// Ends them: nobody writes guest memory after this. Their counts go to the intake. Harmless twice.
void streams_dest_end(struct streams_dest *sd);
void streams_dest_free(struct streams_dest *sd); // ends them; harmless with NULL
