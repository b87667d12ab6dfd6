// SPDX-License-Identifier: Apache-2.0
// Fewer bytes for a page: LZ4, and for a page that was sent before, LZ4 of what changed (XOR with
// the copy that the destination has). Each only while it pays: the time that the saved bytes would
// have taken on the link against the time that packing takes, both measured all along.
//
// The copies are a cache of bounded size. Only pages that come again are worth one, so round one
// fills nothing. A cached page is only ever sent from its copy, so the destination has exactly it.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "migrate/wire.h"
#include "vmm/error.h"
#include "vmm/ram.h"

enum pack_when { PACK_AUTO, PACK_ALWAYS, PACK_NEVER };
int pack_when_parse(const char *text, enum pack_when *when, struct error *err);

// Whether a way of packing pays. Pure.
struct pack_worth {
    uint64_t pages, ns, saved; // of what was tried, older trials weighing less
    unsigned skipped;          // batches since the last trial
};
void pack_worth_add(struct pack_worth *w, uint64_t pages, uint64_t ns, uint64_t saved);
// Asked once a batch: `bandwidth` in bytes/s, 0 = not known. Now and then it says yes to see
// whether things have changed.
bool pack_worth_try(struct pack_worth *w, uint64_t bandwidth);

struct packer {
    enum pack_when when;
    struct ram *ram;
    bool lz4, delta; // tried in this batch
    bool again;      // pages of this round were sent before
    struct pack_worth lz4_worth, delta_worth;
    // Counts of all batches.
    uint64_t lz4_pages, lz4_bytes, delta_pages, delta_bytes;
    uint64_t cached_pages; // sent as they are, but from their copies

    uint64_t slots; // of the cache; page p may be in slot p % slots
    uint64_t *tag;  // page + 1, 0 = empty
    uint8_t *copy;

    unsigned nr; // pages of the record under construction
    uint32_t len;
    struct wire_packed_page page[WIRE_BATCH_PAGES];
    uint8_t *data;
};

// `cache` in bytes; 0: no deltas. Without memory it packs less.
void packer_init(struct packer *p, struct ram *ram, enum pack_when when, uint64_t cache);
void packer_free(struct packer *p);
// A record begins; `bandwidth` as above.
void packer_begin(struct packer *p, uint64_t bandwidth);
// Takes a page into the record. False: send it as it is (it is in no cache then).
bool packer_take(struct packer *p, uint64_t page);
// The page is sent in another way.
void packer_forget(struct packer *p, uint64_t page);
bool packer_full(const struct packer *p);
int packer_put(struct packer *p, struct wire *w, struct error *err);

// The page of a PACKED record's entry into `page` (which holds its older content for a delta).
// -EBADMSG when the data is not what it should be. `data` is hostile.
int pack_unpack(const struct wire_packed_page *entry, const uint8_t *data, void *page,
                struct error *err);
