// SPDX-License-Identifier: Apache-2.0
// The bytes of a snapshot file, shared by its writer and its reader. Little endian.
#pragma once

#include "migrate/snapfile.h"
#include "vmm/util.h"

struct snapfile_place { // a section
    uint32_t type;      // enum snapfile_section
    uint32_t crc;       // CRC-32C of its bytes
    uint64_t offset, len;
};

struct snapfile_header {
    char magic[8];
    uint32_t version;
    uint32_t kind, layout, compress; // the enums of snapfile.h
    uint8_t id[SNAPFILE_ID_LEN], parent_id[SNAPFILE_ID_LEN];
    char parent[SNAPFILE_NAME_MAX]; // a name in the same directory, zeros behind it
    uint64_t pages;                 // of guest memory
    uint64_t data_pages, zero_pages;
    uint64_t data_offset, data_bytes;
    uint64_t file_bytes;
    int64_t created_s;
    uint32_t nr_chunks, nr_runs;
    uint32_t nr_sections, reserved;
    // In the order of their types and of their places; the index is the last.
    struct snapfile_place sections[SNAPFILE_SECTIONS - 1];
    uint8_t zero[SNAPFILE_HEADER - 484]; // room
    uint32_t crc;                        // CRC-32C of all before
};
_Static_assert(sizeof(struct snapfile_header) == SNAPFILE_HEADER, "no padding");

enum snapfile_chunk_kind { CHUNK_RAW = 1, CHUNK_LZ4 = 2 };

struct snapfile_chunk {
    uint64_t offset;
    uint32_t len;         // in the file
    uint16_t pages, kind; // kind: enum snapfile_chunk_kind
    uint32_t sum;         // snapfile_sum of the bytes in the file
    uint32_t reserved;
};
_Static_assert(sizeof(struct snapfile_chunk) == 24, "no padding");

#define RUN_ZERO UINT32_MAX // instead of a chunk: these pages are zero

struct snapfile_run {
    uint32_t page, count;
    uint32_t chunk, slot; // slots of a chunk count its pages
};
_Static_assert(sizeof(struct snapfile_run) == 16, "no padding");

// CRC-32C of the page sums (migrate/crc32c.h) of whole pages, continued over the rest.
uint32_t snapfile_sum(const void *data, size_t len);
// Continues `sum` over data behind whole pages.
uint32_t snapfile_sum_more(uint32_t sum, const void *data, size_t len);
uint32_t snapfile_header_crc(const struct snapfile_header *h);

// Everything that can be said about a header by itself. `file_bytes` is the size the file has.
int snapfile_header_check(const struct snapfile_header *h, uint64_t file_bytes, const char *path,
                          struct error *err);
void snapfile_header_info(const struct snapfile_header *h, struct snapfile_info *info);
// Opens a regular file and reads its checked header. The fd, or -errno.
int snapfile_header_read(int dir_fd, const char *name, const char *path, struct snapfile_header *h,
                         struct error *err);

static inline size_t snapfile_index_len(uint32_t nr_chunks, uint32_t nr_runs)
{
    return nr_chunks * sizeof(struct snapfile_chunk) + nr_runs * sizeof(struct snapfile_run);
}

// "a/b" is directory "a" (opened) and name "b".
struct snapfile_path {
    int dir_fd;
    const char *name; // within the path given
    char dir[1024];
};
int snapfile_path_open(struct snapfile_path *p, const char *path, struct error *err);
void snapfile_path_close(struct snapfile_path *p);

unsigned snapfile_workers(unsigned wanted);
