// SPDX-License-Identifier: Apache-2.0
// A snapshot as a file: the format, writing and reading. No VM in here. docs/formats.md draws it.
//
//   file := header (4 KiB), page data, sections (machine, state, ...), index, end of file
//
//   header   who it is (id), whom it needs (the parent's name and id, for a diff), where all else
//            lies; its own CRC-32C. Written last.
//   data     chunks of up to 64 pages, each with a sum in the index.
//              PACKED: chunks of any pages, LZ4 or raw, one behind the other
//              MAPPED: raw; page p lies at data_offset + p * 4096; what is not there is a hole
//   index    chunks, then runs of pages in ascending order: which chunk, from which slot on; or
//   zero
//
// Header, data, sections and index touch and end where the file ends, so every byte has a sum.
// Pages that a full file does not list are zero; those that a diff does not list are its parent's.
//
// A file is written under a temporary name beside its own, synced, renamed, and the directory
// synced: at each moment the name has the old file whole or the new one whole.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/error.h"

#define SNAPFILE_MAGIC "FERRYSNP"

enum {
    SNAPFILE_VERSION = 2, // 1 was a stream of migration records and is not read any more
    SNAPFILE_HEADER = 4096,
    SNAPFILE_ID_LEN = 16,
    SNAPFILE_NAME_MAX = 256,   // with its terminator
    SNAPFILE_CHUNK_PAGES = 64, // at most
    SNAPFILE_DEPTH_MAX = 64,   // files in a chain
    SNAPFILE_SECTION_MAX = 64 << 20,
};

enum snapfile_kind { SNAPFILE_FULL = 1, SNAPFILE_DIFF = 2 };
enum snapfile_layout { SNAPFILE_PACKED = 1, SNAPFILE_MAPPED = 2 };
enum snapfile_compress { SNAPFILE_NONE, SNAPFILE_LZ4 };

enum snapfile_section {
    SNAPFILE_MACHINE = 1, // needed: the meta of a MACHINE record (migrate/wire.h)
    SNAPFILE_STATE,       // needed: what vm_save wrote
    SNAPFILE_DISKS,       // JSON: the frozen overlays that belong to it
    SNAPFILE_INDEX,       // written by snapfile_commit itself
    SNAPFILE_SECTIONS,
};

// --- writing

struct snapfile_params {
    enum snapfile_layout layout;
    enum snapfile_compress compress; // PACKED only: -EINVAL with MAPPED
    // A diff: the file it continues, in the same directory (a chain moves as a directory). NULL:
    // full.
    const char *parent;
    uint64_t pages;   // of guest memory
    unsigned workers; // threads that compress and write; 0 = as many as CPUs, at most 4
    // The same guest once more, in place of the file of this id: the new one has its id and time,
    // and may be needed as a parent. NULL: a snapshot of its own.
    const struct snapfile_info *again;
};

struct snapfile_report {
    uint8_t id[SNAPFILE_ID_LEN];
    uint64_t data_pages, zero_pages; // zero: a full's unlisted pages are counted, too
    uint64_t chunks, lz4_chunks;
    uint64_t file_bytes;   // apparent size
    uint64_t stored_bytes; // page data in the file
};

struct snapfile_writer;

// Creates the temporary file and the workers. Refused: a path that is something else than a regular
// file, or that another snapshot of the directory (or the parent's chain) needs as its parent.
int snapfile_create(struct snapfile_writer **w, const char *path, const struct snapfile_params *p,
                    struct error *err);

// Adds pages [first, first + count). The data is copied before the call returns. Any thread, any
// order, each page once at most (-EEXIST). Waits for the disk when the workers fall behind (memory
// is bounded: 256 KiB for each of 2 * workers + 2 buffers). Pages of zeros are found and cost no
// data. An error of a worker (a full disk) is told here or by snapfile_commit.
int snapfile_add_pages(struct snapfile_writer *w, uint64_t first, uint64_t count, const void *data,
                       struct error *err);
// The pages are zero now. Costs nothing in a full file.
int snapfile_add_zero(struct snapfile_writer *w, uint64_t first, uint64_t count, struct error *err);

// Once for each section; copied. Any time before the commit.
int snapfile_set_section(struct snapfile_writer *w, enum snapfile_section section, const void *data,
                         size_t len, struct error *err);

// Waits for the workers, writes index and header, syncs, renames. Frees `w`, whatever happens;
// after an error the temporary file is gone and an older file of that name is untouched.
int snapfile_commit(struct snapfile_writer *w, struct snapfile_report *report, struct error *err);
void snapfile_abort(struct snapfile_writer *w); // NULL is fine
// Removes what writers of this file that were killed left behind (snapfile_create does, too).
void snapfile_clean(const char *path);

// --- what a file says about itself

struct snapfile_info {
    enum snapfile_kind kind;
    enum snapfile_layout layout;
    enum snapfile_compress compress;
    uint8_t id[SNAPFILE_ID_LEN], parent_id[SNAPFILE_ID_LEN];
    char parent[SNAPFILE_NAME_MAX]; // "" for a full one
    uint64_t pages;
    uint64_t data_pages, zero_pages; // listed ones
    uint64_t file_bytes;
    int64_t created_s; // Unix time
};

// Reads and checks one file's header only. -EINVAL: not a snapshot.
int snapfile_peek(const char *path, struct snapfile_info *info, struct error *err);

// --- reading

struct snapfile;

// Opens the file and its parents; checks headers, sections and indexes of them all and that they
// belong together. Page data is checked when it is read. A chain longer than SNAPFILE_DEPTH_MAX or
// in a circle is refused.
int snapfile_open(struct snapfile **f, const char *path, struct error *err);
void snapfile_close(struct snapfile *f); // NULL is fine

const struct snapfile_info *snapfile_info(const struct snapfile *f);
unsigned snapfile_depth(const struct snapfile *f); // files in the chain: 1 for a full one
// The n-th file of the chain: 0 = the one opened, depth - 1 = the full one.
const struct snapfile_info *snapfile_level(const struct snapfile *f, unsigned n, const char **path);
// NULL: it has none. Valid until the close.
const void *snapfile_section(const struct snapfile *f, enum snapfile_section section, size_t *len);

enum snapfile_where_kind { SNAPFILE_ZERO, SNAPFILE_RAW, SNAPFILE_CHUNK };

// Where a page's content is. The same is true of the pages around it:
//   ZERO   pages [page - before, page + count) are zero
//   RAW    page + i, i in [0, count), lies at `offset` + i * 4096 of `fd`, uncompressed
//   CHUNK  pages [page - before, page + count) are slots [slot - before, slot + count) of an LZ4
//          chunk (`level`, `chunk`) of `pages` pages: snapfile_chunk unpacks it
struct snapfile_where {
    enum snapfile_where_kind kind;
    uint64_t before, count; // count >= 1
    int fd;                 // the file's own: do not close
    uint64_t offset;        // bytes into fd: of the page (RAW), of the chunk (CHUNK)
    uint32_t len;           // CHUNK: compressed bytes
    uint32_t pages, slot;   // CHUNK
    unsigned level;         // of the chain
    uint32_t chunk;
};

// page < info->pages. Any thread.
void snapfile_find(const struct snapfile *f, uint64_t page, struct snapfile_where *where);

// Reads a chunk, checks its sum and unpacks it to `dst` (SNAPFILE_CHUNK_PAGES pages of room). For
// CHUNK and for RAW (whose chunk may hold pages that are not to be used). Any thread.
int snapfile_chunk(const struct snapfile *f, unsigned level, uint32_t chunk, void *dst,
                   struct error *err);

// Reads pages [first, first + count) to dst, checked: -EBADMSG names file, chunk and page.
// Any thread.
int snapfile_read(const struct snapfile *f, uint64_t first, uint64_t count, void *dst,
                  struct error *err);

// Where snapfile_load puts pages: memory for page `page`, and in *count how many pages from it on
// lie one behind the other. Any thread. The memory is all zero before.
struct snapfile_target {
    void *(*at)(const struct snapfile_target *target, uint64_t page, uint64_t *count);
    void *context;
    // May be NULL: told now and then, in the caller's thread; an error ends the load.
    int (*progress)(const struct snapfile_target *target, uint64_t done_pages, struct error *err);
};

// Everything, read by `workers` threads (0 as in snapfile_params). Each chunk is read and unpacked
// once, each sum checked.
int snapfile_load(const struct snapfile *f, const struct snapfile_target *target, unsigned workers,
                  struct error *err);

// Reads all page data of the chain and checks it, without memory for it. What a MAPPED file has
// outside its pages must be zero.
int snapfile_verify(const struct snapfile *f, unsigned workers, struct error *err);

// --- directories

// Whether a snapshot beside `path` has it as its parent: 1 and its name, 0, or an error.
int snapfile_needed(const char *path, char by[SNAPFILE_NAME_MAX], struct error *err);
// Removes the file unless another one needs it (-EBUSY names it) or it is no snapshot.
int snapfile_remove(const char *path, struct error *err);
