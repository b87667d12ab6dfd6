// SPDX-License-Identifier: Apache-2.0
// Copy-on-write overlay: a file that holds the clusters of a disk that differ from its base image.
// The format is drawn in docs/formats.md.
//
// The data of a cluster stands at a fixed place (data_offset + its place on the disk) in a sparse
// file; the table has one bit for each cluster that says whether the overlay has it. So the file,
// which is hostile input, contains no addresses: a wrong bit shows other bytes of the same disk,
// nothing else.
//
// Crash consistency. A bit is only ever set, never cleared, so that any mixture of an old and a new
// table page is a good table; and it reaches the file only after the data it stands for:
//   blk_overlay_stage     copies the bits whose data has been written into the table for the file
//   fdatasync             of the data
//   blk_overlay_next ...  the changed pages of the table for the file, to be written
//   fdatasync
// One such flush at a time; bits that are set meanwhile wait for the next.
//
// No I/O of the guest's data here, and no thread: the caller's lock is held around every call.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "devices/blk_image.h"
#include "vmm/error.h"

// A guest's file system writes whole pages, which then need no copy; the table takes 32 MiB for
// each TiB, as far as it is used.
enum {
    BLK_CLUSTER = 4096,
    BLK_OVERLAY_TABLE = 4096, // where it begins in the file
};
#define BLK_OVERLAY_MAX (8ull << 40) // bytes of disk

struct blk_overlay {
    struct blk_image file; // the overlay itself
    struct blk_image *base;
    uint64_t size;        // bytes of the disk
    uint64_t base_size;   // of it come from the base, the rest is zero; <= size
    uint64_t data_offset; // in the file
    bool frozen;
    uint8_t header[BLK_SECTOR]; // as in the file
    size_t table_bytes;         // of `size`, a multiple of a page
    uint8_t *present;           // the table now
    uint8_t *stable;            // the table for the file
    uint64_t *changed;          // a bit for each page of `present` that is newer than `stable`
    uint64_t *unwritten;        // the same for `stable` and the file
    size_t write_page;          // blk_overlay_next looks on from here
};

// Opens `path` over `base` (open, read-only), or makes it when it is not there or empty and
// `mode->create`. Locks nothing. With `later` the table is not read: whoever has the overlay now
// will still write to it; blk_overlay_load follows.
int blk_overlay_open(struct blk_overlay *o, const char *path, const struct blk_image_mode *mode,
                     struct blk_image *base, bool later, struct error *err);
int blk_overlay_load(struct blk_overlay *o, struct error *err); // header and table, anew
void blk_overlay_close(struct blk_overlay *o);                  // syncs nothing

// Bytes from `offset` on, at most `len` (> 0, within the disk), that are all in the overlay
// (*present) or all not.
uint64_t blk_overlay_run(const struct blk_overlay *o, uint64_t offset, uint64_t len, bool *present);
// The overlay has all of the clusters that [offset, offset+len) touches; len > 0.
void blk_overlay_set(struct blk_overlay *o, uint64_t offset, uint64_t len);

void blk_overlay_stage(struct blk_overlay *o);
bool blk_overlay_staged(const struct blk_overlay *o); // whether there is anything to write
// The next stretch of the table to write at `*offset` of the file; false: nothing more.
bool blk_overlay_next(struct blk_overlay *o, uint64_t *offset, void **data, size_t *len);
void blk_overlay_written(struct blk_overlay *o, uint64_t offset, size_t len);
// All of a flush at once; nothing is under way.
int blk_overlay_sync(struct blk_overlay *o, struct error *err);

// The disk grows (never shrinks: what was cut off would come back when it grows again).
int blk_overlay_grow(struct blk_overlay *o, uint64_t size, struct error *err);
// For snapshots and clones: syncs, and from then on nobody opens the file for writing any more. It
// is then good to be copied (sparse), or shared as it is with readers. Writes of this opener must
// have ended.
int blk_overlay_freeze(struct blk_overlay *o, struct error *err);
