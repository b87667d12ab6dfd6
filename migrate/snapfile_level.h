// SPDX-License-Identifier: Apache-2.0
// An opened chain of snapshot files, as its readers see it.
#pragma once

#include "migrate/snapfile_format.h"

struct snapfile_level {
    char *path;
    int fd;
    struct snapfile_header header; // checked
    struct snapfile_info info;
    void *sections[SNAPFILE_SECTIONS];
    size_t section_len[SNAPFILE_SECTIONS];
    const struct snapfile_chunk *chunks; // in the index section, checked
    const struct snapfile_run *runs;
};

struct snapfile {
    unsigned depth;
    struct snapfile_level levels[SNAPFILE_DEPTH_MAX];
};

// Reads a chunk, checks and unpacks it to dst. `scratch`: c->len bytes of room; not used for RAW.
int snapfile_chunk_read(const struct snapfile_level *l, uint32_t chunk, void *scratch, void *dst,
                        struct error *err);
// The second half: `data` is what the file has.
int snapfile_chunk_unpack(const struct snapfile_level *l, uint32_t chunk, const void *data,
                          void *dst, struct error *err);
// -EBADMSG with the place.
int snapfile_chunk_damaged(const struct snapfile_level *l, uint32_t chunk, const char *what,
                           struct error *err);
