// SPDX-License-Identifier: Apache-2.0
// The working set of a restored guest: which pages it touched first, in their order, kept in a file
// beside its snapshot. docs/formats.md draws it. A hint only: a damaged or foreign one is ignored.
#pragma once

#include <stdint.h>

#include "migrate/snapfile.h"
#include "vmm/error.h"

enum { WORKSET_MAX = 1 << 20 }; // pages

struct workset {
    uint64_t *pages; // page indexes in the order of their first touch
    uint32_t nr, cap;
};

// Silently nothing beyond WORKSET_MAX.
void workset_add(struct workset *ws, uint64_t page);
void workset_free(struct workset *ws);

// `id` is the snapshot's, `pages` how many its guest has. -ENOENT: there is none. -EINVAL,
// -EBADMSG: it is not this snapshot's, or damaged.
int workset_load(struct workset *ws, const char *path, const uint8_t id[SNAPFILE_ID_LEN],
                 uint64_t pages, struct error *err);
int workset_save(const struct workset *ws, const char *path, const uint8_t id[SNAPFILE_ID_LEN],
                 struct error *err);
