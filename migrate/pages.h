// SPDX-License-Identifier: Apache-2.0
// Guest pages in motion: from a bitmap of pages to PAGES records and back into memory. Shared by
// migration and snapshots.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "migrate/wire.h"
#include "vmm/error.h"
#include "vmm/ram.h"

bool page_is_zero(const void *page);

// Knows which pages were never touched, so that sending them neither reads nor allocates them.
struct page_presence {
    int pagemap_fd;        // -1: not known, every page counts as present
    uint64_t first, count; // what `absent` describes
    uint64_t absent[8];    // bitmap of up to 512 pages from `first`
    // Pages the guest does not need (struct ram_hinter): sent as zero. NULL: not known.
    const _Atomic uint64_t *hinted;
    uint64_t nr_free; // such pages that page_batch_take took
};
void page_presence_init(struct page_presence *p);
void page_presence_free(struct page_presence *p);
// A new pass over the pages begins: some have been touched that were not before.
static inline void page_presence_begin(struct page_presence *p)
{
    p->count = 0;
}
// Never touched, or all zero. Cheap for pages asked for in ascending order.
bool page_known_zero(struct page_presence *p, const struct ram *ram, uint64_t page);

// Which pages one of several connections carries: blocks of SHARD_PAGES in turn. A bitmap's word
// belongs to one of them, so they work on the same bitmaps; and a page always takes the same way,
// on which no older copy of it comes later.
enum { SHARD_PAGES = 512 }; // a huge page
struct page_shard {
    unsigned index, count; // count 0: all pages
};
// Whether [first, first + count) lies in it, and in one block of it.
bool page_shard_has(const struct page_shard *s, uint64_t first, uint64_t count);
// The first set bit of `map` from `from` on that belongs to it; `pages` when there is none.
uint64_t page_shard_find(const struct page_shard *s, const uint64_t *map, uint64_t pages,
                         uint64_t from);

struct packer;

// One PAGES record under construction. Data is sent from guest memory itself.
struct page_batch {
    struct ram *ram;
    struct packer *packer; // NULL, or who is offered each page of data first
    struct page_shard shard;
    uint32_t nr_runs, nr_data;
    uint64_t nr_zero;
    struct wire_run runs[WIRE_RUNS_MAX];
    uint32_t sums[WIRE_BATCH_PAGES];
    struct iovec iov[WIRE_RUNS_MAX + 2];
    unsigned nr_iov;
    uint8_t meta[sizeof(struct wire_pages) + WIRE_RUNS_MAX * sizeof(struct wire_run) +
                 WIRE_BATCH_PAGES * sizeof(uint32_t) + PAGE_SIZE];
};

void page_batch_reset(struct page_batch *b, struct ram *ram);
// False when the record is full. Pages must come in ascending order.
bool page_batch_add(struct page_batch *b, uint64_t page, bool zero);
// Adds pages of `todo` from *cursor on and clears their bits, until the record has max_data pages
// of data or is full, or about 64 Ki pages were looked at (so that progress goes on) or the map
// ends. `presence` may be NULL.
void page_batch_take(struct page_batch *b, uint64_t *todo, uint64_t *cursor, unsigned max_data,
                     struct page_presence *presence);
// Writes the record; the page data starts at a multiple of `align` (a power of two <= 4 KiB)
// counted from w->out. Nothing is written when it is empty.
int page_batch_put(struct page_batch *b, struct wire *w, unsigned align, struct error *err);

// --- receiving, the VM not yet running

// Bitmaps of what has arrived. `damaged` pages did not match their sum: while the source still runs
// that is no error, since a page sent while the guest wrote to it is sent again; at the switch none
// may be left.
struct page_intake {
    struct ram *ram;
    uint64_t *seen;    // arrived at least once
    uint64_t *touched; // memory of the page may be non-zero
    uint64_t *damaged;
    uint64_t nr_seen, nr_damaged, nr_data, nr_zero;
    bool once;               // a page may arrive only once and must match (snapshot files)
    struct page_shard shard; // others are refused
};
int page_intake_init(struct page_intake *in, struct ram *ram, struct error *err);
void page_intake_free(struct page_intake *in);
// The same for a PACKED record; `buffer` has room for WIRE_BATCH_PAGES pages.
int page_intake_packed(struct page_intake *in, struct wire *w, const struct wire_record *record,
                       void *buffer, struct error *err);
// Reads a PAGES record's data straight into guest memory.
int page_intake_record(struct page_intake *in, struct wire *w, const struct wire_record *record,
                       struct error *err);
